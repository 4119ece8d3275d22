import asyncio
import contextlib
import io
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as Pillow
from typer.testing import CliRunner, Result

from server import cli
from server.errors import StoreBroken
from server.jobs.store import Store
from server.serving import Server
from server.settings import JobsSettings, Settings
from tests.conftest import ROOT
from tests.support.files import mask_of, picture_bytes


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, shipped_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One engine, one precision: nothing to measure at start."""
    monkeypatch.setenv("UNETPP_BUNDLES", str(shipped_bundle))
    monkeypatch.setenv("UNETPP_RUNTIME__ENGINE", "onnxruntime")
    monkeypatch.setenv("UNETPP_RUNTIME__PRECISION", "fp32")
    monkeypatch.setenv("UNETPP_JOBS__FOLDER", str(tmp_path_factory.mktemp("jobs")))
    monkeypatch.setenv("COLUMNS", "200")
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        monkeypatch.setenv("UNETPP_HTTP__PORT", str(made.getsockname()[1]))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def fails(*arguments: object) -> str:
    """The one line of an error."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def without(*modules: str) -> str:
    """Code that makes modules unimportable, as if they were not installed."""
    return "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in modules)


@pytest.fixture
def image(tmp_path: Path, ihc: np.ndarray) -> Path:
    path = tmp_path / "tissue.png"
    path.write_bytes(picture_bytes(ihc[:200, :240]))
    return path


class TestModels:
    def test_lists_the_graphs(self) -> None:
        result = run("models")
        assert result.exit_code == 0, result.output
        assert all(word in result.output for word in ("nuclei", "L1", "L4", "accurate"))

    def test_damaged(self, copied_bundle: Path) -> None:
        (copied_bundle / "L1.onnx").write_bytes(b"")
        assert str(copied_bundle / "L1.onnx") in fails("models", "--bundles", copied_bundle)


def test_version() -> None:
    assert run("--version").output.startswith("unetpp ")


