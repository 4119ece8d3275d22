"""What `unetpp doctor` says of a store that several servers share."""

from pathlib import Path
from typing import Any

import pytest

from server.doctor import job_store
from server.doctor.context import Context
from server.doctor.redact import changed_settings, redactor
from server.doctor.report import Check
from server.errors import StoreBroken
from server.jobs.stores import open_files
from server.settings import Settings
from tests.server.jobs.conftest import Fleet


def checked(fleet: Fleet, **jobs: Any) -> list[Check]:
    settings = Settings(jobs=fleet.settings(**jobs))
    return [*job_store.check_jobs(Context(settings=settings))]


def test_store_that_works_is_ok(fleet: Fleet, tmp_path: Path) -> None:
    checks = checked(fleet)
    assert [*tmp_path.iterdir()] == []
    assert [check.status for check in checks] == ["ok"] * 3
    assert "a start makes its tables" in checks[0].detail
    # Nothing stays.
    store = fleet.open()
    assert store.files.ids() == []
    assert "has the tables of this version" in checked(fleet)[0].detail


@pytest.mark.parametrize("fleet", ["postgres-folder"], indirect=True)
def test_database_of_another_version_fails(fleet: Fleet) -> None:
    fleet.open()
    fleet.execute("UPDATE unetpp.version SET number = 99")
    assert checked(fleet)[0].status == "failed"
    assert "format 99" in checked(fleet)[0].detail


@pytest.mark.parametrize("fleet", ["postgres-folder"], indirect=True)
@pytest.mark.parametrize(
    "jobs",
    [
        {"store": "postgresql://u:hunter2@127.0.0.1:9/d"},
        {"files": "/proc/nothing/here"},
        {"files": None},
        {"store": "mysql://x"},
    ],
    ids=["database", "folder", "no files", "scheme"],
)
def test_store_that_cannot_be_used_fails_with_its_remedy(fleet: Fleet, jobs: dict[str, Any]) -> None:
    (failed,) = [check for check in checked(fleet, **jobs) if check.status == "failed"]
    assert failed.remedy
    assert "UNETPP_JOBS__" in f"{failed.detail} {failed.remedy}"
    assert "hunter2" not in str(failed)


def test_file_that_cannot_be_read_back_is_removed(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    files = open_files(fleet.settings())

    def broken(*_: object) -> None:
        raise StoreBroken("it cannot be read")

    monkeypatch.setattr(type(files), "open", broken)
    assert [check.detail for check in checked(fleet) if check.status == "failed"] == [
        "files of jobs: it cannot be read"
    ]
    assert files.ids() == []


def test_bucket_that_is_missing_fails(fleet: Fleet) -> None:
    if fleet.kind != "postgres-s3":
        pytest.skip("of a bucket")
    (failed,) = [check for check in checked(fleet, files="s3://nowhere/jobs") if check.status == "failed"]
    assert "bucket" in failed.detail


def test_report_shows_neither_hosts_nor_passwords() -> None:
    settings = Settings(jobs={"store": "postgresql://u:hunter2@db/d", "files": "s3://secret/x"})  # type: ignore[arg-type]
    assert changed_settings(settings) == {
        "UNETPP_JOBS__STORE": "(set)",
        "UNETPP_JOBS__FILES": "(set)",
    }
    assert "hunter2" not in redactor(settings)(f"cannot open {settings.jobs.store}!")
