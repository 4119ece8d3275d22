"""The table of job stores, and of the places where a shared one keeps files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from server.errors import Misconfigured
from server.jobs.file_store import FileStore
from server.jobs.store import Store
from server.settings import JobsSettings

STORE, FILES = "UNETPP_JOBS__STORE", "UNETPP_JOBS__FILES"


@dataclass(frozen=True)
class Row:
    """A store.

    Attributes:
        schemes: beginnings of its setting.
        open: function that opens it; it imports what only this store needs.
        extra: extra of this package that has its libraries; None where nothing more is needed.
    """

    schemes: tuple[str, ...]
    open: Callable[[JobsSettings], Store]
    extra: str | None = None


def _open_sqlite(settings: JobsSettings) -> Store:
    from server.jobs.store_sqlite import SQLiteStore

    if settings.files is not None:
        raise Misconfigured(
            f"{FILES} is for jobs that several servers share; set {STORE}=postgresql://…, too, or unset it",
            setting=FILES,
        )
    return SQLiteStore(settings)


def _open_postgres(settings: JobsSettings) -> Store:
    from server.jobs.store_postgres import PostgresStore

    return PostgresStore(settings, open_files(settings))


STORES = {
    "sqlite": Row(("sqlite",), _open_sqlite),
    "postgresql": Row(("postgresql://", "postgres://"), _open_postgres, extra="cluster"),
}


def open_store(settings: JobsSettings) -> Store:
    """Opens the store that the settings name.

    Raises:
        Misconfigured: there is no such store, its extra is not installed, or its files have no place.
        StoreBroken: it cannot be used.
    """
    row = row_of(settings)
    try:
        return row.open(settings)
    except ModuleNotFoundError as error:
        raise missing_extra(error, STORE, row.extra) from error


def row_of(settings: JobsSettings) -> Row:
    """The row of the store that the settings name.

    Raises:
        Misconfigured: there is none.
    """
    for row in STORES.values():
        if settings.store.startswith(row.schemes):
            return row
    allowed = [scheme for row in STORES.values() for scheme in row.schemes]
    raise Misconfigured(f"{STORE} must be or begin with one of {', '.join(allowed)}", setting=STORE)


def open_files(settings: JobsSettings) -> FileStore:
    """Opens the files of a shared store.

    Raises:
        Misconfigured: the settings name no place that several servers can share, or its extra is not installed.
        StoreBroken: it cannot be used.
    """
    if not settings.files:
        raise Misconfigured(
            f"{STORE} is shared by several servers, and so must be the files of the jobs: set {FILES} to a folder that all of them "
            "mount, or to s3://BUCKET/PREFIX",
            setting=FILES,
        )
    if settings.files.startswith("s3://"):
        try:
            from server.jobs.files_s3 import BucketFiles

            return BucketFiles(settings)
        except ModuleNotFoundError as error:
            raise missing_extra(error, FILES, "cluster") from error
    if "://" in settings.files:
        raise Misconfigured(f"{FILES} must be a folder or begin with s3://", setting=FILES)
    return _open_folder(settings, Path(settings.files))


def _open_folder(settings: JobsSettings, folder: Path) -> FileStore:
    from server.jobs.files import SharedFiles

    if folder.resolve() == settings.folder.resolve():
        raise Misconfigured(
            f"{FILES} is the folder that UNETPP_JOBS__FOLDER keeps for this server alone; name two folders",
            setting=FILES,
        )
    files = SharedFiles(settings, folder)
    with files.translate_errors():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return files


def missing_extra(error: ModuleNotFoundError, setting: str, extra: str | None) -> Misconfigured:
    """The error of a setting whose library is not installed."""
    return Misconfigured(
        f"{setting} needs the package {error.name}, which is not installed; install the extra: pip install 'unetpp-server[{extra}]'",
        setting=setting,
    )
