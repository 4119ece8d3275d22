"""The commands of the manual work: the shell and Python blocks of each page run in order against a real server."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.support.server import until

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Tools that a machine for tests may lack; curl is required.
TOOLS = ("openssl", "unzip")

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
# Problem document that a page shows below a command.
PROBLEM = re.compile(r'"status": [45]\d\d.*?"code": "(?P<code>[\w-]+)"', re.DOTALL)

# A refused request fails the page, unless the page shows the refusal.
QUIET = 'curl() { command curl --no-progress-meter "$@"; }'
# Not beside -f, with which some versions of curl refuse it.
STRICT = (
    'curl() { case " $*" in *" -f"*) ;; *) set -- --fail-with-body "$@" ;; esac; '
    'command curl --no-progress-meter "$@"; }'
)

# Ports of servers that pages start themselves; another run of the tests may have taken them.
OWN_PORT = re.compile(r"\b[89]0[1-9]\d\b")

# Ends a page that waits for what does not come.
TIMEOUT_S = 300


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: word behind the fence.
        code: content.
        problem: code of the problem document in the next block, which this one must be answered with, or "".
    """

    language: str
    code: str
    problem: str


def blocks(page: str) -> list[Block]:
    """The blocks of a page that are executed, in order."""
    fences = [(one["language"], textwrap.dedent(one["body"])) for one in FENCE.finditer(page)]
    run = []
    for (language, code), (next_language, shown) in itertools.pairwise([*fences, ("", "")]):
        problem = PROBLEM.search(shown) if next_language == "json" else None
        if language in ("sh", "python"):
            run.append(Block(language, code, problem["code"] if problem else ""))
    return run


def bash(run: list[Block], answers: Path) -> str:
    """One script of consecutive shell blocks; what a refused command prints goes through a file, to be compared."""
    lines = ["set -euo pipefail", STRICT]
    for block in run:
        if block.problem:
            lines += [QUIET, f"{{\n{block.code}}} > '{answers}'", f"cat '{answers}'", STRICT]
            lines += [f"""grep --quiet -E '"code": ?"{block.problem}"' '{answers}'"""]
        else:
            lines += [block.code]
    return "\n".join(lines)


def commands(run: list[Block], answers: Path) -> Iterator[list[str]]:
    """The processes that execute blocks: bash for all shell blocks in a row, an interpreter for each Python block."""
    for language, group in itertools.groupby(run, lambda block: block.language):
        if language == "sh":
            # -x shows the command that failed, before its output.
            yield ["bash", "-xc", bash([*group], answers)]
        else:
            yield from ([sys.executable, "-c", block.code] for block in group)


def execute(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and output of a command; what it left running in the background ends with it."""
    with (
        (folder.parent / "output").open("w+", errors="replace") as output,
        subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A process group of its own, which is ended as a whole.
            start_new_session=True,
        ) as process,
    ):
        try:
            status = process.wait(TIMEOUT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        output.seek(0)
        return status, output.read()


def free_ports(ports: set[str]) -> dict[str, str]:
    """A free port for each of the ports that a page names."""
    with contextlib.ExitStack() as opened:
        sockets = {port: opened.enter_context(socket.socket()) for port in sorted(ports)}
        for one in sockets.values():
            one.bind(("127.0.0.1", 0))
        return {port: str(one.getsockname()[1]) for port, one in sockets.items()}


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Host and port of `unetpp serve` with both bundles."""
    from bench.serving import serving

    home = tmp_path_factory.mktemp("server")
    folders = {"JOBS__FOLDER": home / "jobs", "RUNTIME__TUNING_FOLDER": home / "tuning"}
    environment = {f"UNETPP_{name}": str(folder) for name, folder in folders.items()}
    with serving(ROOT / "bundles", environment, home / "log") as server:
        yield server.client.base_url.netloc.decode()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder like a checkout after `make serve`: copies of samples and bundles, a link to the environment."""
    folder = tmp_path / "checkout"
    samples = Path("server", "web", "samples")
    shutil.copytree(ROOT / samples, folder / samples)
    # Copies, because a page may change a bundle.
    shutil.copytree(ROOT / "bundles", folder / "bundles")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


@pytest.mark.long
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if blocks(page.read_text())],
)
def test_blocks_of_page_run(page: Path, address: str, checkout: Path) -> None:
    run = blocks(page.read_text())
    shell = "".join(block.code for block in run if block.language == "sh")
    if missing := [tool for tool in TOOLS if re.search(rf"\b{tool}\b", shell) and not shutil.which(tool)]:
        pytest.skip(f"needs {', '.join(missing)}")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("UNETPP_")}  # noqa: TID251 - of a child
    environment = inherited | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    free = free_ports({port for block in run for port in OWN_PORT.findall(block.code)})
    for command in commands(run, checkout.parent / "answers"):
        here = [
            OWN_PORT.sub(lambda port: free[port[0]], one.replace("localhost:8000", address))
            for one in command
        ]
        status, output = execute(here, checkout, environment)
        if status:
            pytest.fail(f"exit status {status} of a block of {page.name}:\n{output[-4000:]}", pytrace=False)


def test_block_before_a_problem_document_must_be_answered_with_it() -> None:
    page = '```sh\ncurl a\n```\n\n```json\n{"status": 422,\n "code": "too-deep"}\n```\n\n```sh\ncurl b\n```\n'
    assert [block.problem for block in blocks(page)] == ["too-deep", ""]


@pytest.mark.parametrize("option", ["-s", "-f", "-fs"])
def test_refused_request_fails_the_script_whatever_its_options(
    tmp_path: Path, address: str, option: str
) -> None:
    block = Block("sh", f"curl {option} '{address}/models/none' -o none.json\n", "")
    (command,) = commands([block], tmp_path / "answers")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 22


@pytest.mark.parametrize(("code", "status"), [("too-deep", 0), ("too-wide", 1)])
def test_script_compares_the_code_of_the_problem(tmp_path: Path, code: str, status: int) -> None:
    block = Block("sh", """printf '{"code":"too-deep"}'\n""", code)
    (command,) = commands([block], tmp_path / "answers")
    assert subprocess.run(command, capture_output=True, check=False).returncode == status


def test_script_ends_at_the_first_refused_request(tmp_path: Path, address: str) -> None:
    run = [Block("sh", f"curl '{address}/models/none' -o none.json\ntouch later\n", "")]
    (command,) = commands(run, tmp_path / "answers")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 22
    assert not (tmp_path / "later").exists()


def test_indented_blocks_are_executed_and_console_blocks_are_not() -> None:
    page = "- item\n\n    ```sh\n    true\n    ```\n\n```console\nfalse\n```\n\n```python\npass\n```\n"
    assert [(block.language, block.code) for block in blocks(page)] == [
        ("sh", "true\n"),
        ("python", "pass\n"),
    ]


def test_processes_in_the_background_end_with_the_page(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    block = Block("sh", "sleep 600 &\necho $!\n", "")
    (command,) = commands([block], tmp_path / "answers")
    status, output = execute(command, tmp_path / "folder", {**os.environ})  # noqa: TID251 - of a child
    assert status == 0
    pid = int(re.findall(r"^\d+$", output, re.MULTILINE)[0])

    def ended() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    until(ended)


def test_page_that_changes_a_bundle_changes_a_copy(checkout: Path) -> None:
    shutil.copytree(checkout / "bundles", checkout / "live")
    for manifest in checkout.glob("*/*/manifest.json"):
        manifest.write_text("changed")
    assert not [one for one in ROOT.glob("bundles/*/manifest.json") if one.read_text() == "changed"]
