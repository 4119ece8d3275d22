"""The README shows what is: its generated blocks are up to date and its commands exist."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


# What is to be typed.
TYPED = [line for block in re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL) for line in block.splitlines()]


def test_generated_blocks_are_up_to_date() -> None:
    from bench.readme import filled

    assert filled(README) == README, "run: python -m bench.readme"


def test_every_linked_file_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_commands_are_found_without_an_activated_environment() -> None:
    """`unetpp` alone is nobody's, but in an image, where it is on the path."""
    assert any(".venv/bin/unetpp " in line for line in TYPED)
    assert [line for line in TYPED if re.search(r"(?<![\w/.-])unetpp ", line) and not line.startswith("docker")] == []


def test_metrics_to_watch_are_those_that_there_are() -> None:
    from server.metrics import Metrics
    from server.metrics_gpu import TEXTS

    # GPUs have theirs only where there are some.
    live = {f"{family.name}_total" if family.type == "counter" else family.name for family in Metrics().registry.collect()} | set(
        TEXTS
    )
    live = {name for name in live if name.startswith("unetpp_")}
    told: set[str] = set()
    (section,) = re.findall(r"^## What to watch$(.*?)^##", README, re.MULTILINE | re.DOTALL)
    for line in section.splitlines():
        first = ""
        for name in re.findall(r"`(unetpp_\w+\*?|_\w+)(?:\{[^`]*)?`", line):
            # `unetpp_x_iou`, `_dice`
            first = name if name.startswith("unetpp_") else first
            told.add(name if name is first else first.rpartition("_")[0] + name)
    families = tuple(name.removesuffix("*") for name in told if name.endswith("*"))
    assert {name for name in told if not name.endswith("*")} - live == set()
    assert {name for name in live if not name.startswith(families)} - told == set()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"(?:^|[\s/])unetpp (\w+)", "\n".join(TYPED)))))
def test_every_command_exists(command: str) -> None:
    from server.cli import app

    assert command in {c.name or (c.callback and c.callback.__name__) for c in app.registered_commands}


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
def test_python_does_what_it_says(code: str, client: Any, ihc: Any, tmp_path: Path) -> None:
    """Against a real server, on a folder of real images."""
    pytest.importorskip("matplotlib")
    from tests.support.files import picture_bytes

    (tmp_path / "images").mkdir()
    for number in range(2):
        (tmp_path / "images" / f"{number}.png").write_bytes(picture_bytes(ihc[:128, number * 64 : number * 64 + 160]))
    assert "http://localhost:8000" in code
    ran = subprocess.run(
        [sys.executable, "-c", code.replace("http://localhost:8000", str(client.base_url))],
        cwd=tmp_path, env=os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)},  # noqa: TID251 - of a child
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    written = {path.name for path in tmp_path.iterdir()} - {"images"}
    assert written == set(re.findall(r'"([\w-]+\.(?:csv|png))"', code))
    for name in written:
        assert name in README.replace(code, "")
