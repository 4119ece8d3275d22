"""`make gpu-check`: parts that pass, fail, hang, crash or cannot be run; and the parts themselves, on fakes and on the CPU."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_check, serving
from bench.gpu_check import Outcome, Section, check, compare, judge, main, page, parity_rows, table
from server.runtime.bundle import read_bundle
from tests.conftest import ROOT

NO_GPU = {"name": "cuda", "status": "not_checked", "detail": "no NVIDIA GPU was found", "remedy": ""}
WORKS = {"name": "cuda", "status": "ok", "detail": "ONNX Runtime has run L1", "remedy": ""}
BROKEN = {"name": "cuda", "status": "failed", "detail": "libcudnn.so.9 is missing", "remedy": "pip install"}

PARITY = [
    {"total": 2},
    {
        "model": "nuclei",
        "graph": "L1",
        "precision": "fp32",
        "difference": 1e-6,
        "limit": 1e-4,
        "passed": True,
    },
    {
        "model": "nuclei",
        "graph": "L1",
        "precision": "fp16",
        "difference": 0.001,
        "limit": 0.01,
        "passed": True,
    },
]
LEVELS = [
    {"total": 1},
    {"graph": "L1", "precision": "fp16", "provider": "cuda", "side": 96, "http_ms": 1.0, "engine_ms": 0.5},
]


def report(cuda: dict[str, str]) -> Outcome:
    document = {
        "healthy": cuda["status"] != "failed",
        "version": "0",
        "facts": {"gpus": []},
        "checks": [cuda],
    }
    return Outcome([document], 0)


class FakeRunner:
    """Gives the outcomes by part, and remembers which parts were run and with how many seconds."""

    def __init__(self, **outcomes: Outcome) -> None:
        self.outcomes = {"parity": Outcome(PARITY, 0), "levels": Outcome(LEVELS, 0)} | outcomes
        self.limits: dict[str, float] = {}

    def __call__(self, name: str, bundles: Path, limit_s: float) -> Outcome:
        self.limits[name] = limit_s
        return self.outcomes[name]


def verdicts(sections: list[Section]) -> dict[str, str]:
    return {section.name: section.status for section in sections}


@pytest.fixture
def run_main(tmp_path: Path) -> Callable[[FakeRunner], tuple[int, str]]:
    def run(runner: FakeRunner) -> tuple[int, str]:
        code = main(["--output", str(tmp_path / "out.md")], runner)
        return code, (tmp_path / "out.md").read_text()

    return run


def test_all_parts_that_pass_exit_with_0(run_main: Any) -> None:
    code, text = run_main(FakeRunner(doctor=report(WORKS)))
    assert code == 0
    assert "**PASSED**: 3 of 3 parts passed" in text
    assert "| nuclei | L1 | fp16 | 0.001 | 0.01 | True |" in text
    facts = json.loads(text.partition("```json\n")[2].partition("\n```")[0])
    assert facts["levels"] == LEVELS[1:]


def test_without_a_gpu_nothing_is_run_on_it_and_the_exit_code_is_1(run_main: Any) -> None:
    runner = FakeRunner(doctor=report(NO_GPU))
    code, text = run_main(runner)
    assert code == 1
    assert runner.limits.keys() == {"doctor"}
    assert "**NOT PASSED**: 1 of 3 parts passed" in text
    assert "| parity | not run: no NVIDIA GPU was found |" in text
    assert "| levels | not run: no NVIDIA GPU was found |" in text


def test_cuda_that_does_not_work_is_the_reason() -> None:
    sections = check(Path(), run=FakeRunner(doctor=report(BROKEN)))
    assert verdicts(sections) == {"doctor": "failed", "parity": "not run", "levels": "not run"}
    assert sections[0].reason == "failed checks: cuda"
    assert sections[1].reason == "libcudnn.so.9 is missing"


@pytest.mark.parametrize("code", [-11, 0, None])
def test_doctor_that_dies_or_hangs_is_a_failure_and_nothing_else_is_run(code: int | None) -> None:
    runner = FakeRunner(doctor=Outcome([], code, "Segmentation fault"))
    sections = check(Path(), run=runner)
    assert verdicts(sections) == {"doctor": "failed", "parity": "not run", "levels": "not run"}
    assert "Segmentation fault" in sections[0].text
    assert "gave no report" in sections[1].reason


def test_one_failed_part_does_not_stop_the_next() -> None:
    bad = [PARITY[0], PARITY[1], PARITY[2] | {"passed": False, "difference": 0.5}]
    sections = check(Path(), run=FakeRunner(doctor=report(WORKS), parity=Outcome(bad, 0)))
    assert verdicts(sections) == {"doctor": "passed", "parity": "failed", "levels": "passed"}
    assert sections[1].reason == "1 of 2 differ or cannot run"


@pytest.mark.parametrize(
    ("outcome", "status", "words"),
    [
        (Outcome(PARITY[:2], None), "not run", "time limit of 9 s was reached after 1 of 2"),
        (Outcome([], None), "not run", "time limit of 9 s was reached after 0 of an unknown number"),
        (
            Outcome([PARITY[0], PARITY[1] | {"passed": False}], None),
            "failed",
            "1 of 1 differ or cannot run",
        ),
        (
            Outcome([], 1, "Traceback\nModuleNotFoundError: No module named 'httpx'"),
            "not run",
            "a package is missing: ModuleNotFoundError: No module named 'httpx'",
        ),
        (Outcome(PARITY[:2], -11), "failed", "ended with -11 after 1 of 2"),
        (Outcome(PARITY[:2], 0), "failed", "ended with 0 after 1 of 2"),
        (Outcome([{"total": 0}], 0), "not run", "nothing is served on a GPU"),
        (Outcome([], 0), "failed", "ended with 0 after 0 of an unknown number"),
    ],
)
def test_part_that_is_not_complete_never_passes(outcome: Outcome, status: str, words: str) -> None:
    section = judge("parity", outcome, 9, 9)
    assert section.status == status
    assert words in section.reason


def test_parts_share_the_budget_and_none_begins_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])
    runner = FakeRunner(doctor=report(WORKS))

    def slow(name: str, bundles: Path, limit_s: float) -> Outcome:
        now[0] += 60
        return runner(name, bundles, limit_s)

    sections = check(Path(), 110, slow)
    assert runner.limits == {"doctor": 110, "parity": 50}
    assert verdicts(sections) == {"doctor": "passed", "parity": "passed", "levels": "not run"}
    assert sections[2].reason == "the time limit of 110 s was reached before it began"
    assert gpu_check.BUDGET_S < 600


def test_page_hides_hosts_and_paths_and_keeps_tables_whole() -> None:
    rows = [{"graph": "L1", "error": "a | b\nhostname=h1 /home/alice/x.so failed", "difference": None}]
    text = page([Section("parity", "failed", "1 of 1", table(rows), rows)])
    assert "alice" not in text
    assert "h1" not in text
    assert "| L1 | a \\| b hostname=... .../x.so failed | – |" in text


def test_graph_that_agrees_passes_and_one_that_cannot_be_opened_does_not(shipped_bundle: Path) -> None:
    bundle = read_bundle(shipped_bundle)
    assert compare(bundle, "L1", "fp32", "cpu")["passed"] is True
    row = compare(bundle, "L1", "fp32", "tensorrt")
    assert row["passed"] is False
    assert row["error"]


def test_scores_that_are_not_numbers_do_not_pass(
    monkeypatch: pytest.MonkeyPatch, shipped_bundle: Path
) -> None:
    from server.runtime import golden

    monkeypatch.setattr(golden, "mean_difference", lambda scores, expected: float("inf"))
    row = compare(read_bundle(shipped_bundle), "L1", "fp32", "cpu")
    assert (row["passed"], row["difference"]) == (False, None)
    json.dumps(row, allow_nan=False)


def test_every_graph_is_compared_at_every_precision_that_cuda_runs(
    monkeypatch: pytest.MonkeyPatch, shipped_bundle: Path
) -> None:
    monkeypatch.setattr(gpu_check, "compare", lambda bundle, *case: {"case": case})
    total, *rows = parity_rows(shipped_bundle)
    graphs = ("L1", "L2", "L3", "L4", "accurate")
    expected = {(graph, precision, "cuda") for graph in graphs for precision in ("fp32", "fp16")}
    assert {row["case"] for row in rows} == expected | {("head_std", "fp32", "cuda")}
    assert total == {"total": len(rows)}


def test_no_part_imports_torch() -> None:
    """Its CUDA libraries have the names of those that ONNX Runtime needs, and are of another version."""
    code = "import sys, bench.gpu_check, bench.levels, server.doctor.checks; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False).returncode == 0


class TestProcess:
    """A part in a process of its own, which is replaced by a script."""

    @pytest.fixture
    def run_script(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], Outcome]:
        def run(code: str, limit_s: float) -> Outcome:
            monkeypatch.setattr(
                gpu_check,
                "running",
                # A shell, because it starts in no time.
                lambda command, environment, log: serving.running(["sh", "-c", code], environment, log),
            )
            return gpu_check.run_part("parity", Path(), limit_s)

        return run

    def test_json_lines_are_rows_and_the_rest_is_the_tail(self, run_script: Any) -> None:
        outcome = run_script("""echo '{"total": 1}'; echo '{ not json'; exit 3""", 60)
        assert outcome == Outcome([{"total": 1}], 3, "{ not json")

    def test_process_that_hangs_is_ended_and_its_rows_are_kept(self, run_script: Any) -> None:
        outcome = run_script("""echo '{"total": 1}'; exec sleep 600""", 2)
        assert (outcome.rows, outcome.code) == ([{"total": 1}], None)
