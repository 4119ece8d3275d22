"""The lock of a jobs folder, which one server uses at a time."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from server.errors import StoreBroken

LOCK = "lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a folder locked for this server.

    Raises:
        StoreBroken: another server uses it.
    """
    with (folder / LOCK).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreBroken(
                f"another server uses the jobs folder {folder}; stop it, or give this one its own folder with "
                "UNETPP_JOBS__FOLDER",
                setting="UNETPP_JOBS__FOLDER",
                value=str(folder),
            ) from error
        yield


def is_locked(folder: Path) -> bool:
    """Whether a server uses the folder. The lock is held for a moment, shared, and nothing is written.

    Raises:
        OSError: the lock's file cannot be opened.
    """
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
