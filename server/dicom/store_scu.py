"""C-STORE of one instance to another DICOM node."""

import logging
import ssl
from typing import Any, BinaryIO

from server.dicom.config import NodeTable, parse_destination
from server.errors import PacsRefused, PacsUnavailable
from server.settings import DicomSettings

DEFAULT_AET = "UNETPP"
# Statuses of C-STORE (PS3.4 B.2.3): stored, also with remarks; out of resources; cannot begin to say.
SUCCESS, WARNING, OUT_OF_RESOURCES = 0x0000, 0xB, 0xA7


def send(destination: str, file: BinaryIO, node: NodeTable | None, settings: DicomSettings) -> None:
    """Sends an instance. An archive that has it already knows it by its UID.

    Args:
        destination: "AET@HOST:PORT".
        file: instance as a DICOM file.
        node: table of this node, with its AE title and certificates.
        settings: time limits.

    Raises:
        PacsUnavailable: the node is away, refuses the association, or does not take such instances.
        PacsRefused: it does not take this one.
    """
    import pydicom

    file.seek(0)
    dataset = pydicom.dcmread(file)
    association = _associate(destination, dataset, node, settings)
    try:
        answer: Any = association.send_c_store(dataset)
    except (RuntimeError, ValueError) as error:
        raise _unavailable(destination, "ended the association", settings) from error
    finally:
        association.release()
    _check(destination, answer.get("Status") if answer else None, settings)


def _associate(destination: str, dataset: Any, node: NodeTable | None, settings: DicomSettings) -> Any:
    """An association in which the instance may be sent."""
    from pynetdicom import AE

    silence()
    aet, host, port = parse_destination(destination)
    own = AE(ae_title=node.aet if node else DEFAULT_AET)
    own.connection_timeout = settings.connect_s
    own.network_timeout = own.dimse_timeout = own.acse_timeout = settings.idle_s
    own.add_requested_context(dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID)
    tls = (client_context(node), host) if node and node.forward_tls else None
    association = own.associate(host, port, ae_title=aet, tls_args=tls)
    if association.is_rejected:
        why = "refuses the association; it may not know the AE title of this node"
        raise _unavailable(destination, why, settings)
    if association.rejected_contexts and not association.accepted_contexts:
        association.abort()
        # It may be configured meanwhile, and the segmentation is not lost.
        raise _unavailable(destination, "does not take such instances", settings)
    if not association.is_established:
        raise _unavailable(destination, "cannot be reached", settings)
    return association


def _check(destination: str, status: int | None, settings: DicomSettings) -> None:
    """Checks the status of C-STORE.

    Raises:
        PacsUnavailable: the instance may be stored later.
        PacsRefused: it will not.
    """
    if status is None:
        raise _unavailable(destination, "did not answer", settings)
    if status >> 8 == OUT_OF_RESOURCES:
        raise _unavailable(destination, f"is short of resources (0x{status:04X})", settings)
    if status != SUCCESS and status >> 12 != WARNING:
        raise _refused(destination, f"does not store the segmentation (0x{status:04X})", actual=status)


def client_context(node: NodeTable) -> ssl.SSLContext:
    """The TLS of associations that this node opens."""
    context = ssl.create_default_context(cafile=node.tls_ca)
    if node.tls_cert and node.tls_key:
        context.load_cert_chain(node.tls_cert, node.tls_key)
    return context


def silence() -> None:
    """Makes pynetdicom silent, because what it tells of messages may be text about a patient."""
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)


def _unavailable(destination: str, why: str, settings: DicomSettings) -> PacsUnavailable:
    return PacsUnavailable(
        f"the DICOM node {destination} {why}; it is tried again until {settings.retry_h:g} hours after the job was accepted",
        value=destination,
        limit=settings.retry_h,
        unit="hours",
        setting="UNETPP_DICOM__RETRY_H",
    )


def _refused(destination: str, why: str, **fields: Any) -> PacsRefused:
    return PacsRefused(
        f"the DICOM node {destination} {why}; its log should say more", value=destination, **fields
    )
