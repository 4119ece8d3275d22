"""Pieces of the generated pages of the manual."""

from collections.abc import Iterable, Sequence

REFRESH = "python -m tools.reference"
NOTICE = (
    f"<!-- Written by `{REFRESH}`; a test compares it with the code. Change the code, not this page. -->\n"
)


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, followed by an empty line."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines) + "\n\n"


def cell(value: object) -> str:
    """Text of one cell: a bar or a line break would end it."""
    return " ".join(str(value).replace("|", "\\|").split())


def codes(names: Iterable[object]) -> str:
    """Names in backticks, by comma."""
    return ", ".join(f"`{name}`" for name in names)


def page(title: str, *parts: str) -> str:
    """A whole page; ends with one line break."""
    return f"{NOTICE}\n# {title}\n\n" + "".join(parts).rstrip("\n") + "\n"


def sentence(text: str) -> str:
    """The text with a capital at its beginning and a full stop at its end."""
    text = text.strip()
    return text if not text else text[0].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
