"""Limits of the Open Inference Protocol that hold for a request as a whole: time, bytes of the answer, threads and metrics."""

import gzip
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from server.api.open_inference.messages import HEADER, parse_request
from server.api.open_inference.tensors import Tensor
from server.api.routes import open_inference
from server.errors import InvalidInferRequest
from tests.server.api.jobs_support import Gate
from tests.server.api.open_inference_support import MODEL, answer_of, ask, files, image, refused
from tests.server.api.scraping import counted, value
from tests.server.api.sockets import connected, read_response
from tests.support.files import GOOD, picture_bytes
from tests.support.server import serving
from tests.support.service import FixedLatency, fake_app


@pytest.fixture
def shut() -> Iterator[Gate]:
    """An engine that runs nothing until the end of the test."""
    gate = Gate()
    gate.open.clear()
    yield gate
    gate.open.set()


def dark(*size: int) -> bytes:
    return picture_bytes(np.zeros(size, np.uint8))


def grey(count: int, side: int) -> Tensor:
    return image(np.zeros((count, side, side, 1), np.uint8))


class TestTimeIsForAllInputs:
    def test_idle_server_takes_what_fits_in_its_time(self) -> None:
        """One by one, the last would be refused because the others wait before it."""
        app = fake_app(latency=FixedLatency(1.0), limits={"max_wait_s": 20})
        with serving(app) as client:
            _, outputs = answer_of(ask(client, MODEL, files(*[GOOD] * 16)))
            assert outputs["mask"].shape == (16, 16, 16)
            answer_of(ask(client, MODEL, grey(16, 16), parameters={"fill_holes": True}))

    def test_more_than_the_time_is_refused_before_any_work(self, shut: Gate) -> None:
        app = fake_app(shut, latency=FixedLatency(1.0), limits={"max_wait_s": 20})
        with serving(app) as client:
            assert "fewer inputs" in refused(ask(client, MODEL, files(*[GOOD] * 21)), 413)
            deadline = {"deadline_ms": 15_000}
            assert "deadline" in refused(ask(client, MODEL, files(*[GOOD] * 18), parameters=deadline), 422)

    def test_all_inputs_together_end_with_the_time(self, shut: Gate) -> None:
        with serving(fake_app(shut, limits={"max_wait_s": 0.3})) as client:
            text = refused(ask(client, MODEL, files(GOOD, GOOD)), 413)
            shut.open.set()
        assert "2 inputs, 0 of which" in text

    def test_level_in_time_is_that_of_the_sum(self) -> None:
        """Two inputs at level 4 are in time, eight are at level 2 alone."""
        latency = FixedLatency({"L1": 0.1, "L2": 0.2, "L3": 1.0, "L4": 1.0, "accurate": 1.0})
        parameters = {"min_level": 1, "level": 4, "deadline_ms": 5000}
        with serving(fake_app(latency=latency)) as client:
            for count, level in ((2, 4), (8, 2)):
                head, _ = answer_of(ask(client, MODEL, files(*[GOOD] * count), parameters=parameters))
                assert head["parameters"]["level"] == level
                assert head["parameters"].get("degraded") == (None if level == 4 else "deadline")
            assert sum(counted(client, "degraded", "reason").values()) == 8


def test_tiles_in_one_piece_are_counted_one_by_one() -> None:
    latency = FixedLatency({"L1": 0.1, "L2": 0.1, "L3": 9.0, "L4": 9.0, "accurate": 9.0})
    with serving(fake_app(latency=latency)) as client:
        parameters = {"min_level": 1, "level": 4, "deadline_ms": 5000}
        head, _ = answer_of(ask(client, MODEL, grey(5, 16), parameters=parameters))
        assert head["parameters"]["level"] == 2
        assert counted(client, "degraded", "reason") == {"deadline": 5}
        assert sum(counted(client, "level_deficit", "model").values()) == 10


def test_sizes_are_compared_before_any_work(shut: Gate) -> None:
    with serving(fake_app(shut)) as client:
        assert "different sizes" in refused(ask(client, MODEL, files(*[GOOD] * 20, dark(8, 9))), 422)
        refused(ask(client, MODEL, files(GOOD, b"nonsense")), 415)


def test_bytes_of_the_answer_are_limited_before_any_work(shut: Gate) -> None:
    """The masks of all inputs lie in memory until the last is there, so that they are counted by the headers."""
    with serving(fake_app(shut, limits={"max_body_mb": 1})) as client:
        for tensor, others in (
            (grey(100, 64), {}),
            (
                grey(200, 64),
                {"outputs": [{"name": "mask"}], "binary": True, "parameters": {"instances": True}},
            ),
            (grey(100, 64), {"outputs": [{"name": "mask", "parameters": {"binary_data": False}}]}),
            (files(*[dark(300, 300)] * 20), {"outputs": [{"name": "mask"}]}),
        ):
            text = refused(ask(client, MODEL, tensor, **others), 413)
            assert "1 MiB" in text
            assert "fewer inputs" in text
            assert "UNETPP_LIMITS__MAX_BODY_MB" in text
        shut.open.set()
        answer_of(ask(client, MODEL, grey(100, 64), outputs=[{"name": "mask"}]))


