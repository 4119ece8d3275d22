"""The architecture page names functions that exist, and tells one request in at most twelve steps."""

import importlib
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "develop" / "architecture.md").read_text()
WALK = re.findall(r"^\d+\. .*$", PAGE, re.MULTILINE)
NAMES = sorted(set(re.findall(r"`(server\.[\w.]+)`", PAGE)))


def test_walk_of_one_request_has_at_most_twelve_steps_each_naming_a_function() -> None:
    assert 8 <= len(WALK) <= 12
    assert all(re.search(r"`server\.[\w.]+`", line) for line in WALK)


@pytest.mark.parametrize("name", NAMES)
def test_named_function_exists(name: str) -> None:
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            thing = getattr(thing, part)
        assert callable(thing)
        return
    pytest.fail(f"no module of {name}")
