"""Checks of the store of jobs: the folder, and what a fleet of servers shares."""

import contextlib
import errno
import io
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from server.doctor.context import Context
from server.doctor.hardware import existing_parent
from server.doctor.report import Check
from server.errors import Misconfigured, StoreBroken, StoreFull, StoreUnavailable
from server.jobs import store_sqlite, stores
from server.jobs.folder_lock import is_locked
from server.settings import JobsSettings

SETTINGS_PAGE = "compare with the page Job stores of the manual"


def check_jobs(context: Context) -> Iterator[Check]:
    """Looks at the store of jobs without making or changing anything that lasts."""
    settings = context.known_settings.jobs
    try:
        if stores.row_of(settings) is stores.STORES["postgresql"]:
            yield from _check_shared(context, settings)
        else:
            yield _check_folder(context, settings.folder)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        remedy = "make it a folder that this user may write, or name another with UNETPP_JOBS__FOLDER"
        yield Check("jobs", "failed", f"the jobs folder cannot be used: {reason}", remedy)
    except Misconfigured as error:
        yield Check("jobs", "failed", str(error), SETTINGS_PAGE)


def _check_shared(context: Context, settings: JobsSettings) -> Iterator[Check]:
    """Looks at the database, and writes a file where files of jobs are, which it removes again."""
    try:
        from server.jobs import postgres
    except ModuleNotFoundError as error:
        raise stores.missing_extra(error, stores.STORE, stores.STORES["postgresql"].extra) from error
    try:
        version = postgres.check(settings.store)
    except (StoreUnavailable, StoreBroken) as error:
        cause = str(error.__cause__ or error).strip().partition("\n")[0]
        remedy = (
            f"start it, see that this machine reaches it, and compare user and password in {stores.STORE}"
        )
        yield Check("jobs", "failed", f"the database of jobs cannot be used: {cause}", remedy)
    else:
        yield _check_version(version, postgres.VERSION)
    yield _check_folder(context, settings.folder)
    with _removing_new_folders(settings.files or ""):
        check = _check_files(settings)
    yield check


def _check_files(settings: JobsSettings) -> Check:
    id_ = uuid.uuid4().hex
    try:
        files = stores.open_files(settings)
        try:
            files.write(id_, "doctor", io.BytesIO(b"written by unetpp doctor"))
            with files.open(id_, "doctor") as file:
                file.read()
        finally:
            files.discard(id_)
    except (StoreUnavailable, StoreBroken, StoreFull, FileNotFoundError) as error:
        remedy = f"see that {stores.FILES} can be reached, read and written from here"
        return Check("jobs", "failed", f"files of jobs: {error}", remedy)
    return Check("jobs", "ok", "files of jobs can be written, read and removed")


@contextlib.contextmanager
def _removing_new_folders(files: str) -> Iterator[None]:
    """Removes the folder of the files of jobs where it was not there before.

    One that the doctor's user has made may be closed to the server's.
    """
    folder = Path(files)
    paths = () if "://" in files else (folder, *folder.parents)
    new = [one for one in paths if not os.access(one, os.F_OK)]
    try:
        yield
    finally:
        for one in new:
            with contextlib.suppress(OSError):  # it was not made, or a server has begun to use it
                one.rmdir()


def _check_version(version: int | None, own: int) -> Check:
    if version is None:
        return Check("jobs", "ok", "the database of jobs answers; a start makes its tables")
    if version == own:
        return Check("jobs", "ok", "the database of jobs answers, and has the tables of this version")
    text = f"the database of jobs was made by another version of this server (format {version}, this one reads {own})"
    return Check("jobs", "failed", text, f"use that version, or name another database with {stores.STORE}")


def _check_folder(context: Context, folder: Path) -> Check:
    if not folder.exists():
        parent = existing_parent(folder)
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "it does not exist, and cannot be made")
        return Check("jobs", "ok", "the folder does not exist yet; a start makes it")
    # A file without a name, which leaves nothing behind.
    with tempfile.TemporaryFile(dir=folder):
        pass
    version = store_sqlite.read_version(folder)
    # 0 is a database whose first changes are still in its log.
    if version not in (None, 0, store_sqlite.VERSION):
        text = f"it was written by another version of this server (format {version}, this one reads {store_sqlite.VERSION})"
        return Check("jobs", "failed", text, "name another folder with UNETPP_JOBS__FOLDER")
    if not is_locked(folder):
        return Check("jobs", "ok", "the folder is writable")
    if context.is_serving:
        return Check("jobs", "ok", "the folder is writable, and in use by the running server")
    text = "another server uses the jobs folder, and none answers on the configured ports"
    return Check("jobs", "failed", text, "stop it, or give this one its own folder with UNETPP_JOBS__FOLDER")
