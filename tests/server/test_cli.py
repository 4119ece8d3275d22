import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from server import cli
from server.errors import StoreBroken
from server.jobs.store_sqlite import SQLiteStore
from server.serving import Server
from server.settings import JobsSettings, Settings
from tests.conftest import ROOT
from tests.server.processes import held_port
from tests.support.files import picture_bytes
from tests.support.server import until
from tests.support.service import fake_deployment


@pytest.fixture(autouse=True)
def environment(
    monkeypatch: pytest.MonkeyPatch, shipped_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    monkeypatch.setenv("UNETPP_BUNDLES", str(shipped_bundle))
    monkeypatch.setenv("UNETPP_RUNTIME__ENGINE", "onnxruntime")
    monkeypatch.setenv("UNETPP_RUNTIME__PRECISION", "fp32")
    monkeypatch.setenv("UNETPP_JOBS__FOLDER", str(tmp_path_factory.mktemp("jobs")))
    monkeypatch.setenv("UNETPP_RUNTIME__TUNING_FOLDER", str(tmp_path_factory.mktemp("tuning")))
    monkeypatch.setenv("COLUMNS", "200")
    with held_port() as port:
        monkeypatch.setenv("UNETPP_HTTP__PORT", str(port))
        yield


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def error_of(*arguments: object) -> str:
    """The one line of an error."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def without(*modules: str) -> str:
    """Code that makes modules unimportable, as if they were not installed."""
    return "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in modules)


def test_version_is_printed() -> None:
    assert run("--version").output.startswith("unetpp ")


def test_models_lists_the_graphs() -> None:
    result = run("models")
    assert result.exit_code == 0, result.output
    assert all(word in result.output for word in ("nuclei", "L1", "L4", "accurate"))


def test_models_of_a_damaged_bundle_names_the_file(copied_bundle: Path) -> None:
    (copied_bundle / "L1.onnx").write_bytes(b"")
    assert str(copied_bundle / "L1.onnx") in error_of("models", "--bundles", copied_bundle)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("UNETPP_HTTP__PORT", "99999", "UNETPP_HTTP__PORT"),
        ("UNETPP_RUNTIME__ENGINE", "torch", "UNETPP_RUNTIME__ENGINE"),
        ("UNETPP_HTTP__PROT", "80", "UNETPP_HTTP__PROT does not exist"),
        ("UNETPP_HTTP", "port 80", "UNETPP_HTTP does not exist"),
        ("UNETPP_HTTP__MAX_CONNECTIONS", "9", "UNETPP_HTTP__MAX_CONNECTIONS is a constant now (800)"),
    ],
)
def test_command_with_a_wrong_setting_names_it(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(name, value)
    assert expected in error_of("models")


def test_key_prints_the_line_for_the_file_and_the_secret_apart(tmp_path: Path) -> None:
    from server.api.auth import Keys

    result = run("key", "lab-3")
    assert result.exit_code == 0, result.output
    (tmp_path / "keys").write_text(result.stdout)
    secret = next(word for word in result.stderr.split() if word.startswith("unetpp_"))
    assert secret not in result.stdout
    assert secret in Keys(tmp_path / "keys")


def test_key_with_a_bad_name_is_refused() -> None:
    error_of("key", "lab 3")


class TestTune:
    """What is measured is the business of tests/server/runtime/test_tuning.py."""

    def test_tune_stores_what_a_start_uses(
        self, monkeypatch: pytest.MonkeyPatch, shipped_bundle: Path
    ) -> None:
        from server.runtime.deployment import read_deployment

        # Whether this machine is quiet is not the question here.
        monkeypatch.setattr("server.runtime.tune.NOISE", 1000.0)
        monkeypatch.setattr("server.runtime.tune.TILE_SIDE", {2: 32})
        monkeypatch.setenv("UNETPP_BATCHING__MAX_BATCH_PIXELS", "4096")
        result = run("tune", shipped_bundle, "--limit-s", 1)
        assert result.exit_code == 0, result.output
        settings = Settings()
        (stored,) = settings.runtime.tuning_folder.iterdir()
        assert str(stored) in result.stdout
        rows = json.loads(stored.read_text())["rows"]
        assert {row["graph"] for row in rows} == {"L1", "L2", "L3", "L4", "accurate"}
        # At the start `auto` goes by it.
        deployment = read_deployment(
            shipped_bundle, settings.runtime.model_copy(update={"precision": "auto"}), settings.batching
        )
        assert {deployment.selection.reason[row["graph"]] for row in rows} == {"tuning"}

    def test_tune_on_a_busy_machine_stores_nothing(
        self, monkeypatch: pytest.MonkeyPatch, shipped_bundle: Path
    ) -> None:
        monkeypatch.setattr("server.runtime.tune.NOISE", -1.0)
        monkeypatch.setattr("server.runtime.tune.TILE_SIDE", {2: 32})
        assert "nothing is stored" in error_of("tune", shipped_bundle, "--limit-s", 1)
        assert not list(Settings().runtime.tuning_folder.iterdir())


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Server]:
    """`serve` on a fake bundle, which comes to the point where it would listen."""
    servers: list[Server] = []

    def at_once(server: Server) -> None:
        server.started = True
        servers.append(server)

    monkeypatch.setattr("server.service.read_deployments", lambda *_: {"fake": fake_deployment()})
    monkeypatch.setattr(Server, "run", at_once)
    return servers


class TestServe:
    @pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "L3.onnx"])
    def test_serve_refuses_a_damaged_bundle(self, copied_bundle: Path, name: str) -> None:
        data = (copied_bundle / name).read_bytes()
        (copied_bundle / name).write_bytes(data[: len(data) // 2])
        assert str(copied_bundle / name) in error_of("serve", "--bundles", copied_bundle)

    def test_serve_refuses_two_bundles_of_one_name(self, copied_bundle: Path) -> None:
        shutil.copytree(copied_bundle, copied_bundle.parent / "again")
        assert "names must differ" in error_of("serve", "--bundles", copied_bundle.parent)

    @pytest.fixture
    def taken(self) -> Iterator[int]:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            yield other.getsockname()[1]

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("HTTP__PORT", "{taken}"),
            ("HTTP__OPS_PORT", "{taken}"),
            ("HTTP__HOST", "0.0.0.0"),  # noqa: S104 - refused
            ("HTTP__TLS_CERT", "cert.pem"),
            ("AUTH__KEYS_FILE", "{folder}/keys"),
            ("JOBS__FOLDER", "{folder}"),
        ],
    )
    def test_serve_checks_settings_before_it_reads_bundles(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, taken: int, name: str, value: str
    ) -> None:
        monkeypatch.setattr("server.service.read_deployments", lambda *_: pytest.fail("takes seconds"))
        monkeypatch.setenv(f"UNETPP_{name}", value.format(taken=taken, folder=tmp_path))
        with contextlib.closing(SQLiteStore(JobsSettings(folder=tmp_path))):
            error_of("serve")

    def test_serve_with_options_goes_by_them(
        self, started: list[Server], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("UNETPP_HTTP__STOP_S", "7")
        assert run("serve", "--host", "0.0.0.0", "--insecure").exit_code == 0  # noqa: S104 - for a moment
        assert started[0].config.timeout_graceful_shutdown == 7

    def test_serve_prints_models_and_addresses_except_beside_a_json_log(
        self, started: list[Server], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = run("serve").stdout.splitlines()
        assert lines[0] == "fake (default)"
        assert "fp32  onnxruntime on cpu" in lines[1]
        assert "L1 L2 L3 L4 accurate" in lines[1]
        assert lines[-1].startswith("metrics  http")
        monkeypatch.setenv("UNETPP_LOG__FORMAT", "json")
        assert run("serve").stdout == ""

    def test_serve_that_does_not_start_exits_with_1(
        self, started: list[Server], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Server, "run", lambda server: None)
        assert run("serve").exit_code == 1

    def test_serve_holds_the_jobs_folder_from_the_first_check_on(
        self, started: list[Server], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def read(*_: Any) -> dict[str, Any]:
            with pytest.raises(StoreBroken):
                SQLiteStore(Settings().jobs)
            return {"fake": fake_deployment()}

        monkeypatch.setattr("server.service.read_deployments", read)
        assert run("serve").exit_code == 0

    @pytest.mark.long
    def test_serve_after_sigterm_answers_whom_it_let_in(
        self, ihc: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The shipped bundle under load, as a real process."""
        monkeypatch.setenv("UNETPP_HTTP__DRAIN_S", "0.5")
        body = picture_bytes(ihc[:128, :128])
        with held_port() as port:
            url = f"http://127.0.0.1:{port}"
            command = [sys.executable, "-m", "server.cli", "serve", "--port", f"{port}"]
            with subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT
            ) as process:

                def ready() -> bool:
                    assert process.poll() is None
                    with contextlib.suppress(httpx.TransportError):
                        return httpx.get(f"{url}/health/ready").status_code == 200
                    return False

                def call(called: threading.Semaphore) -> list[httpx.Response]:
                    """Until the server is gone."""
                    answers: list[httpx.Response] = []
                    with (
                        httpx.Client(base_url=url, timeout=60) as client,
                        contextlib.suppress(httpx.TransportError),
                    ):
                        while True:
                            answers.append(client.post("/segment?level=2", content=body))
                            called.release()
                    return answers

                until(ready)
                called = threading.Semaphore(0)
                with ThreadPoolExecutor(4) as pool:
                    calling = [pool.submit(call, called) for _ in range(4)]
                    for _ in range(8):
                        called.acquire()
                    process.send_signal(signal.SIGTERM)
                    answers = [answer for future in calling for answer in future.result()]
                _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        assert {answer.status_code for answer in answers} == {200}
        assert any(answer.headers.get("connection") == "close" for answer in answers)


