"""`unetpp doctor` as a whole: it ends in words whatever it meets, and changes nothing."""

import getpass
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server import cli
from server.doctor.checks import CHECKS, Row, examine
from server.doctor.context import Context
from server.doctor.report import Check
from server.jobs.store_sqlite import SQLiteStore
from server.runtime.tuning import Tuning, TuningKey, TuningRow, store_tuning
from server.settings import JobsSettings
from tests.conftest import ROOT
from tests.server.processes import held_port
from tests.server.test_doctor_checks import tree

# All but the slow ones: opening graphs.
QUICK = {name: row for name, row in CHECKS.items() if name != "graphs"}


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, shipped_bundle: Path, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("UNETPP_BUNDLES", str(shipped_bundle))
    monkeypatch.setenv("UNETPP_RUNTIME__ENGINE", "onnxruntime")
    monkeypatch.setenv("UNETPP_JOBS__FOLDER", str(tmp_path / "jobs"))
    monkeypatch.setenv("UNETPP_RUNTIME__TUNING_FOLDER", str(tmp_path / "tuning"))
    with held_port() as port:
        monkeypatch.setenv("UNETPP_HTTP__PORT", str(port))
        yield tmp_path


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def failed(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks if check.status == "failed"}


def test_sound_installation_is_healthy_and_unchanged(folder: Path, shipped_bundle: Path) -> None:
    before = tree(shipped_bundle), tree(folder)
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert (tree(shipped_bundle), tree(folder)) == before
    document = json.loads(result.stdout)
    assert result.exit_code == 0, result.output
    assert document["healthy"]
    assert document.keys() == {"healthy", "version", "facts", "checks"}
    assert all(check.keys() == {"name", "status", "detail", "remedy"} for check in document["checks"])
    assert {check["name"].split(":")[0] for check in document["checks"]} == CHECKS.keys()
    graphs = {row["graph"]: row for row in document["facts"]["graphs"]}
    assert graphs.keys() == {"L1", "L2", "L3", "L4", "accurate", "head_std"}
    assert all(row["engine"] == "onnxruntime" and row["milliseconds"] > 0 for row in graphs.values())
    words = (str(ROOT), str(folder), str(Path.home()), f"hostname={socket.gethostname()}")
    assert not any(word in result.stdout for word in words)
    assert f"/{getpass.getuser()}/" not in result.stdout


def test_text_says_the_verdict_and_the_exit_code(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("UNETPP_BUNDLES", str(folder / "none"))
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert "NOT HEALTHY" in result.stdout
    assert "remedy: set UNETPP_BUNDLES" in result.stdout
    assert str(folder) not in result.stdout


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("UNETPP_HTTP__PORT", "99999", "UNETPP_HTTP__PORT"),
        ("UNETPP_RUNTIME__ENGINE", "torch", "UNETPP_RUNTIME__ENGINE"),
    ],
)
def test_invalid_setting_fails_and_what_needs_settings_is_not_checked(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, word: str
) -> None:
    monkeypatch.setenv(name, value)
    report = examine()
    assert not report.healthy
    assert failed(report.checks).keys() == {"settings"}
    assert word in by_name(report.checks)["settings"].detail
    skipped = {name for name, row in CHECKS.items() if row.needs_settings}
    assert all(by_name(report.checks)[name].status == "not_checked" for name in skipped)


def test_misspelt_setting_of_a_group_is_one_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNETPP_HTTP__PROT", "80")
    checks = examine(checks=QUICK).checks
    assert [check.name for check in checks if check.status == "failed"] == ["settings"]


def test_misspelt_setting_fails_and_the_others_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNETPP_BUNDLE", "x")
    report = examine(checks=QUICK)
    assert failed(report.checks).keys() == {"settings"}
    assert by_name(report.checks)["bundles:nuclei"].status == "ok"


