"""Volumes of the classes as a DICOM structured report, TID 1500, whose regions are the segments of `dicomseg`.

It refers to the segmentation image of the same request, whose UID follows from the mask; ask for both with
`format=dicomseg,dicomsr`.
"""

import io
from typing import Any

import numpy as np

from server.imaging.encode import dicom_identity, dicomseg
from server.imaging.encode.result import SegmentationResult

SEGMENTATION_STORAGE = "1.2.840.10008.5.1.4.1.1.66.4"


def encode(result: SegmentationResult) -> bytes:
    """Writes the report.

    Raises:
        InvalidParameter: the headers of the source do not suffice.
    """
    file = io.BytesIO()
    dicomseg.checked(_build, result).save_as(file)
    return file.getvalue()


def _build(result: SegmentationResult) -> Any:
    import highdicom as hd
    from pydicom.sr.codedict import codes

    sources = dicomseg.headers(result)
    head = sources[0]
    counts = dicomseg.counts(result)
    made = dicom_identity.identify("REPORT", result, head, counts.tobytes())
    segmentation = _reference(head, dicomseg.identity(result, "BINARY", head))
    name = dicom_identity.take_name(head)
    voxel_mm3 = abs(float(np.linalg.det(result.affine[:3, :3])))
    groups = [
        _group(result, head, segmentation, value, number, voxel_mm3 * int(counts[value]))
        for number, value in enumerate(result.names, 1)
    ]
    report = hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(
            observer_device_context=hd.sr.ObserverContext(
                codes.DCM.Device,
                hd.sr.DeviceObserverIdentifyingAttributes(
                    dicom_identity.uid("device", dicom_identity.SERVER),
                    name=dicom_identity.SERVER,
                    manufacturer_name=dicom_identity.MANUFACTURER,
                    model_name=result.made_by.model,
                    serial_number=result.made_by.bundle_sha256 or None,
                ),
            )
        ),
        procedure_reported=codes.LN.CTUnspecifiedBodyRegion
        if head.get("Modality") == "CT"
        else codes.SCT.ImagingProcedure,
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
    )
    series = dicom_identity.series(result, head, made)
    dataset = hd.sr.Comprehensive3DSR(
        [*sources, segmentation],
        report,
        is_complete=True,
        contributing_equipment=[dicom_identity.equipment(result)],
        **series,
    )
    dicom_identity.finish(dataset, name)
    return dataset


def _group(
    result: SegmentationResult, head: Any, segmentation: Any, value: int, number: int, volume_mm3: float
) -> Any:
    """The measurements of one class."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    terms = dicom_identity.codes_of(result, value)
    identifier, tracking_uid = dicom_identity.tracking(result, head, value)
    return hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        hd.sr.TrackingIdentifier(tracking_uid, identifier),
        referenced_segment=hd.sr.ReferencedSegment(
            SEGMENTATION_STORAGE,
            segmentation.SOPInstanceUID,
            number,
            source_series=hd.sr.SourceSeriesForSegmentation(head.SeriesInstanceUID),
        ),
        finding_type=dicom_identity.concept(terms.type),
        finding_category=dicom_identity.concept(terms.category),
        algorithm_id=hd.sr.AlgorithmIdentification(
            dicom_identity.algorithm_name(result),
            result.made_by.bundle_sha256 or "unknown",
            [f"{name}={value}" for name, value in dicom_identity.parameters(result).items()],
        ),
        finding_sites=_site(terms),
        measurements=[hd.sr.Measurement(codes.SCT.Volume, round(volume_mm3, 3), codes.UCUM.CubicMillimeter)],
    )


def _site(terms: Any) -> Any:
    """The anatomic region, or the structure itself with its modifier."""
    import highdicom as hd

    if terms.region is None and terms.modifier is None:
        return None
    modifier = dicom_identity.concept(terms.modifier) if terms.modifier else None
    return [
        hd.sr.FindingSite(dicom_identity.concept(terms.region or terms.type), topographical_modifier=modifier)
    ]


def _reference(head: Any, identity: dicom_identity.Identity) -> Any:
    """The identifying part of the segmentation image."""
    from pydicom import Dataset

    reference = Dataset()
    reference.SOPClassUID, reference.SOPInstanceUID = SEGMENTATION_STORAGE, identity.instance_uid
    reference.StudyInstanceUID, reference.SeriesInstanceUID = head.StudyInstanceUID, identity.series_uid
    return reference
