"""The DICOM library, which is optional and slow to import: loaded when the first DICOM file comes."""

import functools
import importlib.util
import logging
import warnings

from server.errors import UnsupportedType

EXTRA = "pip install 'unetpp-server[dicom]'"


def is_installed() -> bool:
    """Returns whether the extra `dicom` is installed."""
    return importlib.util.find_spec("pydicom") is not None


@functools.cache
def load() -> None:
    """Imports pydicom and makes it silent, because what it tells of a file may be text about a patient.

    Raises:
        UnsupportedType: It is not installed.
    """
    if not is_installed():
        raise UnsupportedType(
            "the file is DICOM, and the server has no library for it; the operator installs it with "
            f"{EXTRA}. Or convert the series to NIfTI (dcm2niix)",
            value="DICOM",
            remedy=EXTRA,
        )
    from pydicom import config

    config.settings.reading_validation_mode = config.IGNORE
    for name in ("pydicom", "highdicom", "pylibjpeg", "openjpeg"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"(pydicom|highdicom|openjpeg|jpeg_ls)(\.|$)")
