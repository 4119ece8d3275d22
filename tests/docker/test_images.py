"""The Dockerfiles, as far as their text shows; bench/images.py builds and runs them."""

import re
import shutil
import subprocess

import pytest

from tests.conftest import ROOT
from tests.docker.conftest import DOCKER

DOCKERFILES = {name: (DOCKER / f"{name}.Dockerfile").read_text() for name in ("serve", "serve-gpu")}
each = pytest.mark.parametrize("text", DOCKERFILES.values(), ids=DOCKERFILES)


def environment(text: str) -> dict[str, str]:
    """Returns the variables that the last stage sets."""
    (line,) = re.findall(r"^ENV (.*)$", text.replace("\\\n", ""), re.MULTILINE)
    return dict(pair.split("=", 1) for pair in line.split())


@each
def test_last_stage_runs_as_user_and_adds_only_what_was_installed(text: str) -> None:
    last = text[text.rindex("FROM ") :]
    assert re.search(r"^USER [1-9]\d+:[1-9]\d+$", last, re.MULTILINE)
    assert 'ENTRYPOINT ["unetpp"]\nCMD ["serve"]' in last
    assert "HEALTHCHECK" in last
    assert not re.search(r"curl|apt-get|^ADD |^RUN ", last, re.MULTILINE)
    assert {
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }.items() <= environment(text).items()


@each
def test_versions_are_pinned(text: str) -> None:
    assert re.search(r"^FROM python:\d+\.\d+\.\d+-slim-bookworm AS base$", text, re.MULTILINE)
    commands = re.findall(r"\bpip (?:.*\s)?(?:install|wheel)\b.*", text)
    assert len(commands) == 3
    assert all(
        "--constraint /build/constraints.txt" in line or "--build-constraint /build/constraints.txt" in line
        for line in commands
    )
    pinned = {
        line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert {"pip", "hatchling", "pluggy", "pathspec", "packaging", "trove-classifiers"} <= pinned


def test_gpu_image_is_the_cpu_image_with_other_packages() -> None:
    def lines(name: str) -> list[str]:
        text = re.sub(r"^# .*\n", "", DOCKERFILES[name], flags=re.MULTILINE).replace(" \\\n", "\n")
        return [
            line.replace("EXTRAS=cpu", "EXTRAS=…").replace("EXTRAS=gpu", "EXTRAS=…")
            for line in text.splitlines()
        ]

    gpu = "\n".join(lines("serve-gpu"))
    for only in (r"\n +NVIDIA_\w+=\S+", r"\nCOPY docker/cuda.txt /build/", " --constraint /build/cuda.txt"):
        gpu, count = re.subn(only, "", gpu)
        assert count
    assert gpu.splitlines() == lines("serve")


@each
def test_variables_are_settings(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.settings import Settings, unknown_variables

    for name, value in environment(text).items():
        if name.startswith("UNETPP_"):
            monkeypatch.setenv(name, value)
    assert unknown_variables() == []
    settings = Settings()
    assert (settings.http.ops_port, settings.http.ops_host) == (9000, "127.0.0.1")


def test_context_holds_exactly_the_files_that_are_copied() -> None:
    context = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    lines = [
        line
        for text in DOCKERFILES.values()
        for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE)
    ]
    assert {source for line in lines for source in line.split() if not source.startswith("--")} == context


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint(name: str) -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint")
    subprocess.run([hadolint, DOCKER / f"{name}.Dockerfile"], check=True)
