"""The wording of the most visible errors, once: other tests assert codes and fields.

After a change of wording: python -m tests.server.test_error_wording, then read the difference of
error_wording.txt.
"""

import contextlib
import io
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from server import errors, listening
from server.api.auth import Keys, make
from server.errors import UnetppError
from server.jobs.store_sqlite import SQLiteStore
from server.runtime.bundle import read_bundle
from server.runtime.deployment import find_bundles
from server.runtime.machine import read_machine
from server.service import open_service
from server.settings import JobsSettings, Settings
from tests.support.bundles import rewrite_hashes
from tests.support.files import SMALL, nifti_bytes, picture_bytes
from tests.support.server import serving
from tests.support.service import fake_app, fake_deployment

SNAPSHOT = Path(__file__).with_name("error_wording.txt")
SHIPPED = Path(__file__).parents[2] / "bundles" / "nuclei"

LARGE = picture_bytes(np.zeros((20, 30), np.uint8))
VOLUME = nifti_bytes(np.zeros((8, 8, 8), np.uint8))


def zip_of(**files: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        for name, data in files.items():
            made.writestr(name, data)
    return out.getvalue()


# Query, body and headers of POST /segment.
REQUESTS: list[tuple[str, bytes, dict[str, str]]] = [
    *(
        (query, SMALL, {})
        for query in (
            "model=x",
            "mode=x",
            "level=0",
            "level=5",
            "mode=accurate&level=2",
            "mode=auto",
            "mode=auto&level=2",
            "mode=fast&max_loss=1",
            "precision=int8",
            "format=jpg",
            "format=mask.nii.gz",
            "format=uncertainty",
            "threshold=2",
            "level=2&min_level=4",
            "color=1",
            "pixel_size_um=0,5",
            "axis=1",
            "deadline_ms=0",
            "min_size_px=4&min_size_mm2=1",
            "min_size_mm2=1",
            "min_size_mm3=1",
        )
    ),
    ("", b"", {}),
    ("", b"text", {}),
    ("", SMALL[:50], {}),
    ("", LARGE, {}),
    ("", b"x" * 2_000_000, {}),
    ("", zip_of(), {}),
    ("", VOLUME, {}),
    ("", VOLUME[:40], {}),
    ("", SMALL, {"Accept": "audio/ogg"}),
    ("", SMALL, {"X-Deadline-Ms": "soon"}),
    ("", SMALL, {"Sec-Fetch-Site": "cross-site"}),
    ("", SMALL, {"X": "x" * 17_000}),
]


def problem(answer: httpx.Response) -> dict[str, Any]:
    """The problem document, or a note that there is none."""
    is_problem = answer.headers["content-type"] == "application/problem+json"
    return answer.json() if is_problem else {"code": "no error", "detail": f"{answer.status_code}"}


def http_lines() -> Iterator[str]:
    """Problem documents of POST /segment and some other paths."""
    limits = {"max_body_mb": 1, "max_pixels": 500, "max_voxels": 500}
    with serving(fake_app(limits=limits)) as client:
        for query, body, headers in REQUESTS:
            answer = problem(client.post(f"/segment?{query}", content=body, headers=headers))
            sent = f"{len(body)} bytes" if body != SMALL else ""
            described = " ".join(
                filter(None, [query, sent, *(f"{name}: {text:.10}" for name, text in headers.items())])
            )
            yield f"POST /segment {described}\n    {answer['code']}: {answer['detail']}"
        for method, path in (
            ("GET", "/nowhere"),
            ("GET", "/segment"),
            ("GET", "/jobs/x"),
            ("POST", "/jobs?deadline_ms=5"),
        ):
            answer = problem(client.request(method, path))
            yield f"{method} {path}\n    {answer['code']}: {answer['detail']}"
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        keys.write_text(make("lab")[1])
        with serving(fake_app(auth={"keys_file": keys})) as client:
            for headers in ({}, {"X-API-Key": "wrong"}):
                answer = problem(client.get("/models", headers=headers))
                yield f"GET /models {' '.join(headers)}\n    {answer['code']}: {answer['detail']}"


def start_cases(folder: Path) -> dict[str, Callable[[], Any]]:
    """Calls that fail as `unetpp serve` would."""

    def bound(**http: Any) -> None:
        with listening.bound(Settings(http=http)):  # type: ignore[arg-type]
            pass

    def store_twice() -> None:
        with contextlib.closing(SQLiteStore(JobsSettings(folder=folder))):
            SQLiteStore(JobsSettings(folder=folder))

    def damaged(name: str, *, forged: bool = False) -> None:
        copy = folder / "damaged"
        copy.mkdir()
        for file in SHIPPED.iterdir():
            if file.is_file():
                (copy / file.name).write_bytes(file.read_bytes())
        (copy / name).write_bytes((copy / name).read_bytes()[:-1])
        if forged:
            rewrite_hashes(copy)
        read_bundle(copy)

    return {
        "serve on all addresses": lambda: bound(host="0.0.0.0"),  # noqa: S104 - refused
        "serve with one port for both": lambda: bound(port=9, ops_port=9),
        "serve with a certificate alone": lambda: bound(tls_cert=folder / "cert.pem"),
        "serve with a certificate that is missing": lambda: bound(
            tls_cert=folder / "cert.pem", tls_key=folder / "key.pem"
        ),
        "serve with keys that are missing": lambda: Keys(folder / "keys"),
        "serve with another default": lambda: open_service(
            Settings(default_model="x"), {"fake": fake_deployment()}
        ),
        "serve on a jobs folder in use": store_twice,
        "serve without bundles": lambda: list(find_bundles(folder / "none")),
        "serve with a damaged graph": lambda: damaged("L1.onnx"),
        "serve with CUDA on OpenVINO": lambda: read_machine("openvino", "cuda"),
        "key with a space": lambda: make("lab 3"),
    }


def start_lines() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as root:
        for number, name in enumerate(start_cases(Path(root))):
            folder = Path(root) / f"{number}"
            folder.mkdir()
            try:
                start_cases(folder)[name]()
            except UnetppError as error:
                text = str(error).replace(str(folder), "FOLDER")
                yield f"{name}\n    {error.code}: {re.sub(r'[0-9a-f]{12,}', 'HASH', text)}"
            else:
                yield f"{name}\n    no error"


def wording() -> str:
    text = "\n".join([*http_lines(), *start_lines()]) + "\n"
    # The client's own headers are not ours.
    return re.sub(r"has [\d,]+ bytes and \d+ headers", "has N bytes and M headers", text)


def test_errors_are_worded_as_in_the_snapshot() -> None:
    assert wording() == SNAPSHOT.read_text()


def test_tree_in_the_docstring_is_that_of_the_classes() -> None:
    tree = (errors.__doc__ or "").split("\n\n")[1]
    drawn = re.findall(r"\b[A-Z]\w+", tree)
    assert drawn == [error.__name__ for error in errors.all_codes().values()]


if __name__ == "__main__":
    SNAPSHOT.write_text(wording())
