"""The headers Accept and Accept-Encoding over HTTP, as other programs send them."""

import httpx
import pytest

from tests.support.files import GOOD

JAVA = "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2"


def answered(client: httpx.Client, *lines: tuple[str, str]) -> httpx.Response:
    """The answer to a request with these headers and no others of their names."""
    request = client.build_request("POST", "/segment", content=GOOD)
    names = {name for name, _ in lines}
    request.headers = httpx.Headers([(k, v) for k, v in request.headers.multi_items() if k not in names])
    request.headers = httpx.Headers([*request.headers.multi_items(), *lines])
    return client.send(request)


def test_java_is_given_the_mask(small: httpx.Client) -> None:
    answer = answered(small, ("accept", JAVA))
    assert answer.headers["content-type"] == "image/png"
    assert 'filename="mask.png"' in answer.headers["content-disposition"]


@pytest.mark.parametrize(
    ("lines", "media_type"),
    [
        (["image/gif", "image/tiff"], "image/tiff"),
        (["image/png;q=.1", "image/tiff;q=.2"], "image/tiff"),
        (["*/*;q=0.1", "image/png;q=0", "text/csv;q=0.5"], "text/csv; charset=utf-8"),
        (["", "text/csv"], "text/csv; charset=utf-8"),
    ],
)
def test_several_lines_are_one_list(small: httpx.Client, lines: list[str], media_type: str) -> None:
    answer = answered(small, *(("accept", line) for line in lines))
    assert answer.headers["content-type"] in (media_type, media_type.partition(";")[0])


def test_job_keeps_several_lines(small: httpx.Client) -> None:
    request = small.build_request("POST", "/jobs", content=GOOD)
    lines = [("accept", "image/gif"), ("accept", "image/tiff;q=.2")]
    request.headers = httpx.Headers(
        [(k, v) for k, v in request.headers.multi_items() if k != "accept"] + lines
    )
    place = small.send(request).headers["location"]
    with small.stream("GET", f"{place}/events") as events:
        events.read()
    assert small.get(f"{place}/result").headers["content-type"] == "image/tiff"


@pytest.mark.parametrize(
    ("lines", "gzipped"),
    [
        (["br", "gzip"], True),
        (["gzip;q=.5"], True),
        (["br", "gzip;q=0"], False),
        (["GZIP ; Q=.5"], True),
        (["*;q=.1", "gzip;q=0"], False),
    ],
)
def test_accept_encoding_in_several_lines(small: httpx.Client, lines: list[str], gzipped: bool) -> None:
    request = small.build_request("GET", "/web/style.css")
    plain = [(k, v) for k, v in request.headers.multi_items() if k != "accept-encoding"]
    request.headers = httpx.Headers([*plain, *(("accept-encoding", line) for line in lines)])
    assert (small.send(request).headers.get("content-encoding") == "gzip") is gzipped