def test_help_imports_nothing_heavy() -> None:
    """So that it is quick, and works without any extra."""
    ran = python(
        "import sys\nfrom server.cli import app\n"
        "for command in ([], ['serve'], ['segment'], ['models'], ['key'], ['tune'], ['train'], ['verify']):\n"
        "    try:\n        app([*command, '--help'])\n"
        "    except SystemExit as end:\n        assert not end.code\n"
        "    heavy = {'onnxruntime', 'openvino', 'torch', 'onnx', 'monai', 'scipy', 'uvicorn', 'fastapi'} & sys.modules.keys()\n"
        "    assert not heavy, (command, heavy)\n"
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("Usage") == 8


@pytest.mark.parametrize(
    ("missing", "command", "expected"),
    [
        (
            ("torch", "monai", "safetensors", "onnx"),
            "train {recipe} --data {folder} --out {folder}/out",
            "'.[train]'",
        ),
        (("onnxruntime", "openvino"), "serve", "onnxruntime"),
    ],
)
def test_command_without_its_extra_says_how_to_install_it(
    tmp_path: Path, missing: tuple[str, ...], command: str, expected: str
) -> None:
    (tmp_path / "recipe.toml").write_text("")
    arguments = command.format(recipe=tmp_path / "recipe.toml", folder=tmp_path).split()
    ran = python(without(*missing) + f"from server.cli import app\napp({arguments!r})\n")
    assert ran.returncode == 1, ran.stderr
    (line,) = [line for line in ran.stderr.splitlines() if "error:" in line]
    assert "pip install" in line
    assert expected in line
    assert "Traceback" not in ran.stderr


def test_service_with_one_engine_installed_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNETPP_RUNTIME__ENGINE", "auto")
    ran = python(
        without("onnxruntime")
        + "from server.service import open_service\nfrom server.settings import Settings\n"
        + "service = open_service(Settings())\nservice.open()\n"
        + "print(service.registry.get('nuclei').recommended.choice.candidate.engine)\nservice.close()\n"
    )
    assert ran.stdout == "openvino\n", ran.stderr
