"""Single checks of `unetpp doctor`, and what the report leaves out."""

import contextlib
import fcntl
import io
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from server.api.auth import make
from server.doctor import hardware, job_store, operations
from server.doctor.context import Context, captured
from server.doctor.redact import changed_settings, redactor
from server.doctor.report import Check, Report, print_report
from server.jobs.store_sqlite import SQLiteStore
from server.settings import Settings
from tests.server.processes import held_port
from tests.support.server import full_server, make_certificate
from tests.support.service import quiet_settings


def only(results: Iterator[Check]) -> Check:
    (check,) = results
    return check


def context_of(**settings: Any) -> Context:
    return Context(settings=quiet_settings(**settings))


def tree(folder: Path) -> dict[str, int]:
    """Every file and folder with its time of change."""
    return {str(path): path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


class TestHardware:
    def test_both_builds_of_onnxruntime_are_a_warning(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hardware, "installed_version", lambda package: "1.0")
        warning, _ = hardware.check_packages(Context())
        assert warning.status == "warning"
        assert "pip uninstall onnxruntime onnxruntime-gpu" in warning.remedy

    def test_versions_are_facts(self) -> None:
        context = Context()
        assert only(hardware.check_packages(context)).status == "ok"
        assert context.facts["packages"].keys() >= {"numpy", "fastapi"}

    def test_engine_that_is_not_installed_fails(self) -> None:
        check = only(hardware.check_engines(context_of(runtime={"provider": "cuda", "engine": "openvino"})))
        assert check.status == "failed"
        assert check.remedy

    def test_no_engine_at_all_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = SimpleNamespace(engines={}, versions={})
        monkeypatch.setattr(hardware, "read_machine", lambda engine, provider: machine)
        check = only(hardware.check_engines(Context()))
        assert check.status == "failed"
        assert "[cpu]" in check.remedy

    def test_processor_and_cores_are_facts(self) -> None:
        context = Context()
        assert only(hardware.check_processor(context)).status == "ok"
        assert context.facts["processor"]["cores"] >= 1

    def test_container_limit_bounds_memory(self, tmp_path: Path) -> None:
        meminfo, limit, used = (tmp_path / name for name in ("meminfo", "max", "current"))
        meminfo.write_text("MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n")
        assert hardware.read_memory(meminfo, limit, used) == (8192, 4096)
        limit.write_text(f"{2048 * 1024 * 1024}\n")
        used.write_text(f"{512 * 1024 * 1024}\n")
        assert hardware.read_memory(meminfo, limit, used) == (2048, 1536)
        limit.write_text("max\n")
        assert hardware.read_memory(meminfo, limit, used) == (8192, 4096)
        assert hardware.read_memory(tmp_path / "none", limit, used) == (0, 0)

    @pytest.mark.parametrize(
        ("available", "status"), [(5120, "ok"), (5119, "warning"), (0, "warning")], ids=str
    )
    def test_memory_below_what_settings_allow_is_a_warning(
        self, monkeypatch: pytest.MonkeyPatch, available: int, status: str
    ) -> None:
        monkeypatch.setattr(hardware, "read_memory", lambda: (8192, available))
        assert only(hardware.check_memory(context_of())).status == status

    def test_full_disk_is_a_warning(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hardware.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 2**30))
        check = only(hardware.check_disk(context_of()))
        assert check.status == "warning"
        assert "10,240 MiB and 5,120 MiB are free" in check.detail
        assert only(hardware.check_disk(context_of(jobs={"max_disk_mb": 1000}))).status == "ok"

    def test_few_open_files_are_a_warning(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for soft, status in ((1023, "warning"), (1024, "ok"), (resource.RLIM_INFINITY, "ok")):
            monkeypatch.setattr(resource, "getrlimit", lambda kind, soft=soft: (soft, 4096))
            assert only(hardware.check_open_files(Context())).status == status


class TestPorts:
    def test_free_port(self) -> None:
        with held_port() as port:
            assert only(operations.check_ports(context_of(http={"port": port}))).status == "ok"

    def test_port_of_our_server_is_in_use(self) -> None:
        with full_server() as server:
            context = context_of(http={"port": server.port})
            check = only(operations.check_ports(context))
        assert (check.status, context.is_serving) == ("ok", True)
        assert "in use by a running unetpp server" in check.detail

    def test_port_of_our_server_with_keys_and_tls_is_in_use(self, tmp_path: Path) -> None:
        make_certificate(tmp_path)
        (tmp_path / "keys").write_text(make("lab")[1])
        with full_server(
            http={"tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"},
            auth={"keys_file": tmp_path / "keys"},
        ) as server:
            assert operations.is_our_server("127.0.0.1", server.port, tls=True)

    def test_port_of_another_program_fails(self) -> None:
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listening:
            port = listening.getsockname()[1]
            context = context_of(http={"port": port})
            with contextlib.ExitStack() as stack:
                stack.enter_context(pytest.MonkeyPatch.context()).setattr(operations, "PROBE_TIMEOUT_S", 0.05)
                check = only(operations.check_ports(context))
        assert (check.status, context.is_serving) == ("failed", False)
        assert "UNETPP_HTTP__PORT" in check.remedy

    def test_two_ports_that_are_one_fail(self) -> None:
        assert (
            only(operations.check_ports(context_of(http={"port": 8123, "ops_port": 8123}))).status == "failed"
        )

    def test_address_for_all_without_keys_fails(self) -> None:
        with held_port() as port:
            check = only(operations.check_ports(context_of(http={"port": port, "host": "0.0.0.0"})))  # noqa: S104 - refused
        assert check.status == "failed"
        assert "keys" in check.remedy


class TestKeys:
    def test_keys_are_counted_and_not_shown(self, tmp_path: Path) -> None:
        lines = [make(name)[1] for name in ("alice", "bob")]
        (tmp_path / "keys").write_text("\n".join(lines))
        (tmp_path / "keys").chmod(0o600)
        context = context_of(auth={"keys_file": tmp_path / "keys"})
        check = only(operations.check_keys(context))
        assert check.status == "ok"
        assert context.facts["keys"] == {"count": 2, "mode": "600"}
        assert not any(word in check.detail for line in lines for word in line.split(":"))

    def test_file_that_others_may_write_is_a_warning(self, tmp_path: Path) -> None:
        (tmp_path / "keys").write_text(make("lab")[1])
        (tmp_path / "keys").chmod(0o666)
        assert (
            only(operations.check_keys(context_of(auth={"keys_file": tmp_path / "keys"}))).status == "warning"
        )

    @pytest.mark.parametrize("text", [None, "", "secret-by-mistake"], ids=str)
    def test_file_that_cannot_be_used_fails(self, tmp_path: Path, text: str | None) -> None:
        if text is not None:
            (tmp_path / "keys").write_text(text)
        check = only(operations.check_keys(context_of(auth={"keys_file": tmp_path / "keys"})))
        assert check.status == "failed"
        assert "secret-by-mistake" not in check.detail


def test_certificate_without_its_key_fails_and_a_pair_is_ok(tmp_path: Path) -> None:
    assert only(operations.check_tls(context_of())).status == "not_checked"
    make_certificate(tmp_path)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    assert only(operations.check_tls(context_of(http={"tls_cert": cert}))).status == "failed"
    assert only(operations.check_tls(context_of(http={"tls_cert": cert, "tls_key": key}))).status == "ok"


class TestJobs:
    def test_missing_folder_is_not_made(self, tmp_path: Path) -> None:
        folder = tmp_path / "a" / "b"
        assert only(job_store.check_jobs(context_of(jobs={"folder": folder}))).status == "ok"
        assert not (tmp_path / "a").exists()

    def test_folder_below_a_file_fails(self, tmp_path: Path) -> None:
        (tmp_path / "a").touch()
        check = only(job_store.check_jobs(context_of(jobs={"folder": tmp_path / "a" / "b"})))
        assert check.status == "failed"

    def test_folder_that_cannot_be_written_fails(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def refuse(**options: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        # Tests may run as root, who may write everywhere.
        monkeypatch.setattr(job_store.tempfile, "TemporaryFile", refuse)
        check = only(job_store.check_jobs(context_of(jobs={"folder": tmp_path})))
        assert check.status == "failed"
        assert "Permission denied" in check.detail

    def test_look_changes_nothing_and_does_not_keep_the_lock(self, tmp_path: Path) -> None:
        context = context_of(jobs={"folder": tmp_path})
        SQLiteStore(context.known_settings.jobs).close()
        before = tree(tmp_path)
        assert only(job_store.check_jobs(context)).status == "ok"
        assert tree(tmp_path) == before
        with (tmp_path / "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @pytest.mark.parametrize(("is_serving", "status"), [(True, "ok"), (False, "failed")])
    def test_lock_belongs_to_the_server_that_answers(
        self, tmp_path: Path, is_serving: bool, status: str
    ) -> None:
        context = context_of(jobs={"folder": tmp_path})
        context.is_serving = is_serving
        with contextlib.closing(SQLiteStore(context.known_settings.jobs)):
            assert only(job_store.check_jobs(context)).status == status

    @pytest.mark.parametrize("version", [1, 99])
    def test_folder_of_another_version_fails(self, tmp_path: Path, version: int) -> None:
        header = bytearray(b"SQLite format 3\0".ljust(100, b"\0"))
        header[60:64] = version.to_bytes(4, "big")
        (tmp_path / "jobs.sqlite").write_bytes(header)
        check = only(job_store.check_jobs(context_of(jobs={"folder": tmp_path})))
        assert check.status == "failed"
        assert f"format {version}" in check.detail

    def test_damaged_database_fails(self, tmp_path: Path) -> None:
        (tmp_path / "jobs.sqlite").write_bytes(b"not a database")
        assert only(job_store.check_jobs(context_of(jobs={"folder": tmp_path}))).status == "failed"


class TestRedaction:
    def test_paths_and_hosts_of_settings_become_their_names(self) -> None:
        settings = Settings(bundles=Path("/home/alice/study-17"), http={"host": "gpu7.clinic.example"})  # type: ignore[arg-type]
        text = redactor(settings)(
            "/home/alice/study-17/nuclei/L1.onnx: missing; port 80 of gpu7.clinic.example is taken by another program"
        )
        assert (
            text
            == "<UNETPP_BUNDLES>/nuclei/L1.onnx: missing; port 80 of <UNETPP_HTTP__HOST> is taken by another program"
        )

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("hostname=c43 ; file=/build/onnx/cuda.cc ; line=3", "hostname=... ; file=.../cuda.cc ; line=3"),
            ("Failed to load /home/bob/.venv/lib/libx.so.1: no", "Failed to load .../libx.so.1: no"),
            ("POST /segment, /health/live of http://a/b/c", None),
        ],
    )
    def test_other_paths_are_shortened(self, text: str, expected: str | None) -> None:
        shown = redactor(None)(text)
        if expected is None:
            assert "/segment" in shown
            assert "http://a/b/c" in shown
        else:
            assert shown == expected

    def test_changed_settings_show_no_paths_and_no_hosts(self) -> None:
        settings = Settings(
            bundles=Path("/srv/b"),
            http={"host": "gpu7.example", "port": 9001},  # type: ignore[arg-type]
            auth={"keys_file": "/etc/k"},  # type: ignore[arg-type]
        )
        assert changed_settings(settings) == {
            "UNETPP_BUNDLES": "(set)",
            "UNETPP_HTTP__HOST": "(set)",
            "UNETPP_HTTP__PORT": 9001,
            "UNETPP_AUTH__KEYS_FILE": "(set)",
        }

    def test_every_text_of_a_report_is_redacted(self) -> None:
        report = Report([Check("a", "failed", "/x/y/z", "/x/y/z")], {"a": ["/x/y/z", {"b": "/x/y/z"}, 1]})
        assert report.redacted(redactor(None)) == Report(
            [Check("a", "failed", ".../z", ".../z")], {"a": [".../z", {"b": ".../z"}, 1]}
        )

    def test_folder_that_is_a_word_changes_no_sentence(self) -> None:
        settings = Settings(bundles=Path("nuclei"))
        assert redactor(settings)("nuclei: 18 files match") == "nuclei: 18 files match"


def test_text_has_the_verdict_each_remedy_and_no_markup_or_colour() -> None:
    report = Report([Check("disk", "warning", "[red]full", "make room"), Check("gpu", "not_checked", "none")])
    out = io.StringIO()
    print_report(report, Console(file=out))
    assert "[red]full" in out.getvalue()
    assert "remedy: make room" in out.getvalue()
    assert out.getvalue().splitlines()[-1].endswith("healthy (1 warning, 1 not checked)")
    assert "\x1b" not in out.getvalue()
    assert all(line == line.rstrip() for line in out.getvalue().splitlines())


def test_prints_of_python_and_of_c_are_captured_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    with captured() as output:
        print("one")  # noqa: T201 - as a library does
        os.write(2, b"two\n")
        assert output() == "one\ntwo\n"
        print("three")  # noqa: T201
        assert output() == "one\ntwo\nthree\n"
    print("after")  # noqa: T201
    assert capfd.readouterr() == ("after\n", "")
