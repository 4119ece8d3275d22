"""The prose check finds words in docstrings, comments and Markdown, and nothing in code."""

import importlib.util
import sys

import pytest

from tests.conftest import ROOT

spec = importlib.util.spec_from_file_location("prose", ROOT / "tools" / "prose.py")
assert spec
assert spec.loader
prose = importlib.util.module_from_spec(spec)
sys.modules["prose"] = prose
spec.loader.exec_module(prose)


def findings(text: str, suffix: str = ".py") -> list[tuple[int, str]]:
    return [(line, words) for line, words, _ in prose.check(text, suffix, prose.read_rules())]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"""Whoever reads it."""\n', [(1, "Whoever")]),
        ("x = 1  # for\n# one, see\n# there\n", [(2, "see there")]),
        ('def f():\n    """What came of it.\n\n    Likewise.\n    """\n', [(2, "What"), (4, "Likewise")]),
        (
            'def f(a, b):\n    """Adds.\n\n    Args:\n        a: of a thing.\n        b: number.\n    """\n',
            [(5, "of")],
        ),
        ('likewise = nobody = "whoever"  # noqa: whoever\n', []),
        ('"""Reads `whoever` and https://whoever.org."""\n', []),
        ('"""There is no file, and it is no longer here."""\n', [(1, "There")]),
        ('"""This is no file."""\n', [(1, "is no file")]),
    ],
    ids=["docstring", "comment block", "start", "entry", "code", "quoted", "no", "is no"],
)
def test_check_python(text: str, expected: list[tuple[int, str]]) -> None:
    assert sorted(findings(text)) == expected


def test_check_markdown_skips_code() -> None:
    text = "# Whoever\n\n```sh\nwhoever\n```\n\n`nobody` <!-- nobody --> [x](nobody.md)\nNobody.\n"
    assert findings(text, ".md") == [(1, "Whoever"), (8, "Nobody")]
