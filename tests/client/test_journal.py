import json
from pathlib import Path
from typing import Any

import pytest

from client import journal
from client.inputs import Input, InputError
from client.journal import Journal, read, sha256

HEAD: dict[str, Any] = {"version": "1", "options": {"level": 1}, "model": {"name": "m", "sha256": "0"}}


@pytest.fixture
def one(tmp_path: Path) -> Input:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.png"
    path.write_bytes(b"pixels")
    return Input(path)


def finished(tmp_path: Path, one: Input, **head: Any) -> Journal:
    answer = tmp_path / "out" / "a_mask.png"
    answer.parent.mkdir(exist_ok=True)
    answer.write_bytes(b"mask")
    kept = Journal(tmp_path / "out" / "run.json", HEAD | head)
    kept.begin([one], {})
    output = {"path": kept.name(answer), "bytes": 4, "sha256": sha256(answer)}
    kept.set(one, status="done", sha256=sha256(one.path), outputs=[output])
    kept.write(force=True)
    return kept


def again(tmp_path: Path, one: Input, **head: Any) -> Journal:
    path = tmp_path / "out" / "run.json"
    kept = Journal(path, HEAD | head)
    kept.begin([one], read(path))
    return kept


def test_goes_on(tmp_path: Path, one: Input) -> None:
    finished(tmp_path, one)
    assert again(tmp_path, one).is_complete(one, sha256(one.path), None)


@pytest.mark.parametrize(
    "head", [{"version": "2"}, {"options": {"level": 2}}, {"options": {}}, {"model": {"name": "m", "sha256": "1"}}]
)
def test_another_run_is_no_run_to_go_on_from(tmp_path: Path, one: Input, head: dict[str, Any]) -> None:
    finished(tmp_path, one)
    assert not again(tmp_path, one, **head).is_complete(one, sha256(one.path), None)


@pytest.mark.parametrize("damage", ["input", "gone", "shorter", "other", "reference"])
def test_what_is_done_again(tmp_path: Path, one: Input, damage: str) -> None:
    finished(tmp_path, one)
    answer = tmp_path / "out" / "a_mask.png"
    if damage == "input":
        one.path.write_bytes(b"Pixels")
    elif damage == "gone":
        answer.unlink()
    elif damage in ("shorter", "other"):
        answer.write_bytes({"shorter": b"mas", "other": b"Mask"}[damage])
    assert not again(tmp_path, one).is_complete(one, sha256(one.path), "labels" if damage == "reference" else None)


def test_can_be_moved_with_its_files(tmp_path: Path, one: Input) -> None:
    finished(tmp_path / "in", one)
    moved = tmp_path / "elsewhere"
    (tmp_path / "in").rename(moved)
    there = Input(moved / "a.png")
    assert again(moved, there).is_complete(there, sha256(there.path), None)


def test_what_is_not_looked_at_yet_is_kept(tmp_path: Path, one: Input) -> None:
    """A run that goes on and is stopped at once has lost nothing."""
    finished(tmp_path, one)
    again(tmp_path, one)
    assert again(tmp_path, one).is_complete(one, sha256(one.path), None)


def test_is_not_written_for_each_of_thousands(tmp_path: Path, one: Input, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    monkeypatch.setattr(journal, "write", lambda path, data: written.append(path))
    kept = Journal(tmp_path / "run.json", HEAD)
    kept.begin([one], {})
    for _ in range(100):
        kept.set(one, status="pending")
    assert len(written) < 50
    kept.write(force=True)
    assert written


def test_without_a_file(one: Input) -> None:
    kept = Journal(None, HEAD)
    kept.begin([one], {})
    kept.set(one, status="done")
    kept.write(force=True)
    assert kept.name(one.path) == str(one.path)


@pytest.mark.parametrize("text", ["", "{}", "[1]", "hello", '{"format": "other"}'])
def test_another_file_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(InputError, match="no report"):
        read(tmp_path / "x")


def test_none_yet(tmp_path: Path) -> None:
    assert read(tmp_path / "x") == {}


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    journal.write(path, b"before")

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        journal.write(path, b"after")
    assert path.read_bytes() == b"before"
    assert [one.name for one in tmp_path.iterdir()] == ["x"]


def test_it_is_json(tmp_path: Path, one: Input) -> None:
    finished(tmp_path, one)
    document = json.loads((tmp_path / "out" / "run.json").read_text())
    assert document["format"] == "unetpp.run/1"
    assert document["inputs"][0]["path"] == "../in/a.png"
