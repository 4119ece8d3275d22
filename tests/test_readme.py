"""The README shows what is: its generated blocks are up to date and its commands exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_generated_blocks_are_up_to_date() -> None:
    from bench.readme import filled

    assert filled(README) == README, "run: python -m bench.readme"


def test_every_linked_file_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^(?:\.venv/bin/)?unetpp (\w+)", README, re.MULTILINE))))
def test_every_command_exists(command: str) -> None:
    from server.cli import app

    assert command in {c.name or (c.callback and c.callback.__name__) for c in app.registered_commands}
