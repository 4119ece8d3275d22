"""The page on extending names files, tables and tests that exist."""

import re
import types
from pathlib import Path

import pytest

from server.imaging.decode import DECODERS, Decoder

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "develop" / "extending.md").read_text()
TABLE = [line for line in PAGE.splitlines() if line.startswith("|")]
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:[\w.]+/)+[\w.]*)`", PAGE))))
def test_named_file_exists(name: str) -> None:
    if name.endswith(("NAME.py", "/pgm.py")):
        name = name.rpartition("/")[0]
    assert (ROOT / name).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)`", PAGE))))
def test_named_test_exists(name: str) -> None:
    assert f"def {name}(" in TESTS


@pytest.mark.parametrize(
    ("name", "file"),
    sorted({pair for line in TABLE for pair in re.findall(r"`([A-Z_]{5,})` in `([\w/.]+)`", line)}),
)
def test_named_table_is_in_its_file(name: str, file: str) -> None:
    assert re.search(rf"^{name}\b", (ROOT / file).read_text(), re.MULTILINE)


def test_example_works_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder is a module, the row stands in the table, and the test of the page passes."""
    decoder, row, test = re.findall(
        r'^```py(?:thon)? title="[^"]+"\n(.*?)^```', PAGE, re.MULTILINE | re.DOTALL
    )
    pgm, names = types.ModuleType("pgm"), {"Decoder": Decoder}
    exec(decoder, vars(pgm))  # noqa: S102 - of our own page
    exec(f"rows = {{{row}}}", names | {"pgm": pgm}, names)  # noqa: S102
    monkeypatch.setitem(DECODERS, "pgm", names["rows"]["pgm"])
    exec(test, names)  # noqa: S102
    (run,) = (value for name, value in names.items() if name.startswith("test_"))
    run()
