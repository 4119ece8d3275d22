"""Requests of MONAI Label's clients, and how MITK reads the answers."""

import json
import re
from typing import Any

import httpx

from tests.support.files import GOOD

MODEL = "/infer/fake-L2"


def start(client: httpx.Client, image: bytes = GOOD) -> str:
    """A session as `requests` starts it for MONAI Label's client."""
    answer = client.put(
        "/session/", data={"client_id": "user-xyz"}, files={"files": ("tmpa1b2.nii.gz", image)}
    )
    return str(answer.raise_for_status().json()["session_id"])


def put(
    client: httpx.Client, name: str, image: bytes = GOOD, client_id: str = "user-xyz", **headers: str
) -> None:
    """An upload under a name as Slicer's module does it before each run."""
    answer = client.put(
        "/datastore/",
        params={"image": name},
        data={"params": json.dumps({"client_id": client_id})},
        files={"file": ("C:/Temp/tmpa1b2.nii.gz", image)},
        headers=headers,
    )
    assert answer.raise_for_status().json() == {"image": name}


def form(**params: Any) -> dict[str, Any]:
    return {"data": {"params": json.dumps({"client_id": "user-xyz"} | params)}}


def parts(answer: httpx.Response) -> tuple[dict[str, Any], bytes, str]:
    """Params, image and file name of a multipart answer, by the way in which MITK reads it."""
    assert answer.status_code == 200, answer.text
    content_type = answer.headers["content-type"]
    boundary = "--" + content_type[content_type.index("boundary=") + len("boundary=") :]
    first, second, end = [part for part in answer.content.split(boundary.encode()) if part]
    assert end == b"--\r\n"
    params = first.partition(b"Content-Type: application/json")[2]
    head, found, image = second.partition(b"Content-Type: application/octet-stream")
    assert found
    assert image.startswith(b"\r\n\r\n")
    assert image.endswith(b"\r\n")
    name = re.search(rb'name="image"; filename="([\w.-]+)"', head)
    assert name
    return json.loads(params), image[4:-2], name[1].decode()
