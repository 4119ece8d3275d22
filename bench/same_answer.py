"""Do restarts, replicas and a busy machine give the same bytes? Twenty requests to four starts of the server.

    python -m bench.same_answer

The starts: twice on a quiet machine, once while eight busy loops run on its cores, and two replicas at once
whose requests arrive all together. Prints one row per request, and exits with 1 where a byte differs.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from bench.serving import ROOT, busy_loops, serving
from bench.table import write

SAMPLES = ROOT / "server" / "web" / "samples"
CELLS, VOLUME = SAMPLES / "cells.png", SAMPLES / "hippocampus.nii.gz"
BUSY_LOOPS = 8

REQUESTS: tuple[tuple[Path, str], ...] = (
    *((CELLS, f"mode=fast&level={level}") for level in (1, 2, 3, 4)),
    (CELLS, ""),
    (CELLS, "mode=fast"),
    (CELLS, "precision=fp32"),
    (CELLS, "level=3&precision=fp32"),
    (CELLS, "format=scores.npz"),
    (CELLS, "level=2&format=scores.npz"),
    (CELLS, "format=uncertainty"),
    (CELLS, "format=json&instances=true"),
    (CELLS, "format=mask,csv,geojson"),
    (CELLS, "format=overlay"),
    *((VOLUME, f"model=hippocampus&level={level}") for level in (1, 2, 4)),
    (VOLUME, "model=hippocampus"),
    (VOLUME, "model=hippocampus&format=scores.npz"),
    (VOLUME, "model=hippocampus&format=json&precision=fp32"),
)


def _own(folder: str) -> dict[str, str]:
    """Folders of one server, so that two can run at once and no stored tuning counts."""
    return {"UNETPP_RUNTIME__TUNING_FOLDER": f"{folder}/tuning", "UNETPP_JOBS__FOLDER": f"{folder}/jobs"}


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Starts `unetpp serve` without a stored tuning, and gives its address."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(ROOT / "bundles", _own(folder)) as started,
    ):
        yield str(started.client.base_url).rstrip("/")


def ask(url: str, request: tuple[Path, str]) -> str:
    """SHA-256 of the answer to a request."""
    file, query = request
    answer = httpx.post(f"{url}/segment?{query}", content=file.read_bytes(), timeout=600)
    answer.raise_for_status()
    return hashlib.sha256(answer.content).hexdigest()


def all_in_turn(url: str) -> list[str]:
    """The answers to all requests, one after the other."""
    return [ask(url, request) for request in REQUESTS]


def all_at_once(url: str) -> list[str]:
    """The answers to all requests, sent together, so that they share batches."""
    with ThreadPoolExecutor(len(REQUESTS)) as threads:
        return list(threads.map(lambda request: ask(url, request), REQUESTS))


def main() -> None:
    """Asks, compares, prints."""
    columns: dict[str, list[str]] = {}
    with server() as url:
        columns["start"] = all_in_turn(url)
    with server() as url:
        columns["restart"] = all_in_turn(url)
    with busy_loops(BUSY_LOOPS), server() as url:
        columns[f"{BUSY_LOOPS} busy loops"] = all_in_turn(url)
    with server() as first, server() as second:
        columns["replica, at once"], columns["replica 2, at once"] = all_at_once(first), all_at_once(second)
    rows = []
    for number, (file, query) in enumerate(REQUESTS):
        digests = [column[number] for column in columns.values()]
        rows.append(
            [
                file.name,
                query or "(none)",
                *(digest[:12] for digest in digests),
                "yes" if len(set(digests)) == 1 else "NO",
            ]
        )
    caption = (
        "SHA-256 of the answers to twenty requests, after a start, a restart, a start beside eight busy loops, and from two replicas "
        "to which all requests were sent at once."
    )
    write(
        "same_answer", caption, ["file", "query", *columns, "same"], rows, {"columns": columns, "rows": rows}
    )
    if any(row[-1] != "yes" for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
