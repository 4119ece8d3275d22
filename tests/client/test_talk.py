from typing import Any

import httpx
import pytest

from client import errors
from client.replies import Reply, explain, file_name, timings
from client.retry import Retries
from client.talk import Call, Lost, Send, Sleep, ask

CALL = Call("GET", "models")
REFUSED = Lost("refused", again=True)


def asked(*script: Any, retries: Retries | None = None) -> tuple[Any, list[float]]:
    """What comes of a call by a script of answers, and the waits between its tries."""
    talk = ask(CALL, retries or Retries())
    left, waits = iter(script), []
    came: Any = None
    while True:
        try:
            command = talk.throw(came) if isinstance(came, Lost) else talk.send(came)
        except StopIteration as end:
            assert next(left, None) is None
            return end.value, waits
        if isinstance(command, Sleep):
            waits.append(command.seconds)
            came = None
        else:
            assert isinstance(command, Send)
            came = next(left)


@pytest.mark.parametrize("first", [Reply(429), Reply(503), REFUSED])
def test_tried_again(first: Any) -> None:
    reply, waits = asked(first, Reply(200))
    assert reply.status == 200
    assert len(waits) == 1


def test_as_long_as_asked() -> None:
    assert 7 <= asked(Reply(429, {"retry-after": "7"}), Reply(200))[1][0] <= 8
    dates = {"retry-after": "Fri, 20 Nov 2026 12:00:09 GMT", "date": "Fri, 20 Nov 2026 12:00:00 GMT"}
    assert 9 <= asked(Reply(503, dates), Reply(200))[1][0] <= 10


@pytest.mark.parametrize("status", [301, 400, 401, 404, 406, 408, 409, 413, 415, 422, 500, 502, 504, 507])
def test_never_for_the_rest(status: int) -> None:
    with pytest.raises(errors.of_status(status)) as caught:
        asked(Reply(status, {"retry-after": "1"}))
    assert caught.value.status == status


def test_not_after_what_did_not_break() -> None:
    with pytest.raises(errors.Unreachable, match="too slow"):
        asked(Lost("too slow", again=False))


def test_without_end_it_ends_with_the_servers_words() -> None:
    busy = Reply(429, {"retry-after": "0"}, b'{"detail": "64 requests are being worked on"}')
    with pytest.raises(errors.TryAgain, match="64 requests") as caught:
        asked(*[busy] * 4, retries=Retries(most=3))
    assert caught.value.retry_after_s == 0


def test_a_wait_that_is_too_long_is_not_begun() -> None:
    with pytest.raises(errors.TryAgain) as caught:
        asked(Reply(429, {"retry-after": "3600"}), retries=Retries(total_s=60))
    assert caught.value.retry_after_s == 3600


def test_each_try_gets_what_is_left() -> None:
    talk = ask(CALL, Retries(total_s=60))
    assert 59 < next(talk).limit_s <= 60  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("body", "detail"),
    [(b'{"detail": "words"}', "words"), (b"<html>bad gateway", "502 and said no more"), (b"[1]", "502"), (b'{"detail": [1]}', "502"),
     (b"\xff", "502")],
)  # fmt: skip
def test_problems(body: bytes, detail: str) -> None:
    error = explain(Reply(502, {"x-request-id": "r1"}, body))
    assert detail in str(error)
    assert error.request_id == "r1"
    assert type(error) is errors.Failed


def test_another_address() -> None:
    assert "https://elsewhere/" in str(explain(Reply(301, {"location": "https://elsewhere/"})))


@pytest.mark.parametrize(
    ("header", "name"),
    [('inline; filename="mask.nii.gz"', "mask.nii.gz"), ("inline", "mask"), ('x; filename="../../etc"', "mask"), ('x; filename=".."', "mask")],
)  # fmt: skip
def test_file_names(header: str, name: str) -> None:
    assert file_name(httpx.Headers({"content-disposition": header})) == name


def test_timings() -> None:
    assert timings("decode;dur=1.50, infer;dur=20") == {"decode": 1.5, "infer": 20.0}
    assert timings("") == {}
