"""The parser of one connection, fed with bytes directly."""

from collections.abc import Iterator

import h11
import pytest

from server.api.bounded_parser import FREE_CHUNKS, MAX_CHUNKS_AFTER_RESPONSE, TURN_EVENTS, BoundedParser

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def in_chunks(body: bytes, size: int) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


def count_until_refused(parser: BoundedParser) -> int:
    """The number of events before the parser refuses the body."""
    count = 0
    try:
        for _ in events(parser):
            count += 1
    except h11.RemoteProtocolError:
        return count
    raise AssertionError("the body was read")


def events(parser: BoundedParser) -> Iterator[object]:
    """All events of what was received, over as many turns as they take."""
    while (event := parser.next_event()) is not h11.NEED_DATA or parser.held:
        if parser.held:
            parser.new_turn()
        else:
            yield event


def test_turn_ends_after_its_events() -> None:
    parser = BoundedParser(lambda: None)
    parser.receive_data(HEAD + in_chunks(bytes(900), 1))
    turns = [0]
    while (event := parser.next_event()) is not h11.NEED_DATA or parser.held:
        if parser.held:
            parser.new_turn()
            turns.append(0)
        elif event is not h11.NEED_DATA:
            turns[-1] += 1
    assert sum(turns) == 901
    assert max(turns) == TURN_EVENTS


@pytest.mark.parametrize("size", [1, 10, 48])
def test_body_of_tiny_chunks_is_refused(size: int) -> None:
    parser = BoundedParser(lambda: None)
    parser.receive_data(HEAD + in_chunks(bytes(size * 10_000), size))
    assert count_until_refused(parser) <= FREE_CHUNKS * 64 / (64 - size) + 1
    assert parser.tiny_chunks


@pytest.mark.parametrize(("size", "count"), [(1, FREE_CHUNKS), (64, 5000), (65_536, 100)])
def test_body_of_larger_chunks_is_read(size: int, count: int) -> None:
    parser = BoundedParser(lambda: None)
    parser.receive_data(HEAD + in_chunks(bytes(size * count), size) + b"0\r\n\r\n")
    found = list(events_until_end(parser))
    assert sum(len(event.data) for event in found if isinstance(event, h11.Data)) == size * count


def events_until_end(parser: BoundedParser) -> Iterator[object]:
    for event in events(parser):
        yield event
        if isinstance(event, h11.EndOfMessage):
            return


def test_body_after_its_response_is_read_for_a_while_only() -> None:
    parser = BoundedParser(lambda: None)
    parser.receive_data(HEAD)
    assert isinstance(parser.next_event(), h11.Request)
    for event in (h11.Response(status_code=404, headers=[("content-length", "0")]), h11.EndOfMessage()):
        parser.send(event)
    parser.receive_data(in_chunks(bytes(100_000 * 100), 100))
    assert count_until_refused(parser) <= MAX_CHUNKS_AFTER_RESPONSE + 1


def test_bytes_of_responses_are_counted() -> None:
    sent: list[int] = []
    parser = BoundedParser(lambda: sent.append(parser.written))
    parser.receive_data(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    parser.next_event()
    head = parser.send(h11.Response(status_code=200, headers=[("content-length", "3")]))
    body = parser.send(h11.Data(data=b"abc"))
    assert sent == [len(head or b""), len(head or b"") + len(body or b"")]
