"""Series that arrive at the node: when they are complete, and what is left of them after a crash."""

import io
import zipfile
from pathlib import Path

import pytest

from server.dicom.spool import OPEN_FACTOR, Series, Spool
from tests.support.service import ManualClock

KEY = ("CT1", "UNETPP", "1.2", "1.2.3")
PLAN = {"params": {"level": 1}, "forward": "A@b:1"}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def spool(tmp_path: Path, clock: ManualClock) -> Spool:
    return Spool(tmp_path / "arriving", 5, clock)


def add(spool: Spool, instance: str, key: tuple[str, str, str, str] = KEY, sender: object = "a") -> None:
    spool.add(key, PLAN, instance, io.BytesIO(instance.encode()), sender)


def files(spool: Spool, series: Series) -> list[bytes]:
    out = io.BytesIO()
    spool.write_zip(series, out)
    with zipfile.ZipFile(out) as archive:
        return [archive.read(name) for name in archive.namelist()]


def test_series_is_complete_when_it_was_quiet_after_its_sender_hung_up(
    spool: Spool, clock: ManualClock
) -> None:
    add(spool, "1.1")
    clock.advance(4)
    add(spool, "1.2")
    spool.hang_up("a")
    clock.advance(4.9)
    assert spool.take_complete() == []
    assert spool.next_s() == pytest.approx(0.1)
    clock.advance(0.1)
    (series,) = spool.take_complete()
    assert sorted(files(spool, series)) == [b"1.1", b"1.2"]
    assert (series.key, series.plan, spool.next_s()) == (KEY, PLAN, None)


def test_open_association_may_pause_for_longer(spool: Spool, clock: ManualClock) -> None:
    add(spool, "1.1")
    clock.advance(5 * OPEN_FACTOR - 1)
    assert spool.take_complete() == []
    clock.advance(1)
    assert len(spool.take_complete()) == 1


def test_another_association_holds_a_series_open(spool: Spool, clock: ManualClock) -> None:
    add(spool, "1.1", sender="a")
    add(spool, "1.2", sender="b")
    spool.hang_up("a")
    clock.advance(6)
    assert spool.take_complete() == []
    spool.hang_up("b")
    assert len(spool.take_complete()) == 1


def test_refused_instance_marks_its_series(spool: Spool, clock: ManualClock) -> None:
    other = (*KEY[:3], "1.2.4")
    spool.refuse(KEY, "1.1")
    for key in (KEY, other):
        add(spool, "1.2", key)
    spool.refuse(KEY, "1.3")
    spool.hang_up("a")
    clock.advance(5)
    assert {series.key: series.refused for series in spool.take_complete()} == {KEY: 2, other: 0}
    # What comes afterwards is another one.
    add(spool, "1.2")
    spool.hang_up("a")
    clock.advance(5)
    assert [series.refused for series in spool.take_complete()] == [0]


def test_refused_instance_that_arrives_later_is_forgiven(spool: Spool, clock: ManualClock) -> None:
    add(spool, "1.1")
    spool.refuse(KEY, "1.2")
    add(spool, "1.2")
    spool.hang_up("a")
    clock.advance(5)
    assert [series.refused for series in spool.take_complete()] == [0]


def test_refused_series_without_an_instance_is_forgotten(spool: Spool, clock: ManualClock) -> None:
    for number in range(100):
        spool.refuse((*KEY[:3], f"{number}"), "1.1")
        clock.advance(5)
    assert len(spool._refused) <= OPEN_FACTOR + 1


def test_disk_that_fails_discards_nothing_and_says_nothing(
    spool: Spool, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(spool, "1.1")
    spool.hang_up("a")
    clock.advance(5)
    (series,) = spool.take_complete()

    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr(Path, "unlink", unlink)
    spool.discard(series)


def test_series_are_separate(spool: Spool, clock: ManualClock) -> None:
    add(spool, "1.1")
    add(spool, "2.1", ("CT1", "UNETPP", "1.2", "1.2.4"))
    spool.hang_up("a")
    clock.advance(5)
    assert len(spool.take_complete()) == 2


def test_instance_that_is_sent_again_counts_once(spool: Spool) -> None:
    add(spool, "1.1")
    add(spool, "1.1")
    assert spool.find(KEY) == (1, 3)
    assert spool.used_bytes == 3


def test_order_of_arrival_does_not_matter(spool: Spool, clock: ManualClock) -> None:
    for instance in ("1.1", "1.2", "1.3"):
        add(spool, instance)
    for instance in ("1.3", "1.1", "1.2"):
        add(spool, instance, (*KEY[:3], "other"))
    spool.hang_up("a")
    clock.advance(5)
    one, other = spool.take_complete()
    assert files(spool, one) == files(spool, other)


def test_restart_goes_on_with_what_there_is(spool: Spool, tmp_path: Path, clock: ManualClock) -> None:
    add(spool, "1.1")
    again = Spool(tmp_path / "arriving", 5, clock)
    add(again, "1.2")
    again.hang_up("a")
    clock.advance(5)
    (series,) = again.take_complete()
    assert sorted(files(again, series)) == [b"1.1", b"1.2"]
    again.discard(series)
    assert list((tmp_path / "arriving").iterdir()) == []


def test_complete_series_is_not_joined_after_a_restart(
    spool: Spool, tmp_path: Path, clock: ManualClock
) -> None:
    add(spool, "1.1")
    spool.hang_up("a")
    clock.advance(5)
    (first,) = spool.take_complete()
    spool.seal(first)
    again = Spool(tmp_path / "arriving", 5, clock)
    add(again, "1.2")
    again.hang_up("a")
    clock.advance(5)
    found = {series.id: files(again, series) for series in again.take_complete()}
    assert found.pop(first.id) == [b"1.1"]
    assert list(found.values()) == [[b"1.2"]]


def test_series_that_is_put_back_is_not_joined(spool: Spool, clock: ManualClock) -> None:
    add(spool, "1.1")
    spool.hang_up("a")
    clock.advance(5)
    (first,) = spool.take_complete()
    spool.put_back(first, 60)
    add(spool, "1.2")
    spool.hang_up("a")
    clock.advance(5)
    (second,) = spool.take_complete()
    assert files(spool, second) == [b"1.2"]
    clock.advance(55)
    assert spool.take_complete() == [first]


def test_what_was_never_acknowledged_is_removed(tmp_path: Path) -> None:
    for name, file in (("a", "x.dcm"), ("b", "series.json.part"), ("c", "x.123.part")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(b"x")
    assert Spool(tmp_path, 5).next_s() is None
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fails_keeps_nothing(spool: Spool, tmp_path: Path) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        spool.add(KEY, PLAN, "1.1", Broken(), "a")
    assert spool.find(KEY) == (0, 0)
    assert not list((tmp_path / "arriving").rglob("*.part"))
