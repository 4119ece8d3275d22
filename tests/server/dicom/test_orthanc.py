"""A real Orthanc: series fetched and answers stored over DICOMweb, and series sent to the node by storescu."""

import asyncio
import contextlib
import io
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.dicom.config import read_config
from server.dicom.pacs import DicomPacs
from server.settings import DicomSettings, LimitsSettings
from tests.server.dicom.series import check_answer, write_series
from tests.support.orthanc import Orthanc, free_port, orthanc, storescu
from tests.support.server import serving
from tests.support.service import fake_app

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("pynetdicom")
pytest.importorskip("highdicom")

pytestmark = pytest.mark.long

# Seconds until a series is complete.
QUIET_S = 0.5


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with orthanc(tmp_path_factory.mktemp("orthanc")) as server:
        yield server


def write_config(
    folder: Path,
    pacs: Orthanc,
    node: int | None = None,
    more: str = "",
    rules: str = "",
    quiet_s: float = QUIET_S,
) -> Path:
    """The operator's file, with a node on a port."""
    (folder / "password").write_text("secret\n")
    text = f'[servers.main]\naddress = "{pacs.web}"\nuser = "unetpp"\npassword_file = "password"\n'
    if node:
        text += f'[node]\nport = {node}\nforward = "{pacs.destination}"\nquiet_s = {quiet_s}\n{more}\n'
    path = folder / "pacs.toml"
    path.write_text(f"{text}\n{rules}")
    return path


@contextlib.contextmanager
def served(config: Path, **settings: Any) -> Iterator[httpx.Client]:
    """A server on a network of three dimensions that finds what is brighter than the mean."""
    dicom = {"config": config, "min_retry_s": 0.1, "max_retry_s": 0.5} | settings.pop("dicom", {})
    with serving(fake_app(changes={"dims": 3}, dicom=dicom, **settings)) as client:
        yield client


def until(condition: Callable[[], object], seconds: float = 90) -> None:
    given_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < given_up
        time.sleep(0.1)


def post(client: httpx.Client, source: str, **query: Any) -> dict[str, Any]:
    answer = client.post("/jobs", params={"source": source} | query)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def end(client: httpx.Client, id_: str) -> dict[str, Any]:
    """The job when it is finished."""
    until(lambda: client.get(f"/jobs/{id_}").json()["state"] in ("done", "failed", "cancelled"))
    return dict(client.get(f"/jobs/{id_}").json())


def check_stored(pacs: Orthanc, seed: int) -> str:
    """Checks that there is one right answer for a series; returns its UID."""
    (uid,) = pacs.segmentations(f"1.2.826.{seed}")
    check_answer(pacs.instance(uid), seed)
    return uid


@pytest.mark.parametrize("with_series", [True, False])
def test_source_is_fetched_segmented_and_stored(pacs: Orthanc, tmp_path: Path, with_series: bool) -> None:
    seed = 10 + with_series
    pacs.upload(write_series(tmp_path / "series", seed))
    source = f"main/1.2.826.{seed}" + (f"/1.2.826.{seed}.1" if with_series else "")
    with served(write_config(tmp_path, pacs)) as client:
        job = end(client, post(client, source, store=True)["id"])
        assert (job["state"], job["windows"]["total"]) == ("done", job["windows"]["done"]), job
        result = client.get(job["links"]["result"])
        uid = check_stored(pacs, seed)
        assert result.headers["content-type"] == "application/dicom"
        check_answer(result.content, seed)
        # The same once more finds the answer there, though its study now holds a segmentation.
        assert end(client, post(client, source, store=True)["id"])["state"] == "done"
        assert check_stored(pacs, seed) == uid
        # Another level is another answer.
        assert end(client, post(client, source, store=True, level=1)["id"])["state"] == "done"
        assert len(pacs.segmentations(f"1.2.826.{seed}")) == 2


def test_source_without_store_leaves_the_pacs_alone(pacs: Orthanc, tmp_path: Path) -> None:
    pacs.upload(write_series(tmp_path / "series", 20))
    with served(write_config(tmp_path, pacs)) as client:
        job = end(client, post(client, "main/1.2.826.20/1.2.826.20.1", format="dicomseg", preview=True)["id"])
        check_answer(client.get(job["links"]["result"]).content, 20)
        assert client.get(job["links"]["preview"]).status_code == 200
    assert pacs.segmentations("1.2.826.20") == []


def test_study_of_several_series_must_be_named(pacs: Orthanc, tmp_path: Path) -> None:
    pacs.upload(write_series(tmp_path / "one", 21))
    pacs.upload(write_series(tmp_path / "two", 22, StudyInstanceUID="1.2.826.21"))
    with served(write_config(tmp_path, pacs)) as client:
        error = end(client, post(client, "main/1.2.826.21")["id"])["error"]
    assert (error["code"], error["parameter"]) == ("invalid-parameter", "source")
    assert sorted(error["allowed"]) == ["1.2.826.21.1", "1.2.826.22.1"]


def test_what_the_pacs_does_not_give_ends_the_job(pacs: Orthanc, tmp_path: Path) -> None:
    pacs.upload(write_series(tmp_path / "series", 23))
    with served(write_config(tmp_path, pacs)) as client:
        for source in ("main/1.2.3.4", "main/1.2.826.23/1.2.3.4"):
            error = end(client, post(client, source)["id"])["error"]
            assert (error["code"], error["actual"]) == ("pacs-refused", 404)
        (tmp_path / "password").write_text("wrong")
        error = end(client, post(client, "main/1.2.826.23")["id"])["error"]
        assert (error["code"], error["actual"], error["status"]) == ("pacs-refused", 401, 502)


