"""UIDs, times, equipment, algorithm and coded terms of all answers in DICOM.

Nothing in them is random or of now, because the same request must give the same bytes, and an archive must
know an answer that is sent again.
"""

import hashlib
import json
import uuid
from dataclasses import dataclass
from typing import Any

from server import __version__
from server.imaging.encode.result import Code, SegmentationResult, SegmentCodes

MANUFACTURER = "unetpp"
SERVER = "unetpp-server"
# Characters of the value representation LO.
LONG_STRING = 64
# For classes whose card names no terms.
PRIVATE_SCHEME = "99UNETPP"
CATEGORY = Code("309825002", "SCT", "Spatial and Relational Concept")
# The first date that can stand where the source has none.
NO_DATE, NO_TIME = "19700101", "000000"
DATES = (
    ("ContentDate", "ContentTime"),
    ("AcquisitionDate", "AcquisitionTime"),
    ("SeriesDate", "SeriesTime"),
    ("StudyDate", "StudyTime"),
)
# Numbers of series beyond those of a scanner.
SERIES_NUMBERS = 1000


@dataclass(frozen=True)
class Identity:
    """The UIDs of one answer, which follow from everything that it says.

    Attributes:
        digest: hash of it.
    """

    digest: bytes

    @property
    def series_uid(self) -> str:
        """UID of its series, which holds it alone."""
        return uid(self.digest, "series")

    @property
    def instance_uid(self) -> str:
        """UID of the instance."""
        return uid(self.digest, "instance")

    @property
    def dimensions_uid(self) -> str:
        """UID of the organisation of its frames."""
        return uid(self.digest, "dimensions")


def uid(*parts: bytes | str) -> str:
    """A UID that follows from its parts, by way of a UUID."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode() if isinstance(part, str) else part
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return f"2.25.{uuid.UUID(bytes=digest.digest()[:16], version=5).int}"


def identify(kind: str, result: SegmentationResult, head: Any, values: bytes | memoryview) -> Identity:
    """The identity of an answer.

    Args:
        kind: name of the format, because several answer the same request.
        result: finished segmentation.
        head: header of the first source instance, as `dicom_sources.headers` returns it.
        values: bytes of its pixels.
    """
    import highdicom

    source = result.dicom
    said = (
        kind,
        __version__,
        highdicom.__version__,
        parameters(result),
        result.made_by.bundle_sha256,
        [
            (value, name, repr(result.codes.get(value)), result.colors[value])
            for value, name in result.names.items()
        ],
        [str(source.datasets[index].SOPInstanceUID) for index, _ in source.frames],
        [frame for _, frame in source.frames],
        _texts(head),
    )
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    digest.update(values)
    return Identity(digest.digest())


def _texts(dataset: Any) -> list[Any]:
    """The values of a header; those of frames are left out, because the instance's UID stands for them."""
    return [
        (
            f"{element.tag}",
            [_texts(item) for item in element.value] if element.VR == "SQ" else repr(element.value),
        )
        for element in dataset
        if element.keyword != "PerFrameFunctionalGroupsSequence"
    ]


def parameters(result: SegmentationResult) -> dict[str, str]:
    """Facts that decide what the mask is, by name."""
    made = result.made_by
    served = {"mode": made.mode, "level": made.level, "precision": made.precision}
    return {name: str(value) for name, value in {**served, **made.parameters}.items()}


def date_and_time(head: Any) -> tuple[str, str]:
    """The date and the time of the source that are closest to when its pixels were made."""
    from pydicom.valuerep import DA, TM

    for date, time in DATES:
        try:
            if DA(head.get(date)):
                return str(head.get(date)), str(TM(head.get(time)) or NO_TIME)
        except (ValueError, TypeError):
            continue
    return NO_DATE, NO_TIME


def series(result: SegmentationResult, head: Any, identity: Identity) -> dict[str, Any]:
    """The arguments that all classes of highdicom share."""
    made = result.made_by
    date, time = date_and_time(head)
    return {
        "series_instance_uid": identity.series_uid,
        "series_number": SERIES_NUMBERS + max(0, int(head.get("SeriesNumber") or 0)) % 1_000_000,
        "sop_instance_uid": identity.instance_uid,
        "instance_number": 1,
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": SERVER,
        "software_versions": __version__,
        "device_serial_number": made.bundle_sha256[:LONG_STRING] or made.model,
        "series_description": short(f"{made.title}, level {made.level}"),
        "content_date": date,
        "content_time": time,
        "specific_character_set": character_set(result, head),
    }


def character_set(result: SegmentationResult, head: Any) -> Any:
    """The source's, unless names of the network need another one."""
    names = (result.made_by.title, *result.names.values())
    return head.get("SpecificCharacterSet") if "".join(names).isascii() else "ISO_IR 192"


def equipment(result: SegmentationResult) -> Any:
    """The network, as equipment that contributed."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    made = result.made_by
    described = ", ".join(f"{name} {value}" for name, value in parameters(result).items())
    return hd.ContributingEquipment(
        manufacturer=MANUFACTURER,
        purpose_of_reference=codes.DCM.ProcessingEquipment,
        manufacturer_model_name=short(f"bundle {made.model}"),
        software_versions=made.bundle_sha256 or None,
        contribution_description=f"Segmentation by {made.title}: {described}"[:1024],
    )


def algorithm_name(result: SegmentationResult) -> str:
    """Network and depth."""
    return short(f"UNet++ {result.made_by.model}, level {result.made_by.level}")


def concept(code: Code) -> Any:
    """The term as highdicom has it."""
    from highdicom.sr import CodedConcept

    return CodedConcept(code.value, code.scheme, code.meaning)


def codes_of(result: SegmentationResult, value: int) -> SegmentCodes:
    """The terms of a class, private ones where its card names none."""
    private = Code(f"{value}", PRIVATE_SCHEME, short(result.names[value]))
    return result.codes.get(value) or SegmentCodes(CATEGORY, private)


def tracking(result: SegmentationResult, head: Any, value: int) -> tuple[str, str]:
    """Identifier and UID of a class of this series; they are the same at every level, as the anatomy is."""
    made = result.made_by
    identifier = short(f"{made.model}: {result.names[value]}")
    return identifier, uid("tracking", str(head.SeriesInstanceUID), made.model, str(value))


def take_name(head: Any) -> Any:
    """Removes the patient's name from a header, because highdicom warns of unusual ones and repeats them.

    Returns:
        The element, for `finish`.
    """
    element = head["PatientName"]
    del head.PatientName
    head.PatientName = None
    return element


def finish(dataset: Any, name: Any, identity: Identity | None = None) -> None:
    """Removes what highdicom adds of now or at random.

    Args:
        dataset: answer that highdicom made.
        name: element of the patient's name.
        identity: identity of the answer, if it has frames.
    """
    del dataset.PatientName
    dataset["PatientName"] = name
    for keyword in ("InstanceCreationDate", "InstanceCreationTime"):
        if keyword in dataset:
            delattr(dataset, keyword)
    for item in dataset.get("ContributingEquipmentSequence") or ():
        if item.get("ManufacturerModelName") == "highdicom" and "ContributionDateTime" in item:
            del item.ContributionDateTime
    if identity:
        for item in (*dataset.DimensionOrganizationSequence, *dataset.DimensionIndexSequence):
            item.DimensionOrganizationUID = identity.dimensions_uid


def short(text: str) -> str:
    """The text within the length of a long string, without what ends a value."""
    return text.replace("\\", "/")[:LONG_STRING].strip()
