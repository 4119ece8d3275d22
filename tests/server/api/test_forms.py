"""Forms as clients of every language write them."""

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.server.api.conftest import MAX_BODY_MB, InProcess
from tests.support.files import GOOD, mask_of

Checked = Callable[..., Any]


def form(*parts: tuple[str, bytes]) -> bytes:
    """Parts of header lines and content, with the boundary B."""
    pieces = (b"--B\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n" for head, content in parts)
    return b"".join(pieces) + b"--B--\r\n"


def post(client: httpx.Client, body: bytes, route: str = "/segment?format=coco") -> httpx.Response:
    return client.post(route, content=body, headers={"content-type": "multipart/form-data; boundary=B"})


def named(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["images"][0]["file_name"])


DISPOSITION = "Content-Disposition: form-data; name="
PNG = "\r\nContent-Type: image/png"

# Headers of a part, and the name that the file has.
WRITTEN = {
    "curl": (f'{DISPOSITION}"file"; filename="a.png"{PNG}', "a.png"),
    "curl, a quote in the name": (f'{DISPOSITION}"file"; filename="a\\"b.png"{PNG}', 'a"b.png'),
    "browser, a quote in the name": (f'{DISPOSITION}"file"; filename="a%22b.png"{PNG}', 'a"b.png'),
    "browser, UTF-8": (f'{DISPOSITION}"file"; filename="äö 日本.png"{PNG}', "äö 日本.png"),
    "browser, a blob": (f'{DISPOSITION}"file"; filename="blob"{PNG}', "blob"),
    "requests before 2.x: filename*": (
        f"{DISPOSITION}\"file\"; filename*=utf-8''%C3%A4%20b.png{PNG}",
        "ä b.png",
    ),
    ".NET": (f"{DISPOSITION}file; filename=a.png; filename*=utf-8''a.png", "a.png"),
    ".NET, UTF-8": (
        f"{DISPOSITION}file; filename=\"=?utf-8?B?w6Qg5pel5pysLnBuZw==?=\"; filename*=utf-8''%C3%A4%20%E6%97%A5%E6%9C%AC.png",
        "ä 日本.png",
    ),
    ".NET, words alone": (f'{DISPOSITION}file; filename="=?utf-8?B?w6QucG5n?="', "ä.png"),
    ".NET, neither name nor type": (f"{DISPOSITION}file", "image"),
    "no filename": (f'{DISPOSITION}"file"{PNG}', "image"),
    "no filename, any bytes": (f'{DISPOSITION}"file"\r\nContent-Type: application/octet-stream', "image"),
    "type before disposition": (f'Content-Type: image/png\r\n{DISPOSITION}"file"', "image"),
    "empty filename": (f'{DISPOSITION}"file"; filename=""{PNG}', "image"),
    "Latin-1": (f"{DISPOSITION}\"file\"; filename*=iso-8859-1'en'%E4.png{PNG}", "ä.png"),
    "filename* first": (
        f"{DISPOSITION}\"file\"; filename*=UTF-8''%e4%bd%a0.png; filename=ni.png{PNG}",
        "你.png",
    ),
    "an unknown charset": (
        f'{DISPOSITION}"file"; filename*=klingon\'\'%E4.png; filename="b.png"{PNG}',
        "b.png",
    ),
    "bytes that are not the charset's": (
        f'{DISPOSITION}"file"; filename*=utf-8\'\'%E4.png; filename="b.png"{PNG}',
        "b.png",
    ),
    "no words": (f'{DISPOSITION}"file"; filename="=?x?="{PNG}', "=?x?="),
    "upper case": (
        'CONTENT-DISPOSITION: FORM-DATA; name="file"; filename="a.png"\r\nCONTENT-TYPE: IMAGE/PNG',
        "a.png",
    ),
    "folders of Windows": (f'{DISPOSITION}"file"; filename="C:\\data\\a.png"{PNG}', "a.png"),
    "folders": (f"{DISPOSITION}\"file\"; filename*=utf-8''..%2F..%2Fa.png{PNG}", "a.png"),
    "Apache HttpClient": (
        f'{DISPOSITION}"file"; filename="a.png"{PNG}\r\nContent-Transfer-Encoding: binary',
        "a.png",
    ),
    "charset of the type": (f'{DISPOSITION}"file"; filename="a.png"{PNG}; charset=UTF-8', "a.png"),
}


