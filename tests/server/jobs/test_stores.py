"""The table of job stores: which settings are refused, and what is imported for which."""

import subprocess
import sys
from pathlib import Path

import pytest

from server.errors import Misconfigured
from server.jobs.stores import STORES, open_store
from server.settings import JobsSettings

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"store": "mysql://x"}, "UNETPP_JOBS__STORE"),
        ({"store": "postgresql://x@h/d"}, "UNETPP_JOBS__FILES"),
        ({"store": "postgresql://x@h/d", "files": "gs://b"}, "s3://"),
        ({"store": "postgresql://u:hunter2@h/d?nonsense=1", "files": "shared"}, "postgresql://USER@HOST"),
        ({"files": "s3://bucket"}, "UNETPP_JOBS__STORE"),
    ],
    ids=["scheme", "no files", "files", "address", "files alone"],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, settings: dict[str, str], words: str) -> None:
    if settings.get("files") == "shared":
        settings |= {"files": str(tmp_path / "shared")}
    with pytest.raises(Misconfigured) as error:
        open_store(JobsSettings(folder=tmp_path / "own", **settings))
    assert words in str(error.value)
    assert "hunter2" not in str(error.value)


def test_one_folder_is_not_both(tmp_path: Path) -> None:
    settings = JobsSettings(folder=tmp_path, store="postgresql://x@h/d", files=str(tmp_path))
    with pytest.raises(Misconfigured):
        open_store(settings)


def test_libraries_are_imported_only_where_they_are_asked_for() -> None:
    """And where one is missing, the error names the extra."""
    code = """
import sys, tempfile, pathlib
import server.app, server.cli, server.doctor.checks
from server.jobs import stores
from server.settings import JobsSettings
from server.errors import Misconfigured
folder = pathlib.Path(tempfile.mkdtemp())
stores.open_store(JobsSettings(folder=folder / "a")).close()
wrong = {"psycopg", "psycopg_pool", "obstore", "procrastinate"} & {name.split(".")[0] for name in sys.modules}
assert not wrong, wrong
for name, settings in (
    ("psycopg", {"files": str(folder / "b")}),
    ("obstore", {"files": "s3://bucket"}),
):
    sys.modules.pop("server.jobs.store_postgres", None)
    sys.modules[name] = None
    try:
        stores.open_store(JobsSettings(folder=folder / "c", store="postgresql://x@h/d", **settings))
    except Misconfigured as error:
        assert "unetpp-server[cluster]" in str(error) and name in str(error), error
    else:
        raise AssertionError(name)
    del sys.modules[name]
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=ROOT, timeout=120)
    assert {row.extra for row in STORES.values()} == {None, "cluster"}
