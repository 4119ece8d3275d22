"""`unetpp node`: its options replace what the configuration says."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server import cli

CONFIG = """
[servers.main]
address = "https://pacs/dicom-web"
token_file = "token"
[node]
aet = "FROMFILE"
port = 104
forward = "A@b:1"
callers = ["CT1"]
[[rules]]
modality = "CT"
"""


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[Any, list[Any]]:
    served: list[Any] = []
    monkeypatch.setattr(cli, "_serve", lambda settings, dicom: served.extend((settings, dicom)))
    return CliRunner().invoke(cli.app, ["node", *arguments]), served


def test_options_replace_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    (tmp_path / "pacs.toml").write_text(CONFIG)
    options = (
        "--aet",
        "OPTION",
        "--port",
        "11113",
        "--config",
        str(tmp_path / "pacs.toml"),
        "--http-port",
        "8001",
    )
    result, served = run(monkeypatch, *options)
    assert result.exit_code == 0, result.output
    settings, dicom = served
    assert (settings.http.port, settings.dicom.config) == (8001, tmp_path / "pacs.toml")
    assert (dicom.node.aet, dicom.node.port, dicom.node.forward) == ("OPTION", 11113, "A@b:1")
    assert (dicom.node.callers, dicom.servers["main"].token_file) == (("CT1",), tmp_path / "token")
    assert [rule.modality for rule in dicom.rules] == ["CT"]


def test_node_needs_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    result, served = run(monkeypatch, "--forward", "ORTHANC@127.0.0.1:4242")
    assert result.exit_code == 0, result.output
    assert (served[1].node.aet, served[1].node.host, served[1].node.port) == ("UNETPP", "127.0.0.1", 11112)


@pytest.mark.parametrize("options", [(), ("--forward", "ORTHANC"), ("--forward", "A@b:1", "--aet", "A" * 17)])
def test_mistake_is_one_line(monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]) -> None:
    result, served = run(monkeypatch, *options)
    assert (result.exit_code, served) == (1, [])
    assert result.output.startswith("error: ")
    assert "node." in result.output
