"""What can be asked of a server, as conversations."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from numpy.typing import ArrayLike

from client.documents import JobDocument, ModelCard, ModelSummary
from client.result import Result, query, read_result
from client.retry import Retries
from client.sources import Source, upload
from client.talk import Call, Talk, ask

Formats = tuple[str, ...] | str


def models(retries: Retries) -> Talk[list[ModelSummary]]:
    """The open bundles."""
    return cast("list[ModelSummary]", (yield from ask(Call("GET", "models"), retries)).document())


def model(name: str, retries: Retries) -> Talk[ModelCard]:
    """One of them."""
    return cast("ModelCard", (yield from ask(Call("GET", f"models/{quote(name, safe='')}"), retries)).document())


def segment(
    source: Source,
    formats: Formats,
    reference: Source | None,
    affine: ArrayLike | None,
    parameters: Mapping[str, Any],
    retries: Retries,
) -> Talk[Result]:
    """An answer at once."""
    return read_result((yield from ask(_posted("segment", source, formats, reference, affine, parameters), retries)))


def submit(
    source: Source,
    formats: Formats,
    reference: Source | None,
    affine: ArrayLike | None,
    parameters: Mapping[str, Any],
    retries: Retries,
) -> Talk[JobDocument]:
    """A job."""
    return cast(
        "JobDocument", (yield from ask(_posted("jobs", source, formats, reference, affine, parameters), retries)).document()
    )


def _posted(
    path: str, source: Source, formats: Formats, reference: Source | None, affine: ArrayLike | None, parameters: Mapping[str, Any]
) -> Call:
    given = {"file": source} if reference is None else {"file": source, "reference": reference}
    # A reference may be a file although the input is an array, and the other way round.
    uploads = {name: upload(one, affine if hasattr(one, "dtype") else None) for name, one in given.items()}
    asked = query(formats, parameters)
    # What a file is called at home stays there, except for COCO, whose readers look for images by name.
    if isinstance(source, str | os.PathLike) and "coco" in asked.get("format", "").split(","):
        name = os.fsencode(Path(source).name).decode("utf-8", "backslashreplace")
        uploads["file"] = dataclasses.replace(uploads["file"], name=name)
    return Call("POST", path, asked, uploads)


def fetch(job_id: str, what: str, retries: Retries) -> Talk[Result]:
    """The result of a job, or its preview."""
    return read_result((yield from ask(Call("GET", f"jobs/{job_id}/{what}"), retries)))


def save(job_id: str, what: str, path: Path, retries: Retries) -> Talk[Path]:
    """The same into a file, which is there only once it is whole."""
    yield from ask(Call("GET", f"jobs/{job_id}/{what}", save_as=path), retries)
    return path


def cancel(job_id: str, retries: Retries) -> Talk[None]:
    """Cancels a job, or removes a finished one."""
    yield from ask(Call("DELETE", f"jobs/{job_id}"), retries)