def test_damaged_bundle_does_not_hide_the_sound_one(
    monkeypatch: pytest.MonkeyPatch, copied_bundle: Path, volume_bundle: Path
) -> None:
    (copied_bundle / "L1.onnx").write_bytes(b"")
    shutil.copytree(volume_bundle, copied_bundle.parent / "hippocampus")
    monkeypatch.setenv("UNETPP_BUNDLES", str(copied_bundle.parent))
    report = examine(checks=QUICK)
    assert failed(report.checks).keys() == {"bundles:nuclei"}
    assert "<UNETPP_BUNDLES>/nuclei/L1.onnx" in failed(report.checks)["bundles:nuclei"].detail
    assert by_name(report.checks)["bundles:hippocampus"].status == "ok"


def test_two_bundles_of_one_name_fail(monkeypatch: pytest.MonkeyPatch, copied_bundle: Path) -> None:
    shutil.copytree(copied_bundle, copied_bundle.parent / "other")
    monkeypatch.setenv("UNETPP_BUNDLES", str(copied_bundle.parent))
    assert failed(examine(checks=QUICK).checks).keys() == {"bundles:other"}


def test_default_model_that_is_not_there_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNETPP_DEFAULT_MODEL", "liver")
    assert failed(examine(checks=QUICK).checks).keys() == {"bundles"}


def test_manifest_that_cannot_be_read_fails(monkeypatch: pytest.MonkeyPatch, copied_bundle: Path) -> None:
    (copied_bundle / "manifest.json").write_text("{")
    monkeypatch.setenv("UNETPP_BUNDLES", str(copied_bundle))
    assert failed(examine(checks=QUICK).checks).keys() == {"bundles:nuclei"}


def test_precision_that_cannot_be_served_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNETPP_RUNTIME__PRECISION", "bf16")
    check = failed(examine(checks=QUICK).checks)["bundles:nuclei"]
    assert "bf16" in check.detail


def test_wrong_golden_pair_fails_its_graphs(monkeypatch: pytest.MonkeyPatch, copied_bundle: Path) -> None:
    import numpy as np

    from tests.support.bundles import rewrite_hashes

    with np.load(copied_bundle / "golden.npz") as arrays:
        changed = {
            name: 1 - array if name.startswith("scores/L1/") else array for name, array in arrays.items()
        }
    np.savez(copied_bundle / "golden.npz", **changed)
    rewrite_hashes(copied_bundle)
    monkeypatch.setenv("UNETPP_BUNDLES", str(copied_bundle))
    monkeypatch.setenv("UNETPP_RUNTIME__PRECISION", "fp32")
    report = examine()
    assert "graphs:nuclei/L1" in failed(report.checks)
    assert "golden" in failed(report.checks)["graphs:nuclei/L1"].detail
    assert by_name(report.checks)["graphs:nuclei/L2"].status == "ok"


def test_precision_that_is_computed_badly_is_a_warning_with_what_serves_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from server.runtime import golden

    monkeypatch.setattr(golden, "TOLERANCE", golden.TOLERANCE | {"int8": 0.0})
    checks = {name: row for name, row in CHECKS.items() if name in ("settings", "bundles", "graphs")}
    report = examine(checks=checks)
    assert report.healthy
    check = by_name(report.checks)["graphs:nuclei/L1"]
    assert check.status == "warning"
    assert check.detail.startswith("fp32, onnxruntime on cpu, by rule")


def test_jobs_folder_that_another_server_locks_fails(folder: Path) -> None:
    store = SQLiteStore(JobsSettings(folder=folder / "jobs"))
    try:
        assert failed(examine(checks=QUICK).checks).keys() == {"jobs"}
    finally:
        store.close()


