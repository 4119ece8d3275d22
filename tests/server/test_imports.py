import subprocess
import sys

import pytest

from tests.conftest import ROOT

FORBIDDEN = ["torch", "onnx", "onnxscript", "monai", "safetensors", "model", "export", "client"]

# Of the extra `cluster`, which are imported where a setting opens the port.
GRPC = ["grpc", "open_inference"]

# The extra `dicom`, which is imported when the first DICOM file comes.
DICOM = ["pydicom", "highdicom", "pynetdicom", "openjpeg", "jpeg_ls", "gdcm"]

IMPORT_ALL = """
import importlib, pkgutil, sys
for name in {missing!r}:
    sys.modules[name] = None
import server
names = ["server", *(found.name for found in pkgutil.walk_packages(server.__path__, "server."))]
for name in names:
    importlib.import_module(name)
print(len(names))
for name in {absent!r}:
    assert sys.modules.get(name) is None, name
"""


@pytest.mark.parametrize(
    ("missing", "absent"),
    [
        (FORBIDDEN, FORBIDDEN),
        ([], ["torch", "onnx", "monai", "safetensors"]),
        (["onnxruntime", "openvino"], []),
        (DICOM, DICOM),
        (GRPC, GRPC),
        # nibabel imports pydicom where it is installed, and that its codecs.
        ([], ["highdicom", "pynetdicom"]),
    ],
)
def test_every_module_of_the_server(missing: list[str], absent: list[str]) -> None:
    """In a fresh interpreter: serving needs no torch, and importing needs no engine."""
    code = IMPORT_ALL.format(missing=missing, absent=absent)
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) == len(list((ROOT / "server").rglob("*.py")))