def test_pacs_that_dies_and_returns_is_waited_for(tmp_path: Path) -> None:
    with orthanc(tmp_path / "orthanc") as pacs:
        pacs.upload(write_series(tmp_path / "series", 30))
        with served(write_config(tmp_path, pacs)) as client:
            pacs.stop(signal.SIGKILL)
            id_ = post(client, "main/1.2.826.30", store=True)["id"]
            time.sleep(1.5)
            job = client.get(f"/jobs/{id_}").json()
            assert job["state"] in ("queued", "running")
            assert job["error"] is None
            pacs.start()
            assert end(client, id_)["state"] == "done"
        check_stored(pacs, 30)


def test_pacs_that_stays_away_fails_the_job_in_the_end(tmp_path: Path) -> None:
    pacs = Orthanc(tmp_path / "orthanc")
    with served(write_config(tmp_path, pacs), dicom={"retry_h": 0.5 / 3600}) as client:
        job = end(client, post(client, "main/1.2.3", store=True)["id"])
    assert (job["state"], job["error"]["code"]) == ("failed", "pacs-unavailable")
    assert job["error"]["setting"] == "UNETPP_DICOM__RETRY_H"


def test_series_sent_to_the_node_comes_back_as_a_segmentation(pacs: Orthanc, tmp_path: Path) -> None:
    port = free_port()
    files = write_series(tmp_path / "series", 40)
    with served(write_config(tmp_path, pacs, port)):
        assert storescu(f"UNETPP@127.0.0.1:{port}", files) == 0
        pacs.upload(files)
        until(lambda: pacs.segmentations("1.2.826.40"))
        check_stored(pacs, 40)


def test_two_series_at_once_in_one_association(pacs: Orthanc, tmp_path: Path) -> None:
    port = free_port()
    mixed = [*write_series(tmp_path / "one", 41), *write_series(tmp_path / "two", 42)]
    mixed.sort(key=lambda path: path.name)
    with served(write_config(tmp_path, pacs, port)):
        assert storescu(f"UNETPP@127.0.0.1:{port}", mixed) == 0
        until(lambda: pacs.segmentations("1.2.826.41") and pacs.segmentations("1.2.826.42"))
    check_stored(pacs, 41)
    check_stored(pacs, 42)


# pynetdicom forgets sockets whose connection is refused.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_node_waits_for_its_destination(tmp_path: Path) -> None:
    port = free_port()
    pacs = Orthanc(tmp_path / "orthanc")
    files = write_series(tmp_path / "series", 43)
    with served(write_config(tmp_path, pacs, port)):
        assert storescu(f"UNETPP@127.0.0.1:{port}", files) == 0
        time.sleep(QUIET_S + 3)
        pacs.start()
        try:
            until(lambda: pacs.segmentations("1.2.826.43"))
            check_stored(pacs, 43)
        finally:
            pacs.stop(signal.SIGKILL)


def test_callers_and_called_titles_are_checked(pacs: Orthanc, tmp_path: Path) -> None:
    port = free_port()
    files = write_series(tmp_path / "series", 44)
    with served(write_config(tmp_path, pacs, port, more='callers = ["CT1"]')):
        assert storescu(f"UNETPP@127.0.0.1:{port}", files, calling="CT2") != 0
        assert storescu(f"OTHER@127.0.0.1:{port}", files, calling="CT1") != 0
        assert storescu(f"UNETPP@127.0.0.1:{port}", files, calling="CT1") == 0
        until(lambda: pacs.segmentations("1.2.826.44"))


def test_rules_choose_the_level_and_refuse_the_rest(pacs: Orthanc, tmp_path: Path) -> None:
    port = free_port()
    rules = '[[rules]]\nmodality = "CT"\ndescription = "*thin*"\nmode = "fast"\nlevel = 1\n'
    thin = write_series(tmp_path / "thin", 45, SeriesDescription="Chest THIN")
    thick = write_series(tmp_path / "thick", 46, SeriesDescription="Chest thick")
    with served(write_config(tmp_path, pacs, port, rules=rules)):
        assert storescu(f"UNETPP@127.0.0.1:{port}", thin) == 0
        assert storescu(f"UNETPP@127.0.0.1:{port}", thick) != 0
        until(lambda: pacs.segmentations("1.2.826.45"))
    seg = pydicom.dcmread(io.BytesIO(pacs.instance(check_stored(pacs, 45))))
    algorithm = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert "level=1" in algorithm.AlgorithmParameters
    assert pacs.query("/studies", StudyInstanceUID="1.2.826.46") == []


def test_compressed_series_is_fetched_as_it_is_kept(pacs: Orthanc, tmp_path: Path) -> None:
    files = write_series(tmp_path / "series", 47)
    for file in files:
        dataset = pydicom.dcmread(file)
        dataset.compress(pydicom.uid.JPEGLSLossless, generate_instance_uid=False)
        dataset.save_as(file)
    pacs.upload(files)
    with served(write_config(tmp_path, pacs)) as client:
        job = end(client, post(client, "main/1.2.826.47", store=True)["id"])
        assert job["state"] == "done", job
        check_stored(pacs, 47)
    fetching = DicomPacs(read_config(tmp_path / "pacs.toml"), DicomSettings(), LimitsSettings())
    file = io.BytesIO()
    asyncio.run(fetching.fetch("main/1.2.826.47", file, lambda size: None))
    with zipfile.ZipFile(file) as archive:
        found = [pydicom.dcmread(io.BytesIO(archive.read(name))) for name in archive.namelist()]
    assert {one.file_meta.TransferSyntaxUID for one in found} == {pydicom.uid.JPEGLSLossless}
