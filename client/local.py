"""`Local` and `AsyncLocal`: what `Client` and `AsyncClient` do, in this process, without a server."""

import asyncio
import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast
from urllib.parse import urlencode

from numpy.typing import ArrayLike
from pydantic import ValidationError
from starlette.requests import Request

from client import errors
from client.documents import ModelCard, ModelSummary, Progress
from client.replies import Reply
from client.result import Result, query, read_result
from client.sources import Source, Upload, upload
from server.api import params, problems, schemas
from server.api.routes.segment import SegmentParameters, read_deadline
from server.errors import UnetppError, UnknownModel
from server.runtime.bundle import MANIFEST, find_bundles
from server.segment import archive
from server.segment.request import Terms
from server.settings import Settings

T = TypeVar("T")


class AsyncLocal:
    """Open bundles. Belongs to one event loop.

    Args:
        bundles: a bundle, or a folder of bundles; UNETPP_BUNDLES if not given.
        settings: instead of those of the environment.

    Raises:
        SegmentError: a bundle cannot be opened; says which and why.
    """

    def __init__(self, bundles: str | os.PathLike[str] | None = None, settings: Settings | None = None) -> None:
        from server.app import make_segmenter, open_bundles
        from server.metrics import Metrics

        chosen = settings or Settings()
        if bundles is not None:
            chosen = chosen.model_copy(update={"bundles": Path(bundles)})
        with _translated():
            self._segmenter = make_segmenter(chosen, open_bundles(chosen), Metrics())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends what runs."""
        self._segmenter.close()

    async def models(self) -> list[ModelSummary]:
        """What is open."""
        found = [schemas.summary(one, self._segmenter.default) for one in self._segmenter.bundles.values()]
        return [cast("ModelSummary", one.model_dump(mode="json")) for one in found]

    async def model(self, name: str) -> ModelCard:
        """The card of a model."""
        opened = self._segmenter.bundles.get(name)
        with _translated():
            if opened is None:
                raise UnknownModel(f"model={name!r} is not open here; there are: {', '.join(self._segmenter.bundles)}")
        return cast("ModelCard", schemas.card(opened, self._segmenter.default).model_dump(mode="json"))

    async def segment(
        self,
        source: Source,
        *,
        formats: tuple[str, ...] | str = ("mask", "json"),
        reference: Source | None = None,
        affine: ArrayLike | None = None,
        progress: Progress = lambda stage, done, total: None,
        **parameters: Any,
    ) -> Result:
        """See `Client.segment`.

        Args:
            source: the same.
            formats: the same.
            reference: the same.
            affine: the same.
            progress: called with (stage, windows done, windows in all).
            parameters: the same.
        """
        given = [
            upload(source, affine),
            None if reference is None else upload(reference, affine if hasattr(reference, "dtype") else None),
        ]
        name = Path(source).name if isinstance(source, str | os.PathLike) else ""
        return await self._answer(given, query(formats, parameters), progress, name)

    async def _answer(self, given: list[Upload | None], asked: dict[str, Any], progress: Progress, name: str) -> Result:
        with _translated(), contextlib.ExitStack() as files:
            # The very words of a URL, read as the server reads them.
            request = Request({"type": "http", "headers": [], "query_string": urlencode(asked).encode()})
            parameters = SegmentParameters.model_validate(asked)
            wanted = dataclasses.replace(parameters.wanted(request), name=name)
            terms = Terms(deadline=read_deadline(parameters.deadline_ms, request))
            file, known = (files.enter_context(one.open()) if one else None for one in given)
            assert file  # noqa: S101 - the first is always there
            answer = await archive.segment(self._segmenter, file, wanted, known, progress, terms)
        with contextlib.closing(answer):
            headers = {name.lower(): value for name, value in params.headers(answer).items()}
            return read_result(Reply(200, headers, content if isinstance(content := answer.content, bytes) else content.read()))


class Local:
    """The same for ordinary code, e.g. a notebook; may be used from several threads. See `AsyncLocal`."""

    def __init__(self, bundles: str | os.PathLike[str] | None = None, settings: Settings | None = None) -> None:
        self._local = AsyncLocal(bundles, settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="local", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends what runs."""
        self._run(self._local.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def models(self) -> list[ModelSummary]:
        """What is open."""
        return self._run(self._local.models())

    def model(self, name: str) -> ModelCard:
        """The card of a model."""
        return self._run(self._local.model(name))

    def segment(self, source: Source, **asked: Any) -> Result:
        """See `AsyncLocal.segment`."""
        return self._run(self._local.segment(source, **asked))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            # Ctrl-C in whoever waits ends the work, too.
            future.cancel()


def narrowed(settings: Settings, model: str | None) -> Settings:
    """Settings with the one bundle that will be asked, as each takes seconds to open; unchanged where it is not found."""
    for folder in find_bundles(settings.bundles):
        # What is wrong with it is said when it is opened.
        with contextlib.suppress(OSError, ValueError):
            document = json.loads((folder / MANIFEST).read_bytes())
            if isinstance(document, dict) and document.get("name") == (model or settings.default_model):
                return settings.model_copy(update={"bundles": folder} | ({"default_model": model} if model else {}))
    return settings


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """The server's errors as a client has them, but with the words that a server keeps to its log."""
    try:
        yield
    except UnetppError as error:
        status, after_s = problems.status_of(error), getattr(error, "retry_after_s", None)
        kind = errors.of_status(status)
        raise kind(str(error), status, f"urn:unetpp:{problems.kind(error)}", status.phrase, after_s) from error
    except ValidationError as error:
        text = "; ".join(f"{one['loc'][-1]}={one.get('input')!r:.60}: {one['msg']}" for one in error.errors())
        raise errors.Refused(text, 422, "urn:unetpp:invalid-parameter") from error
