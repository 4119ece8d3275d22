"""Requests of the Open Inference Protocol, written by hand."""

import json
from typing import Any

import httpx
import numpy as np

from server.api.open_inference.messages import HEADER, pack
from server.api.open_inference.tensors import Tensor

MODEL = "/v2/models/fake/infer"


def image(values: np.ndarray, name: str = "image") -> Tensor:
    return Tensor.of(name, values)


def files(*encoded: bytes) -> Tensor:
    return Tensor("bytes", "BYTES", (len(encoded), 1), encoded)


def ask(
    client: httpx.Client, url: str, *tensors: Tensor, binary: bool = True, **members: Any
) -> httpx.Response:
    """Sends tensors; all outputs come as the inputs do, unless `members` say otherwise."""
    parameters = {"binary_data_output": binary} | members.pop("parameters", {})
    parts, length = pack({"parameters": parameters, **members}, "inputs", [(one, binary) for one in tensors])
    headers = {} if length is None else {HEADER: f"{length}"}
    return client.post(url, content=b"".join(parts), headers=headers)


def answer_of(response: httpx.Response) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The JSON of an answer, and its outputs as arrays; read without our own parser."""
    assert response.status_code == 200, response.text
    length = response.headers.get(HEADER.lower())
    body = response.content
    head = json.loads(body if length is None else body[: int(length)])
    at, outputs = int(length or 0), {}
    for row in head["outputs"]:
        dtype = {"UINT8": "u1", "UINT16": "<u2", "FP16": "<f2", "FP32": "<f4"}[row["datatype"]]
        if "data" in row:
            values = np.array(row["data"], dtype)
        else:
            size = row["parameters"]["binary_data_size"]
            values, at = np.frombuffer(body[at : at + size], dtype), at + size
        outputs[row["name"]] = values.reshape(row["shape"])
    if length is not None:
        assert at == len(body)
    return head, outputs


def refused(response: httpx.Response, status: int) -> str:
    """The text of an error in the protocol's own form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (name, text), *others = response.json().items()
    assert name == "error"
    assert not others
    return str(text)