class TestSettings:
    def test_a_bad_value_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UNETPP_HTTP__PORT", "99999")
        monkeypatch.setenv("UNETPP_RUNTIME__ENGINE", "torch")
        line = fails("models")
        assert "UNETPP_HTTP__PORT" in line
        assert "UNETPP_RUNTIME__ENGINE" in line

    def test_an_unknown_name_in_a_group(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UNETPP_HTTP__PROT", "80")
        assert "UNETPP_HTTP__PROT" in fails("models")

    def test_an_unknown_name_of_a_group(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UNETPP_HTPP__PORT", "80")
        assert "UNETPP_HTPP__PORT" in fails("models")

    def test_a_group_that_is_no_json(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UNETPP_HTTP", "port 80")
        assert "http" in fails("models").lower()


class TestKey:
    def test_the_line_can_be_appended_to_the_file(self, tmp_path: Path) -> None:
        from server.api.auth import Keys

        result = run("key", "lab-3")
        assert result.exit_code == 0, result.output
        (tmp_path / "keys").write_text(result.stdout)
        secret = next(word for word in result.stderr.split() if word.startswith("unetpp_"))
        assert secret not in result.stdout
        assert Keys(tmp_path / "keys").known(secret)

    def test_a_name_that_cannot_be(self) -> None:
        assert "cannot name a key" in fails("key", "lab 3")


class TestServe:
    @pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "L3.onnx"])
    def test_refuses_a_damaged_bundle(self, copied_bundle: Path, name: str) -> None:
        data = (copied_bundle / name).read_bytes()
        (copied_bundle / name).write_bytes(data[: len(data) // 2])
        ran = subprocess.run(
            [sys.executable, "-m", "server.cli", "serve", "--bundles", str(copied_bundle), "--port", "1"],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert ran.returncode == 1
        (line,) = [line for line in ran.stderr.splitlines() if "error:" in line]
        assert str(copied_bundle / name) in line
        assert "Traceback" not in ran.stderr

    def test_doors_are_checked_before_anything_is_opened(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, taken: int) -> None:
        monkeypatch.setattr("server.app.open_bundles", lambda settings: pytest.fail("takes minutes"))
        assert "is taken by another program" in fails("serve", "--port", taken)
        assert "--insecure" in fails("serve", "--host", "0.0.0.0")  # noqa: S104 - refused
        assert "set both, or none" in self.refused(monkeypatch, "HTTP__TLS_CERT", tmp_path / "cert.pem")
        assert "cannot be read" in self.refused(monkeypatch, "AUTH__KEYS_FILE", tmp_path / "keys")
        assert "is taken by another program" in self.refused(monkeypatch, "HTTP__OPS_PORT", taken)

    @pytest.fixture
    def taken(self) -> Iterator[int]:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            yield other.getsockname()[1]

    def refused(self, monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> str:
        with monkeypatch.context() as with_it:
            with_it.setenv(f"UNETPP_{name}", str(value))
            return fails("serve")

    def test_insecure_is_said_on_the_command_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def at_once(server: Server) -> None:
            server.started = True

        monkeypatch.setattr("server.app.open_bundles", lambda settings: fake_bundles())
        monkeypatch.setattr(Server, "run", at_once)
        assert run("serve", "--host", "0.0.0.0", "--insecure").exit_code == 0  # noqa: S104 - for a moment

    def test_a_stalled_client_cannot_keep_it_from_stopping(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ran: list[Server] = []

        def at_once(server: Server) -> None:
            server.started = True
            ran.append(server)

        monkeypatch.setattr("server.app.open_bundles", lambda settings: fake_bundles())
        monkeypatch.setattr(Server, "run", at_once)
        monkeypatch.setenv("UNETPP_HTTP__STOP_S", "7")
        result = run("serve")
        assert result.exit_code == 0, result.output
        assert ran[0].config.timeout_graceful_shutdown == 7

    def test_says_nothing_beside_the_log_where_that_is_json(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def at_once(server: Server) -> None:
            server.started = True

        monkeypatch.setattr("server.app.open_bundles", lambda settings: fake_bundles())
        monkeypatch.setattr(Server, "run", at_once)
        assert "metrics  http" in run("serve").stdout
        monkeypatch.setenv("UNETPP_LOG__FORMAT", "json")
        assert run("serve").stdout == ""

    def test_a_server_that_does_not_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("server.app.open_bundles", lambda settings: fake_bundles())
        monkeypatch.setattr(Server, "run", lambda server: None)
        assert run("serve").exit_code == 1

    def test_refuses_a_jobs_folder_in_use(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("server.app.open_bundles", lambda settings: pytest.fail("takes minutes"))
        monkeypatch.setenv("UNETPP_JOBS__FOLDER", str(tmp_path))
        with contextlib.closing(Store(JobsSettings(folder=tmp_path))):
            line = fails("serve")
        assert f"another server uses the jobs folder {tmp_path}" in line
        assert "UNETPP_JOBS__FOLDER" in line

    def test_its_jobs_folder_is_its_own_from_the_first_check_on(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def warming(settings: Settings) -> dict[str, Any]:
            with pytest.raises(StoreBroken, match="another server uses"):
                Store(settings.jobs)
            return fake_bundles()

        def at_once(server: Server) -> None:
            async def life() -> None:
                app = server.config.app
                async with app.router.lifespan_context(app):
                    server.started = True

            asyncio.run(life())

        monkeypatch.setattr("server.app.open_bundles", warming)
        monkeypatch.setattr(Server, "run", at_once)
        result = run("serve")
        assert result.exit_code == 0, result.output

    @pytest.mark.long
    def test_sigterm_under_load(self, ihc: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
        """The shipped bundle: whoever was let in is answered, and the process ends well."""
        monkeypatch.setenv("UNETPP_HTTP__DRAIN_S", "0.5")
        body = picture_bytes(ihc[:256, :256])
        with socket.socket() as held:
            # Bound and not listening: nobody else gets this port.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{held.getsockname()[1]}"
            command = [sys.executable, "-m", "server.cli", "serve", "--port", url.rpartition(":")[2]]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:

                def call(called: threading.Semaphore) -> list[httpx.Response]:
                    """Until the server is gone."""
                    answers: list[httpx.Response] = []
                    with httpx.Client(base_url=url, timeout=60) as client, contextlib.suppress(httpx.TransportError):
                        while True:
                            answers.append(client.post("/segment?level=2", content=body))
                            called.release()
                    return answers

                while process.poll() is None:
                    with contextlib.suppress(httpx.TransportError):
                        if httpx.get(f"{url}/health/ready").status_code == 200:
                            break
                    time.sleep(0.1)
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

    def test_two_bundles_of_one_name(self, copied_bundle: Path) -> None:
        shutil.copytree(copied_bundle, copied_bundle.parent / "again")
        assert "names must differ" in fails("serve", "--bundles", copied_bundle.parent)


@pytest.mark.parametrize("command", ["", "serve", "segment", "models", "key", "train"])
def test_help_is_quick(command: str) -> None:
    """Nothing heavy is imported to print it, so that it works without any extra."""
    ran = python(
        "import sys\nfrom server.cli import app\n"
        f"try:\n    app({[*command.split(), '--help']!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'onnxruntime', 'openvino', 'torch', 'onnx', 'monai', 'scipy', 'uvicorn'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    assert ran.returncode == 0, ran.stderr
    assert "Usage" in ran.stdout


class TestMissingExtras:
    def test_for_training(self, tmp_path: Path) -> None:
        (tmp_path / "recipe.toml").write_text("")
        arguments = ["train", str(tmp_path / "recipe.toml"), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
        ran = python(without("torch", "monai", "safetensors", "onnx") + f"from server.cli import app\napp({arguments!r})\n")
        assert ran.returncode == 1, ran.stderr
        assert "pip install '.[train]' in the project's folder" in ran.stderr
        assert "Traceback" not in ran.stderr

    @pytest.mark.parametrize("engine", ["auto", "onnxruntime"])
    def test_for_serving(self, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
        monkeypatch.setenv("UNETPP_RUNTIME__ENGINE", engine)
        ran = python(without("onnxruntime", "openvino") + "from server.cli import app\napp(['serve'])\n")
        assert ran.returncode == 1, ran.stderr
        (line,) = [line for line in ran.stderr.splitlines() if "error:" in line]
        assert ("pip install '.[cpu]'" if engine == "auto" else "pip install onnxruntime") in line
        assert "Traceback" not in ran.stderr

    def test_one_engine_is_enough(self, monkeypatch: pytest.MonkeyPatch, image: Path) -> None:
        monkeypatch.setenv("UNETPP_RUNTIME__ENGINE", "auto")
        ran = python(without("onnxruntime") + f"from server.cli import app\napp(['segment', {str(image)!r}, '--level', '1'])\n")
        assert ran.returncode == 0, ran.stderr
        mask = mask_of((image.parent / "tissue_mask.png").read_bytes())
        assert mask.shape == np.asarray(Pillow.open(io.BytesIO(image.read_bytes()))).shape[:2]
