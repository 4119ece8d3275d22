"""Reads the header of a DICOM file up to its UIDs, for rules and archives."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from server.errors import Unreadable

# SeriesInstanceUID, the last of what is read.
LAST_TAG = 0x0020000E
MAX_TEXT = 64
# Bytes of the longest element that is read.
MAX_ELEMENT = 1024

UID, MAX_UID = r"[0-9]+(?:\.[0-9]+)*", 64


@dataclass(frozen=True)
class Facts:
    """The part of a header that rules and archives need.

    Attributes:
        study: UID of its study.
        series: UID of its series.
        instance: UID of itself.
        sop_class: UID of its class.
        rule_facts: modality, body_part and description, which may be text about a patient: never to be logged.
    """

    study: str
    series: str
    instance: str
    sop_class: str
    rule_facts: dict[str, str]


def read_facts(file: BinaryIO | Path) -> Facts:
    """Reads the header as far as the UID of the series.

    Raises:
        Unreadable: it cannot be read, or the UIDs are missing.
    """
    dataset = _read(file)
    uids = [_text(dataset, name) for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")]
    if not all(uids):
        raise Unreadable(
            "the instance has no UIDs of its study, its series and itself",
            format="DICOM",
            field="SOPInstanceUID",
        )
    study, series, instance = uids
    facts = {
        "modality": _text(dataset, "Modality"),
        "body_part": _text(dataset, "BodyPartExamined"),
        "description": _text(dataset, "SeriesDescription"),
    }
    return Facts(study, series, instance, _text(dataset, "SOPClassUID"), facts)


def read_uids(file: BinaryIO) -> tuple[str, str]:
    """The UIDs of the study and the instance, which may stand in an address.

    Raises:
        Unreadable: it has none, or what it has is of another form.
    """
    facts = read_facts(file)
    if not is_uid(facts.study) or not is_uid(facts.instance):
        raise Unreadable(
            "the UIDs of the instance or its study are not digits and single dots, at most 64 characters; correct them in the source",
            format="DICOM",
            field="StudyInstanceUID",
        )
    return facts.study, facts.instance


def is_uid(text: str) -> bool:
    """Whether a text has the form of a UID (PS3.5, 9.1), but for leading zeros."""
    return len(text) <= MAX_UID and re.fullmatch(UID, text) is not None


def _read(file: BinaryIO | Path) -> Any:
    from pydicom.filereader import read_partial

    from server.imaging import dicom_library

    dicom_library.load()
    try:
        if isinstance(file, Path):
            with file.open("rb") as opened:
                return _read(opened)
        file.seek(0)
        # Longer elements are skipped, because a private one may be larger than the memory.
        return read_partial(file, stop_when=lambda tag, vr, length: tag > LAST_TAG, defer_size=MAX_ELEMENT)
    except OSError:
        raise
    except Exception as error:
        raise Unreadable("the header of the instance cannot be read", format="DICOM") from error


def _text(dataset: Any, name: str) -> str:
    # Of a UID that is too long one character more stays, by which it is recognized.
    return str(dataset.get(name) or "")[: MAX_TEXT + 1].strip("\0 ")