def test_keys_file_that_cannot_be_read_fails(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("UNETPP_AUTH__KEYS_FILE", str(folder))
    report = examine(checks=QUICK)
    assert failed(report.checks).keys() == {"keys"}
    assert "<UNETPP_AUTH__KEYS_FILE>" in failed(report.checks)["keys"].detail


class TestTuning:
    @pytest.fixture
    def context(self) -> Context:
        context = Context()
        for name in ("settings", "bundles"):
            list(CHECKS[name].run(context))
        return context

    def tuning(self, context: Context, **changes: Any) -> Tuning:
        from server.runtime.machine import read_machine

        deployment = context.deployments["nuclei"]
        key = TuningKey.of(deployment.bundle, read_machine("onnxruntime")).model_copy(update=changes)
        row = TuningRow(
            graph="L1",
            precision="fp32",
            engine="onnxruntime",
            provider="cpu",
            milliseconds=1,
            batch_pixels=65536,
        )
        return Tuning(key=key, created=0, rows=(row,))

    def check(self) -> Check:
        rows = {name: CHECKS[name] for name in ("settings", "bundles", "tuning")}
        return by_name(examine(checks=rows).checks)["tuning:nuclei"]

    def test_tuning_of_another_machine_is_a_warning(self, context: Context, folder: Path) -> None:
        store_tuning(self.tuning(context, cores=777), folder / "tuning")
        assert self.check().status == "warning"
        assert self.check().remedy == "unetpp tune"

    def test_tuning_that_fits_is_ok(self, context: Context, folder: Path) -> None:
        store_tuning(self.tuning(context), folder / "tuning")
        assert self.check() == Check(
            "tuning:nuclei", "ok", "measured on 1970-01-01; decides engine and precision"
        )

    def test_no_tuning_and_one_of_another_bundle_are_ok(self, context: Context, folder: Path) -> None:
        assert self.check().status == "ok"
        store_tuning(self.tuning(context, bundle="0" * 64), folder / "tuning")
        (folder / "tuning" / "broken.json").write_text("{")
        assert "none stored" in self.check().detail


def test_check_that_raises_is_a_failed_check_and_the_others_run() -> None:
    def broken(context: Context) -> Iterator[Check]:
        yield Check("broken", "ok", "first")
        raise KeyError("surprise")

    def sound(context: Context) -> Iterator[Check]:
        yield Check("sound", "ok", "fine")

    rows = {"broken": Row(broken, needs_settings=False), "sound": Row(sound, needs_settings=False)}
    first, second, third = examine(checks=rows).checks
    assert (first.status, second.status, third.status) == ("ok", "failed", "ok")
    assert "KeyError" in second.detail


def test_check_that_hangs_is_a_failed_check_and_the_others_run() -> None:
    gate = threading.Event()

    def hanging(context: Context) -> Iterator[Check]:
        gate.wait(60)
        yield Check("hanging", "ok", "late")

    def sound(context: Context) -> Iterator[Check]:
        yield Check("sound", "ok", "fine")

    rows = {
        "hanging": Row(hanging, needs_settings=False, limit_s=0.05),
        "sound": Row(sound, needs_settings=False),
    }
    try:
        first, second = examine(checks=rows).checks
    finally:
        gate.set()
    assert (first.name, first.status) == ("hanging", "failed")
    assert second.status == "ok"


def test_command_ends_beside_a_check_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def hanging(context: Context) -> Iterator[Check]:
        gate.wait(60)
        yield Check("gpu", "ok", "late")

    def leave(code: int) -> None:
        raise SystemExit(code)

    for name in list(CHECKS):
        monkeypatch.delitem(CHECKS, name)
    monkeypatch.setitem(CHECKS, "gpu", Row(hanging, needs_settings=False, limit_s=0.05))
    monkeypatch.setattr(cli.os, "_exit", leave)
    try:
        result = CliRunner().invoke(cli.app, ["doctor"])
    finally:
        gate.set()
    assert result.exit_code == 1
    assert "NOT HEALTHY (1 failed)" in result.stdout


def test_library_that_ends_the_process_leaves_the_name_of_the_check() -> None:
    code = """
import ctypes
from server.doctor.checks import Row, examine
def crashing(context):
    yield ctypes.string_at(0)
examine(checks={"gpu": Row(crashing, needs_settings=False)})
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert ran.returncode < 0
    assert "Segmentation fault" in ran.stderr
    assert "in crashing" in ran.stderr


def test_manual_explains_every_check() -> None:
    page = (ROOT / "docs" / "operate" / "doctor.md").read_text()
    assert [name for name in CHECKS if f"| `{name}` |" not in page] == []
