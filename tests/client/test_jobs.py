import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import errors, jobs
from client.jobs import Events, wait
from client.replies import Reply
from client.retry import Retries
from client.talk import Close, Lost, Next, Open, Send, Sleep


def document(state: str, done: int = 0, **more: Any) -> dict[str, Any]:
    return {"id": "x", "state": state, "stage": None, "windows": {"done": done, "total": 9}, "error": None} | more


def event(state: str, done: int = 0, **more: Any) -> bytes:
    kind = state if state in jobs.FINISHED else "progress"
    return f"event: {kind}\ndata: {json.dumps(document(state, done, **more))}\n\n".encode()


def asked(state: str, done: int = 0, **more: Any) -> Reply:
    return Reply(200, {}, json.dumps(document(state, done, **more)).encode())


STREAM = Reply(200)


def followed(*script: Any, timeout_s: float | None = None) -> tuple[Any, list[int], list[Any]]:
    """Follows a job by a script of what comes of Open, Next and Send: the end, the progress, and the commands."""
    told: list[int] = []
    seen: list[Any] = []
    talk = wait("x", Retries(most=0), lambda d: told.append(d["windows"]["done"]), timeout_s)
    left = iter(script)
    came: Any = None
    while True:
        try:
            command = talk.throw(came) if isinstance(came, Lost) else talk.send(came)
        except StopIteration as end:
            assert next(left, None) is None, "not all of the script was played"
            return end.value, told, seen
        seen.append(command)
        came = None if isinstance(command, Close | Sleep) else next(left)


def names(commands: list[Any]) -> str:
    return " ".join(type(command).__name__ for command in commands)


def test_by_events() -> None:
    end, told, seen = followed(STREAM, event("queued"), event("running", 3) + event("running", 5), event("done", 9))
    assert end["state"] == "done"
    assert told == [0, 3, 5, 9]
    assert names(seen) == "Open Next Next Next Close"


def test_an_event_in_two_pieces() -> None:
    whole = event("running", 4)
    assert followed(STREAM, whole[:20], whole[20:], event("done", 9))[1] == [4, 9]


@pytest.mark.parametrize("broken", [None, Lost("reset", again=True), b"data: {no json\n\n"])
def test_a_stream_that_breaks_is_opened_again(broken: Any) -> None:
    end, told, seen = followed(STREAM, event("running", 1), broken, asked("running", 2), STREAM, event("done", 9))
    assert end["state"] == "done"
    assert told == [1, 2, 9]
    assert names(seen) == "Open Next Next Close Send Sleep Open Next Close"


@pytest.mark.parametrize("refused", [Reply(429, {"retry-after": "60"}), Reply(502), Reply(204), Lost("refused", again=True)])
def test_without_a_stream_it_asks_now_and_then(refused: Any) -> None:
    end, told, seen = followed(refused, asked("queued"), refused, asked("running", 5), refused, asked("done", 9))
    assert end["state"] == "done"
    assert told == [0, 5, 9]
    pauses = [command.seconds for command in seen if isinstance(command, Sleep)]
    assert pauses == [1, 2]


def test_pauses_are_bounded() -> None:
    script = [Reply(502), asked("running")] * 10
    seen = followed(*script, Reply(502), asked("done"))[2]
    assert max(command.seconds for command in seen if isinstance(command, Sleep)) == jobs.LONGEST_S


def test_the_end_came_while_nobody_listened() -> None:
    assert followed(STREAM, event("running", 1), None, asked("done", 9))[0]["state"] == "done"


def test_silence_is_not_waited_for_without_end() -> None:
    seen = followed(STREAM, event("done"))[2]
    assert seen[0].limit_s == jobs.SILENCE_S
    seen = followed(STREAM, event("done"), timeout_s=5)[2]
    assert seen[0].limit_s <= 5


@pytest.mark.parametrize("status", [404, 401])
def test_a_job_that_is_not_there(status: int) -> None:
    with pytest.raises(errors.of_status(status)):
        followed(Reply(status))


def test_a_job_that_is_removed_meanwhile() -> None:
    with pytest.raises(errors.NotFound):
        followed(STREAM, event("running"), None, Reply(404))


def test_a_server_that_is_gone() -> None:
    with pytest.raises(errors.Unreachable, match="nobody there"):
        followed(Lost("nobody there", again=True), Lost("nobody there", again=True))


def test_failed_and_cancelled() -> None:
    problem = {"type": "urn:unetpp:too-large", "title": "T", "status": 413, "detail": "it has too many voxels"}
    with pytest.raises(errors.JobEnded, match="too many voxels") as caught:
        followed(STREAM, event("failed", error=problem))
    assert (caught.value.status, caught.value.type) == (413, "urn:unetpp:too-large")
    with pytest.raises(errors.JobEnded, match="cancelled"):
        followed(STREAM, event("cancelled"))


def test_the_time_is_over() -> None:
    with pytest.raises(errors.TimedOut, match="it goes on"):
        followed(STREAM, asked("running"), timeout_s=0)


def test_what_the_progress_raises_gets_out() -> None:
    def raising(_: Any) -> None:
        raise KeyError("mine")

    talk = wait("x", Retries(), raising, None)
    assert isinstance(next(talk), Open)
    assert isinstance(talk.send(STREAM), Next)
    with pytest.raises(KeyError, match="mine"):
        talk.send(event("running"))


@pytest.mark.parametrize("at", range(4))
def test_it_can_be_ended_anywhere(at: int) -> None:
    """As by Ctrl-C."""
    talk = wait("x", Retries(), lambda _: None, None)
    came: list[Any] = [None, STREAM, None, None, asked("running")]
    for one in came[: at + 1]:
        command = talk.send(one)
    talk.close()
    assert isinstance(command, Open | Next | Close | Send)


@given(st.lists(st.dictionaries(st.text(), st.text(), max_size=2), max_size=5), st.data())
def test_events_however_they_are_cut(sent: list[dict[str, str]], data: st.DataObject) -> None:
    # With characters at which Python, but no server, ends lines.
    stream = "".join(f"id: 1\r\ndata: {json.dumps(one, ensure_ascii=False)}\n\n" for one in sent)
    whole = (": comment\n" + stream).encode("utf-8", "replace")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    events = Events()
    found = [one for piece in pieces for one in events.feed(piece)]
    at_once = list(Events().feed(whole))
    assert found == at_once
    assert len(found) == len(sent)
