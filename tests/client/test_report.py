import json
from pathlib import Path
from typing import Any

import pytest

from client.errors import InputError
from client.files import replacing, sha256
from client.inputs import Input
from client.report import Report, read_report

HEAD: dict[str, Any] = {"version": "1", "options": {"level": 1}, "model": {"name": "m", "sha256": "0"}}


@pytest.fixture
def one(tmp_path: Path) -> Input:
    """An input whose answer is written and reported as done."""
    one = Input(tmp_path / "home" / "a.png")
    one.path.parent.mkdir()
    one.path.write_bytes(b"pixels")
    answer = tmp_path / "home" / "out" / "a_mask.png"
    answer.parent.mkdir()
    answer.write_bytes(b"mask")
    report = Report(tmp_path / "home" / "out" / "run.json", HEAD)
    report.begin([one], {})
    outputs = [{"path": report.relative(answer), "sha256": sha256(answer)}]
    report.update(one, status="done", sha256=sha256(one.path), outputs=outputs, note=None)
    report.write(force=True)
    return one


def resumed(one: Input, **head: Any) -> bool:
    """Whether a later run finds the input complete."""
    path = one.path.parent / "out" / "run.json"
    report = Report(path, HEAD | head)
    report.begin([one], read_report(path))
    return report.is_complete(one, sha256(one.path), None)


def test_same_run_is_complete(one: Input) -> None:
    assert resumed(one)
    # A run that is interrupted before it looks at an input keeps its entry.
    assert resumed(one)


def test_run_can_be_moved(one: Input, tmp_path: Path) -> None:
    (tmp_path / "home").rename(tmp_path / "elsewhere")
    assert resumed(Input(tmp_path / "elsewhere" / "a.png"))


@pytest.mark.parametrize(
    "head",
    [{"version": "2"}, {"options": {"level": 2}}, {"options": {}}, {"model": {"name": "m", "sha256": "1"}}],
)
def test_other_run_is_not_complete(one: Input, head: dict[str, Any]) -> None:
    assert not resumed(one, **head)


@pytest.mark.parametrize(
    ("name", "content"), [("a.png", b"Pixels"), ("out/a_mask.png", b"Mask"), ("out/a_mask.png", None)]
)
def test_changed_file_is_not_complete(one: Input, name: str, content: bytes | None) -> None:
    path = one.path.parent / name
    path.unlink() if content is None else path.write_bytes(content)
    assert not resumed(one)


def test_other_reference_is_not_complete(one: Input) -> None:
    path = one.path.parent / "out" / "run.json"
    report = Report(path, HEAD)
    report.begin([one], read_report(path))
    assert not report.is_complete(one, sha256(one.path), "0")


def test_report_is_written_once_a_second_at_most(tmp_path: Path) -> None:
    one = Input(tmp_path / "a.png")
    report = Report(tmp_path / "run.json", HEAD)
    report.begin([one], {})
    report.update(one, status="done")
    assert read_report(tmp_path / "run.json")["inputs"] == [{"path": "a.png", "status": "pending"}]
    report.write(force=True)
    assert read_report(tmp_path / "run.json")["inputs"] == [{"path": "a.png", "status": "done"}]


def test_report_without_path_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = Report(None, HEAD)
    report.begin([Input(tmp_path / "a.png")], {})
    report.write(force=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{}", "[1]", "hello", '{"format": "other"}'])
def test_other_file_is_no_report(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(InputError):
        read_report(tmp_path / "x")
    assert read_report(tmp_path / "none") == {}


def test_document(one: Input) -> None:
    document = json.loads((one.path.parent / "out" / "run.json").read_text())
    assert document["format"] == "unetpp.run/1"
    assert document["inputs"][0]["path"] == "../a.png"
    assert "note" not in document["inputs"][0]


def test_replacing_keeps_old_file_after_failure(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"before")
    with pytest.raises(TypeError), replacing(path) as file:
        file.write("no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"before"
    with replacing(path) as file:
        file.write(b"after")
    assert path.read_bytes() == b"after"
    assert [one.name for one in tmp_path.iterdir()] == ["x"]