def test_elements_are_counted_before_they_are_read() -> None:
    row = {
        "name": "bytes",
        "datatype": "BYTES",
        "shape": [300_000],
        "parameters": {"binary_data_size": 1_200_000},
    }
    head = json.dumps({"inputs": [row]}).encode()
    # Broken after the first: nobody looks that far.
    with pytest.raises(InvalidInferRequest) as raised:
        parse_request(memoryview(head + bytes(1_199_999) + b"\1"), len(head), 1000)
    assert raised.value.fields["limit"] == 1000


def test_large_bodies_are_read_and_written_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, list[str]] = {"parse_request": [], "read_inputs": [], "pack": []}

    def noted(name: str) -> Any:
        call = getattr(open_inference, name)

        def note(*arguments: Any) -> Any:
            threads[name].append(threading.current_thread().name)
            return call(*arguments)

        return note

    for name in threads:
        monkeypatch.setattr(open_inference, name, noted(name))
    with serving(fake_app()) as client:
        ask(client, MODEL, grey(1, 16)).raise_for_status()
        ask(client, MODEL, grey(600, 64)).raise_for_status()
    for name, (small, large) in threads.items():
        assert not small.startswith("worker"), name
        assert large.startswith("worker"), name


def post(client: httpx.Client, **members: Any) -> httpx.Response:
    row = {"name": "image", "datatype": "UINT8", "shape": [1, 16, 16, 1], "data": [*range(256)]}
    return client.post(MODEL, content=json.dumps({"inputs": [row], **members}))


@pytest.mark.parametrize("name", ["timeout", "deadline_ms"])
@pytest.mark.parametrize("number", [10**400, 10**310, -(10**400), 1e308])
def test_absurd_times_are_refused(small: httpx.Client, name: str, number: float) -> None:
    assert name in refused(post(small, parameters={name: number}), 422)


def test_absurd_shapes_are_refused(small: httpx.Client) -> None:
    for shape in ([0, 2**62, 2**62], [2**62, 0], [1, 2**62, 2**62, 0]):
        row = {"name": "image", "datatype": "UINT8", "shape": shape, "data": []}
        refused(small.post(MODEL, content=json.dumps({"inputs": [row]})), 400)


def test_null_members_count_as_absent(small: httpx.Client) -> None:
    head, _ = answer_of(post(small, id=None, outputs=None, parameters=None))
    assert "id" not in head
    answer_of(post(small, parameters={"timeout": None, "level": None}))
    row = {
        "name": "image",
        "datatype": "UINT8",
        "shape": [1, 16, 16, 1],
        "data": None,
        "parameters": {"binary_data_size": 256},
    }
    written = json.dumps({"inputs": [row]}).encode()
    answer_of(small.post(MODEL, content=written + bytes(256), headers={HEADER: f"{len(written)}"}))


class TestDeadlineHoldsForTheUpload:
    def test_header(self, small: httpx.Client) -> None:
        """The body stops after its first bytes; without the deadline the server would wait for half a minute."""
        port = small.base_url.port
        assert port
        with connected(port) as raw:
            head = f"POST {MODEL} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nX-Deadline-Ms: 100\r\n\r\n"
            raw.sendall(head.encode() + b"abc")
            assert read_response(raw).status == 504

    def test_parameter(self, small: httpx.Client) -> None:
        row = {"name": "image", "datatype": "UINT8", "shape": [1, 16, 16, 1], "data": [*range(256)]}
        written = json.dumps({"inputs": [row], "parameters": {"deadline_ms": 150}}).encode()

        def pieces() -> Iterator[bytes]:
            yield written[:10]
            threading.Event().wait(0.3)
            yield written[10:]

        refused(small.post(MODEL, content=pieces()), 504)


def test_unknown_model_is_a_request() -> None:
    with serving(fake_app()) as client:
        refused(ask(client, "/v2/models/none/infer", files(GOOD)), 404)
        assert counted(client, "requests", "outcome") == {"client_error": 1}
        assert value(client, "requests_in_flight") == 0


def test_gzip_of_several_members(small: httpx.Client) -> None:
    """As several files of gzip one after the other, which is one file of gzip."""
    packed = b"".join(gzip.compress(GOOD[at : at + 20]) for at in range(0, len(GOOD), 20))
    headers = {HEADER: "0", "Content-Encoding": "gzip"}
    assert answer_of(small.post(MODEL, content=packed, headers=headers))[1]["mask"].sum() == 128
    for broken in (packed[:-1], packed + b"x", packed + packed[:15]):
        refused(small.post(MODEL, content=broken, headers=headers), 422)
    # More members than a body needs.
    refused(small.post(MODEL, content=gzip.compress(b"") * 10_001, headers=headers), 422)
