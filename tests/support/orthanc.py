"""A real Orthanc, and tools of DCMTK, from PATH or from packages of Debian that are unpacked in the folder ORTHANC_ROOT.

apt-get download orthanc orthanc-dicomweb dcmtk and what they depend on; dpkg -x each of them into one folder.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.serving import free_port

ENVIRONMENT = os.environ.copy()  # noqa: TID251 - of children
ROOT = Path(ENVIRONMENT.get("ORTHANC_ROOT", "/"))
LIBRARIES = [ROOT / "usr/lib", *(ROOT / "usr/lib").glob("*-linux-gnu*")]
UNPACKED = {
    "LD_LIBRARY_PATH": ":".join(map(str, LIBRARIES)),
    "DCMDICTPATH": str(next((ROOT / "usr/share").glob("libdcmtk*/dicom.dic"), "")),
}
CHILD = ENVIRONMENT | (UNPACKED if Path("/") != ROOT else {})
PLUGIN = ROOT / "usr/share/orthanc/plugins/libOrthancDicomWeb.so"


def tool(name: str) -> str:
    """Path of a program; skips the test where it is not there."""
    folders = [ROOT / "usr/bin", ROOT / "usr/sbin"] if Path("/") != ROOT else []
    path = shutil.which(name, path=":".join(map(str, folders))) or shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name}: in PATH, or below ORTHANC_ROOT")
    return path


class Orthanc:
    """A server that can be stopped and started again; what it keeps stays in its folder."""

    def __init__(self, folder: Path, peers: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.http_port, self.port = free_port(), free_port()
        self.address = f"http://127.0.0.1:{self.http_port}"
        self.web = f"{self.address}/dicom-web"
        self.destination = f"ORTHANC@127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        if not PLUGIN.exists():
            pytest.skip("needs orthanc-dicomweb")
        settings = {
            "Name": "test",
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "Plugins": [str(PLUGIN)],
            "HttpPort": self.http_port,
            "DicomPort": self.port,
            "DicomAet": "ORTHANC",
            "DicomCheckCalledAet": False,
            "DicomAlwaysAllowStore": True,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": True,
            "RegisteredUsers": {"unetpp": "secret"},
            "ConcurrentJobs": 1,
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            "DicomModalities": peers or {},
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "orthanc.json").write_text(json.dumps(settings))

    def start(self) -> None:
        program = tool("Orthanc")
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [program, str(self.folder / "orthanc.json")], stdout=log, stderr=log, env=CHILD
            )
        given_up = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.address}/system", auth=("unetpp", "secret")).status_code == 200:
                    return
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < given_up
            time.sleep(0.1)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process:
            self.process.send_signal(number)
            self.process.wait(60)
            self.process = None

    def query(self, path: str, **query: str) -> list[dict[str, Any]]:
        """Rows of QIDO-RS."""
        answer = httpx.get(
            f"{self.web}{path}",
            params=query,
            headers={"Accept": "application/dicom+json"},
            auth=("unetpp", "secret"),
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        return list(answer.json())

    def segmentations(self, study: str) -> list[str]:
        """UIDs of the instances of all segmentations of a study."""
        found = []
        for series in self.query(f"/studies/{study}/series", Modality="SEG"):
            uid = series["0020000E"]["Value"][0]
            rows = self.query(f"/studies/{study}/series/{uid}/instances")
            found += [row["00080018"]["Value"][0] for row in rows]
        return found

    def instances(self, series: str) -> list[bytes]:
        """Files of a series, by Orthanc's own interface."""
        with httpx.Client(base_url=self.address, auth=("unetpp", "secret"), timeout=60) as client:
            found = client.post(
                "/tools/find", json={"Level": "Instance", "Query": {"SeriesInstanceUID": series}}
            )
            return [client.get(f"/instances/{id_}/file").content for id_ in found.json()]

    def instance(self, uid: str) -> bytes:
        """File of an instance."""
        with httpx.Client(base_url=self.address, auth=("unetpp", "secret"), timeout=60) as client:
            found = client.post("/tools/find", json={"Level": "Instance", "Query": {"SOPInstanceUID": uid}})
            (id_,) = found.json()
            return client.get(f"/instances/{id_}/file").content

    def upload(self, files: Sequence[Path]) -> None:
        with httpx.Client(base_url=self.address, auth=("unetpp", "secret"), timeout=60) as client:
            for file in files:
                assert client.post("/instances", content=file.read_bytes()).status_code == 200


@contextlib.contextmanager
def orthanc(folder: Path) -> Iterator[Orthanc]:
    """A running Orthanc with DICOMweb and the user `unetpp`, whose password is `secret`."""
    server = Orthanc(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop(signal.SIGKILL)


def storescu(destination: str, files: Sequence[Path], *options: str, calling: str = "STORESCU") -> int:
    """Sends files as a modality does; returns the exit status."""
    called, _, address = destination.partition("@")
    host, _, port = address.partition(":")
    command = [tool("storescu"), *options, "-aet", calling, "-aec", called, host, port, *map(str, files)]
    return subprocess.run(command, env=CHILD, capture_output=True, timeout=120, check=False).returncode
