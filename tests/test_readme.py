"""The README is true: generated blocks are up to date, and the commands, links, formats, metrics and settings in it exist."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = "".join(re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)).splitlines()
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    """Text under a heading of the second level."""
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_generated_blocks_are_up_to_date() -> None:
    from bench.readme import fill

    assert fill(README) == README, "run: python -m bench.readme"


def test_linked_files_and_headings_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    headings = (
        re.sub(r"[^\w -]", "", line.lower()) for line in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    )
    anchors = {f"#{heading.replace(' ', '-')}" for heading in headings}
    assert links
    assert [link for link in links if not (link in anchors or (ROOT / link).exists())] == []


@pytest.mark.parametrize("command", sorted(set(re.findall(r"(?:^|[\s/])unetpp (\w+)", "\n".join(COMMANDS)))))
def test_unetpp_command_exists(command: str) -> None:
    from server.cli import app

    assert command in {
        one.name or (one.callback and one.callback.__name__) for one in app.registered_commands
    }


def test_unetpp_commands_need_no_activated_environment() -> None:
    assert any(".venv/bin/unetpp " in line for line in COMMANDS)
    assert [
        line for line in COMMANDS if re.search(r"(?<![\w/.-])unetpp ", line) and not line.startswith("docker")
    ] == []


def test_parameters_and_formats_are_complete() -> None:
    from server.imaging.encode import ENCODERS, FAMILIES
    from server.segment.request import SegmentParams

    assert set(SegmentParams.model_fields) - set(re.findall(r"`(\w+)`", section("Ask"))) == set()
    assert {*FAMILIES, *ENCODERS} - set(re.findall(r"`([\w.]+)`", section("Formats"))) == set()


def test_settings_are_those_of_the_table() -> None:
    table = set(re.findall(r"^\| `(UNETPP_\w+)`", section("Settings"), re.MULTILINE))
    assert set(re.findall(r"\bUNETPP_[A-Z_]+[A-Z]\b(?!__)", README)) - table == set()


def test_metrics_are_those_of_the_server() -> None:
    from server.metrics import Metrics
    from server.metrics_gpu import TEXTS

    # Those of GPUs are created where there is a GPU.
    families = [
        f"{one.name}_total" if one.type == "counter" else one.name for one in Metrics().registry.collect()
    ]
    served = {name for name in {*families, *TEXTS} if name.startswith("unetpp_")}
    named = set()
    for line in section("What to watch").splitlines():
        first = ""
        # `unetpp_reference_iou`, `_dice` is a short form of two names.
        for name in re.findall(r"`(unetpp_\w+|_\w+)(?:\{[^`]*)?`", line):
            first = name if name.startswith("unetpp_") else first
            named.add(name if name is first else first.rpartition("_")[0] + name)
    assert named == served


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_block_writes_the_files_that_it_names(
    code: str, client: Any, ihc: Any, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    from tests.support.files import picture_bytes

    (tmp_path / "images").mkdir()
    for number in range(2):
        (tmp_path / "images" / f"{number}.png").write_bytes(
            picture_bytes(ihc[:128, number * 64 : number * 64 + 160])
        )
    code_here = code.replace("http://localhost:8000", str(client.base_url))
    assert code_here != code
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}  # noqa: TID251 - of a child process
    command = [sys.executable, "-c", code_here]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    written = {path.name for path in tmp_path.iterdir()} - {"images"}
    assert written == set(re.findall(r'"([\w-]+\.(?:csv|png))"', code))
    assert all(name in README.replace(code, "") for name in written)
