import http.client
import json
import socket

import httpx
import numpy as np

from tests.support.files import picture_bytes
from tests.support.server import serving
from tests.support.service import fake_app

GOOD = picture_bytes(np.arange(256, dtype=np.uint8).reshape(16, 16))


def test_an_upload_that_stalls_gets_408_and_frees_its_place() -> None:
    with serving(fake_app(limits={"idle_upload_s": 0.2}, http={"max_in_flight": 1})) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as raw:
            raw.sendall(b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
            answer = http.client.HTTPResponse(raw)
            answer.begin()
            body = answer.read()
        assert answer.status == 408
        assert "sent nothing for 0.2 seconds" in json.loads(body)["detail"]
        assert client.post("/segment", content=GOOD).status_code == 200


def test_a_slow_upload_that_goes_on_is_patiently_read() -> None:
    import time

    def drops() -> "object":
        for index in range(0, len(GOOD), 20):
            time.sleep(0.02)
            yield GOOD[index : index + 20]

    with serving(fake_app(limits={"idle_upload_s": 5})) as client:
        assert client.post("/segment", content=drops()).status_code == 200


def test_waiting_for_an_answer_is_no_stall() -> None:
    import time

    def slow(tiles: object) -> np.ndarray:
        time.sleep(0.6)
        return np.zeros((len(tiles), 1, *tiles.pixels.shape[2:]), dtype=np.float32)

    with serving(fake_app(slow, limits={"idle_upload_s": 0.2})) as client:
        response: httpx.Response = client.post("/segment", content=GOOD)
        assert response.status_code == 200