@pytest.mark.parametrize(("head", "name"), WRITTEN.values(), ids=WRITTEN)
def test_part_is_the_file_and_keeps_its_name(small: httpx.Client, head: str, name: str) -> None:
    assert named(post(small, form((head, GOOD)))) == name


@pytest.mark.parametrize(
    "head",
    [f"{DISPOSITION}reference{PNG}", f"{DISPOSITION}reference", f'{DISPOSITION}"reference"; filename="r"'],
)
def test_reference_needs_no_filename(small: httpx.Client, head: str) -> None:
    plain = mask_of(small.post("/segment", content=GOOD).content)
    body = form((f"{DISPOSITION}file{PNG}", GOOD), (head, GOOD))
    answer = post(small, body, "/segment")
    assert "x-segment-iou" in answer.headers
    assert (mask_of(answer.content) == plain).all()


@pytest.mark.parametrize("head", [f"{DISPOSITION}file{PNG}", f"{DISPOSITION}file"])
def test_file_without_a_filename_may_be_as_large_as_a_body(small: httpx.Client, head: str) -> None:
    tail = bytes(MAX_BODY_MB * 1024 * 1024 - 2000 - len(GOOD))
    assert post(small, form((head, GOOD + tail)), "/segment").status_code == 200


@pytest.mark.parametrize(
    ("head", "content"),
    [
        (f'{DISPOSITION}"file"', b"image.png"),
        (f'{DISPOSITION}"file"\r\nContent-Type: text/plain', GOOD),
        (f'{DISPOSITION}"file"\r\nContent-Type: text/plain; charset=utf-8', b"@image.png"),
        (f'{DISPOSITION}"file"', b""),
    ],
)
def test_text_is_no_file(small: httpx.Client, problem: Checked, head: str, content: bytes) -> None:
    refused = problem(post(small, form((head, content))), 422, "invalid-parameter")
    assert refused.parameter == "file"


@pytest.mark.parametrize("encoding", ["base64", "quoted-printable", "BASE64", "x-gzip"])
def test_part_in_another_encoding_is_named(small: httpx.Client, problem: Checked, encoding: str) -> None:
    head = f"{DISPOSITION}file; filename=a.png{PNG}\r\nContent-Transfer-Encoding: {encoding}"
    refused = problem(post(small, form((head, base64.b64encode(GOOD)))), 415, "unsupported-type")
    assert (refused.parameter, refused.value) == ("Content-Transfer-Encoding", encoding.lower())
    assert "binary" in refused.allowed


MANY = "\r\n".join(f"X-{k}: a" for k in range(8))
LIMITS = {
    "files": (form(*[(f"{DISPOSITION}reference{PNG}", GOOD)] * 3), 2, "files"),
    "fields": (form(*[(f'{DISPOSITION}"mode"', b"fast")] * 3), 2, "text fields"),
    "headers": (form((f"{DISPOSITION}file{PNG}\r\n{MANY}", GOOD)), 8, "headers"),
    "header": (form((f'{DISPOSITION}file; filename="{"x" * 5000}"', GOOD)), 4224, "bytes in a header"),
}


@pytest.mark.parametrize(("body", "limit", "unit"), LIMITS.values(), ids=LIMITS)
def test_form_over_a_limit_says_which(
    small: httpx.Client, problem: Checked, body: bytes, limit: int, unit: str
) -> None:
    refused = problem(post(small, body), 422, "unreadable")
    assert (refused.limit, refused.unit) == (limit, unit)
    assert f"{limit:,} {unit}" in refused.detail


async def test_long_text_says_that_it_is_text(in_process: InProcess, problem: Checked) -> None:
    body = form((f'{DISPOSITION}"picture"', GOOD + bytes(1024 * 1024)))
    async with in_process(limits={"max_body_mb": 3}) as client:
        headers = {"content-type": "multipart/form-data; boundary=B"}
        answer = await client.post("/segment", content=body, headers=headers)
    refused = problem(answer, 422, "unreadable")
    assert (refused.limit, refused.unit) == (1024 * 1024, "bytes")
    assert "picture" in refused.detail


def test_job_keeps_the_name_of_the_form(small: httpx.Client) -> None:
    head = f"{DISPOSITION}file; filename=a.png; filename*=utf-8''%C3%A4.png"
    place = post(small, form((head, GOOD)), "/jobs?format=coco").headers["location"]
    with small.stream("GET", f"{place}/events") as events:
        events.read()
    assert json.loads(small.get(f"{place}/result").content)["images"][0]["file_name"] == "ä.png"
