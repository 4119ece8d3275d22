"""Images that a client uploads once and then segments, perhaps several times: its sessions.

They are files of the jobs folder and share its quota. Which of them there are is known in memory only: the next
start of the server removes the files, because no job refers to them.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Self, TypeVar

from server.errors import StoreFull, UnknownUpload
from server.jobs.file_store import RETRY_FULL_S
from server.jobs.files import Files
from server.settings import MonaiLabelSettings

log = logging.getLogger(__name__)

T = TypeVar("T")

INPUT = "input"

# Seconds between two removals of expired sessions.
SWEEP_S = 60


@dataclass
class Session:
    """An uploaded image.

    Attributes:
        id: random name, which gives access to it.
        created: time of the upload in seconds since 1970.
        used: time of its last use in seconds since 1970.
        expiry_s: seconds after the last use until it is removed.
        key: owner and name of an image that has a name of its owner's choice; None if the id is its only name.
    """

    id: str
    created: float
    used: float
    expiry_s: float
    key: tuple[str, str] | None = None


class Sessions:
    """The sessions of a server; use as `async with`, inside of the runner. Leaving it removes them.

    All methods belong to the event loop's thread; the disk is left to others.

    Args:
        settings: time and number of sessions.
        files: function that returns the files of the open jobs folder.
        clock: seconds since 1970.
        sweep_s: seconds between two removals of expired sessions.
    """

    def __init__(
        self,
        settings: MonaiLabelSettings,
        files: Callable[[], Files],
        clock: Callable[[], float] = time.time,
        sweep_s: float = SWEEP_S,
    ) -> None:
        self._settings = settings
        self._files = files
        self._clock = clock
        self._sweep_s = sweep_s
        self._sessions: dict[str, Session] = {}
        self._named: dict[tuple[str, str], str] = {}
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begins to remove what has expired."""
        self._task = asyncio.create_task(self._sweep())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Removes all sessions."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for id_ in [*self._sessions]:
            await self._discard(self._forget(id_))

    @contextlib.contextmanager
    def reserve(self) -> Iterator[Callable[[int], None]]:
        """Reserves room for an upload; the yielded function takes the bytes of each piece.

        Raises:
            StoreFull: there are too many sessions; or the disk quota is exceeded, raised by the yielded function.
            NotReady: the server is starting or stopping.
        """
        if len(self._sessions) >= self._settings.max_uploads:
            raise StoreFull(
                f"{len(self._sessions)} uploaded images are kept, which is the limit; end sessions with DELETE /session/ID, or try "
                f"again: images are removed {self._settings.keep_uploads_h:g} hours after their last use",
                retry_after_s=RETRY_FULL_S,
                limit=self._settings.max_uploads,
                actual=len(self._sessions),
                unit="sessions",
            )
        with self._files().reserve() as add_bytes:
            yield add_bytes

    async def add(self, file: BinaryIO, expiry_s: float = 0, key: tuple[str, str] | None = None) -> Session:
        """Keeps an image; one of the same owner and name is replaced.

        Args:
            file: the image, which is copied.
            expiry_s: seconds after the last use until it is removed, at most those of the settings, which are also meant by 0.
            key: owner and name, where the owner gives it a name.

        Raises:
            StoreFull, StoreBroken: nothing was kept.
        """
        longest_s, now = self._settings.keep_uploads_h * 3600, self._clock()
        expiry_s = min(expiry_s, longest_s) if expiry_s > 0 else longest_s
        session = Session(uuid.uuid4().hex, now, now, expiry_s, key)
        try:
            await _run_in_thread(self._files().write, session.id, INPUT, file)
        except BaseException:
            await self._discard(session)
            raise
        # From here to the end of the dictionaries nothing is awaited, so that two uploads of one name leave one.
        replaced = self._named.get(key) if key else None
        before = self._forget(replaced) if replaced else None
        self._sessions[session.id] = session
        if key:
            self._named[key] = session.id
        if before:
            await self._discard(before)
        return session

    def get(self, id_: str) -> Session:
        """A session, which counts as a use of it.

        Raises:
            UnknownUpload: it was never there, was ended or has expired.
        """
        session = self._sessions.get(id_)
        if session is None or self._has_expired(session):
            raise self._unknown(
                "session_id",
                id_,
                f"there is no session {id_!r:.60}: it was never there, was ended or has expired",
            )
        session.used = self._clock()
        return session

    def find(self, owner: str, name: str) -> Session:
        """The image to which its owner gave a name, which counts as a use of it.

        Raises:
            UnknownUpload: there is none, or none of this owner.
        """
        session = self._sessions.get(self._named.get((owner, name), ""))
        if session is None or self._has_expired(session):
            raise self._unknown(
                "image",
                name,
                f"no image {name!r:.60} was uploaded by this client, or it has expired. This server has no datastore and no access to a "
                "PACS: it segments images that the client uploads with PUT /datastore/, in a session, or with the request",
            )
        session.used = self._clock()
        return session

    async def open(self, session: Session) -> BinaryIO:
        """Opens the image of a session, which stays readable until it is closed, even if the session ends.

        Raises:
            UnknownUpload: the session ended meanwhile.
            StoreFull, StoreBroken: the disk fails.
        """
        files = self._files()

        def opened() -> BinaryIO | None:
            with files.translate_errors(), contextlib.suppress(FileNotFoundError):
                return files.path(session.id, INPUT).open("rb")
            return None

        if file := await _run_in_thread(opened):
            return file
        raise self._unknown("session_id", session.id, "the session ended meanwhile")

    async def remove(self, id_: str) -> Session:
        """Ends a session and removes its image.

        Raises:
            UnknownUpload: there is no such session.
        """
        session = self._forget(self.get(id_).id)
        await self._discard(session)
        return session

    def _unknown(self, parameter: str, value: str, problem: str) -> UnknownUpload:
        hours = self._settings.keep_uploads_h
        return UnknownUpload(
            f"{problem}; images are kept for {hours:g} hours after their last use and not over a restart of the server. Upload it again",
            parameter=parameter,
            value=value[:60],
            limit=hours,
            unit="hours",
        )

    def _has_expired(self, session: Session) -> bool:
        return session.used + session.expiry_s <= self._clock()

    def _forget(self, id_: str) -> Session:
        session = self._sessions.pop(id_)
        if session.key and self._named.get(session.key) == id_:
            del self._named[session.key]
        return session

    async def _discard(self, session: Session) -> None:
        await _run_in_thread(self._files().discard, session.id)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._sweep_s)
            try:
                for session in [one for one in self._sessions.values() if self._has_expired(one)]:
                    # It may have been used or removed while another one was discarded.
                    if session.id in self._sessions and self._has_expired(session):
                        await self._discard(self._forget(session.id))
            except Exception:
                log.exception("expired sessions could not be removed")


async def _run_in_thread(call: Callable[..., T], *arguments: object) -> T:
    """Runs a call in a thread. A cancelled caller waits for its end, too, so that nothing goes on unseen."""
    task = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(task)
    finally:
        await asyncio.wait([task])
