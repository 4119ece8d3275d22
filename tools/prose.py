"""Checks Markdown, and the docstrings and comments of Python files, against the word list in prose.toml.

    python tools/prose.py [--count] FILE_OR_FOLDER ...

Exit status 1 and one line per finding; with --count one line per folder or file given.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RULES = Path(__file__).with_name("prose.toml")
# Parts that are not prose: code in backticks, HTML, targets of links, and addresses.
CODE = re.compile(r"`[^`\n]*`|<[^>\n]*>|\]\([^)\n]*\)|https?://\S+")
DIRECTIVE = re.compile(r"#\s*(?:noqa|type:|fmt:|ruff:|pragma|hadolint|!)")
ENTRY = re.compile(r"^ +\*{0,2}\w+(?:, \*{0,2}\w+)*(?: \([^)]*\))?: +(.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Rule:
    """One row of the word list.

    Attributes:
        remedy: text for the author.
        anywhere, start, entry: compiled expression for each position, or None.
    """

    remedy: str
    anywhere: re.Pattern[str] | None
    start: re.Pattern[str] | None
    entry: re.Pattern[str] | None


@dataclass(frozen=True)
class Block:
    """A piece of prose.

    Attributes:
        line: number of its first line, from 1.
        text: prose with code replaced by spaces.
        docstring: True for docstrings.
    """

    line: int
    text: str
    docstring: bool = False


def read_rules(path: Path = RULES) -> list[Rule]:
    """Reads the word list."""
    return [
        Rule(
            row["remedy"], *(_compile(row.get(place, []), place) for place in ("anywhere", "start", "entry"))
        )
        for row in tomllib.loads(path.read_text())["rule"]
    ]


def check(text: str, suffix: str, rules: list[Rule]) -> Iterator[tuple[int, str, str]]:
    """Yields (line, words, remedy) of each finding in the text of a file."""
    for block in python_blocks(text) if suffix == ".py" else markdown_blocks(text):
        for rule in rules:
            for offset, words in _matches(rule, block):
                yield block.line + block.text.count("\n", 0, offset), " ".join(words.split()), rule.remedy


def python_blocks(source: str) -> Iterator[Block]:
    """Yields the docstrings of a Python file, and its comments; consecutive comment lines are one block."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield Block(first.lineno, _without_code(first.value.value), docstring=True)
    block: list[str] = []
    end = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not DIRECTIVE.match(token.string):
            if block and token.start[0] != end + 1:
                yield Block(end - len(block) + 1, "\n".join(block))
                block = []
            block.append(_without_code(token.string.lstrip("# ")))
            end = token.start[0]
    if block:
        yield Block(end - len(block) + 1, "\n".join(block))


def markdown_blocks(source: str) -> Iterator[Block]:
    """Yields a Markdown file as one block, with fenced code blanked."""
    fenced = re.compile(r"^(`{3,}|~{3,}).*?^\1", re.MULTILINE | re.DOTALL)
    yield Block(1, _without_code(fenced.sub(lambda match: "\n" * match[0].count("\n"), source)))


def files(paths: list[Path]) -> Iterator[Path]:
    """Yields the files among the paths, and the Python and Markdown files in the folders among them."""
    for path in paths:
        yield from (
            sorted(p for p in path.rglob("*") if p.suffix in {".py", ".md"}) if path.is_dir() else [path]
        )


def main() -> int:
    """Prints the findings; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", action="store_true", help="print the number of findings of each path")
    parser.add_argument("paths", nargs="+", type=Path)
    options = parser.parse_args()
    rules, total = read_rules(), 0
    for path in options.paths:
        lines = [
            f"{file}:{line}: {words!r}: {remedy}"
            for file in files([path])
            for line, words, remedy in sorted(check(file.read_text(), file.suffix, rules))
        ]
        total += len(lines)
        sys.stdout.write(
            "".join(f"{line}\n" for line in ([f"{len(lines):5} {path}"] if options.count else lines))
        )
    return int(total > 0)


def _compile(words: list[str], place: str) -> re.Pattern[str] | None:
    if not words:
        return None
    spaced = "|".join(words).replace(" ", r"\s+").replace(r"(?<!there\s+)", "(?<!there )")
    return re.compile(rf"\b(?:{spaced})\b", re.IGNORECASE if place == "anywhere" else 0)


def _matches(rule: Rule, block: Block) -> Iterator[tuple[int, str]]:
    if rule.anywhere:
        yield from ((match.start(), match[0]) for match in rule.anywhere.finditer(block.text))
    if not block.docstring:
        return
    if rule.start and (match := rule.start.match(block.text)):
        yield 0, match[0]
    if rule.entry:
        for entry in ENTRY.finditer(block.text):
            if match := rule.entry.match(entry[1]):
                yield entry.start(1), match[0]


def _without_code(text: str) -> str:
    return CODE.sub(lambda match: " " * len(match[0]), text)


if __name__ == "__main__":
    sys.exit(main())
