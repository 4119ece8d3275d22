"""Makes the PACS and the DICOM node of a server, whose libraries are imported only where the settings name them."""

from typing import TYPE_CHECKING, BinaryIO

from server.dicom.config import DicomConfig, read_config
from server.errors import CallerError, Misconfigured
from server.jobs.pacs import Pacs
from server.jobs.runner import Runner
from server.jobs.submission import storable
from server.segment.request import SegmentParams, Upload
from server.segment.service import SegmentationService
from server.settings import Settings

if TYPE_CHECKING:
    from server.dicom.node import Node

# Folder of series that arrive, in that of jobs.
ARRIVING = "arriving"


def read_dicom(settings: Settings) -> DicomConfig | None:
    """Reads the configuration of PACS and node; None where the settings name none.

    Raises:
        Misconfigured: it cannot be read, or the extra `dicom` is missing.
    """
    if settings.dicom.config is None:
        return None
    return read_config(settings.dicom.config)


def make_pacs(dicom: DicomConfig, settings: Settings) -> Pacs:
    """Makes the PACS that jobs fetch from and send to.

    Raises:
        Misconfigured: the extra `dicom` is missing.
    """
    try:
        from server.dicom.pacs import DicomPacs
    except ModuleNotFoundError as error:
        raise _extra_missing(error) from error
    return DicomPacs(dicom, settings.dicom, settings.limits)


def make_node(
    dicom: DicomConfig, settings: Settings, service: SegmentationService, runner: Runner
) -> "Node | None":
    """Makes the DICOM node, if there is one.

    Raises:
        Misconfigured: a rule names a model or level that does not exist, or a format that no PACS takes, or the extra `dicom` is missing.
    """
    if dicom.node is None:
        return None
    for number, rule in enumerate(dicom.rules, 1):
        try:
            service.registry.resolve(storable(rule.params))
        except CallerError as error:
            raise Misconfigured(
                f"rule {number} of UNETPP_DICOM__CONFIG: {error}", setting="UNETPP_DICOM__CONFIG"
            ) from error
    try:
        import pynetdicom  # noqa: F401 - reported here, not when the first instance comes

        from server.dicom.node import Node
    except ModuleNotFoundError as error:
        raise _extra_missing(error) from error

    async def submit(file: BinaryIO, params: SegmentParams, destination: str, id_: str) -> None:
        with runner.reserve(params):
            await runner.submit(Upload(file), params, preview=False, destination=destination, id_=id_)

    quota = settings.jobs.max_disk_mb * 1024 * 1024
    return Node(
        dicom,
        dicom.node,
        settings.jobs.folder / ARRIVING,
        settings.limits,
        lambda size: runner.files.used_bytes + size <= quota,
        submit,
    )


def _extra_missing(error: ModuleNotFoundError) -> Misconfigured:
    return Misconfigured(
        f"UNETPP_DICOM__CONFIG needs {error.name!r}, which is not installed; install it with: pip install 'unetpp-server[dicom]'",
        setting="UNETPP_DICOM__CONFIG",
    )
