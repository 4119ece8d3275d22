"""The table of output formats. A format is named by its file; the names in `FAMILIES` follow the input."""

from collections.abc import Callable
from dataclasses import dataclass

from server.imaging.encode import (
    coco,
    csv,
    dicomseg,
    dicomsr,
    geojson,
    json,
    nifti,
    npz,
    nrrd,
    outlines,
    overlay,
    png,
    tiff,
    uncertainty,
)
from server.imaging.encode.result import SegmentationResult


@dataclass(frozen=True)
class Encoder:
    """One row of the table.

    Attributes:
        media_type: media type of the answer.
        filename: name of the answer's file, also among others in a zip.
        encode: function that writes the file.
        kinds: kinds of input that it can answer: "image", "stack", "volume", and "dicom image" or "dicom volume"
            where it needs the instances of a DICOM input.
        needs: parts that the result must hold besides the classes: "scores", "head_std", "objects", "report".
        compressible: whether the file is text, so that a zip or HTTP's Content-Encoding should compress it.
        by_name_only: whether only `format` gives it, never a header Accept: pictures that are lossy or decorated,
            which a program that takes any image would measure as if it were the mask.
        outlines: whether it describes the shape of each object, which takes longer than all other formats.
        image_bytes: bytes of memory per pixel of an image during encoding, besides the file; the maximum over
            noise, stripes and dots. Volumes need none that counts, because only a small picture is made of
            them.
        max_bytes: limit of that memory where the number of objects, corners or runs is limited.
        voxel_bytes: bytes of memory per pixel or voxel of any input during encoding, the file included.
        class_bytes: bytes of memory per pixel or voxel and class, besides `voxel_bytes`.
        extra: optional dependency that it needs, which may not be installed; "" for none.
        note: function that returns a remark on the answer for the caller.
    """

    media_type: str
    filename: str
    encode: Callable[[SegmentationResult], bytes]
    kinds: tuple[str, ...] = ("image", "stack", "volume")
    needs: frozenset[str] = frozenset()
    compressible: bool = False
    by_name_only: bool = False
    outlines: bool = False
    image_bytes: int = 0
    max_bytes: int = 1 << 62
    voxel_bytes: int = 0
    class_bytes: float = 0.0
    extra: str = ""
    note: Callable[[SegmentationResult], str] = lambda result: ""


IMAGE, PAGES, VOLUME = ("image",), ("image", "stack"), ("volume",)
HEAD_STD, SCORES, OBJECTS = frozenset({"head_std"}), frozenset({"scores"}), frozenset({"objects"})
INSTANCES = ("dicom image", "dicom volume")
PNG, TIFF, NIFTI, NPZ = "image/png", "image/tiff", "application/gzip", "application/x-npz"
DICOM = "application/dicom"

# A header Accept is answered with the first row that fits it, after the default of the input's kind.
ENCODERS: dict[str, Encoder] = {
    "mask.png": Encoder(PNG, "mask.png", lambda r: png.encode(r.mask.classes, r.colors), IMAGE),
    "mask.nii.gz": Encoder(
        NIFTI, "mask.nii.gz", lambda r: nifti.encode(r.volume, r.mask.classes, r.colors, r.names), VOLUME
    ),
    "mask.tiff": Encoder(TIFF, "mask.tiff", lambda r: tiff.encode(r.source, r.mask.classes, r.colors), PAGES),
    "json": Encoder(
        "application/json",
        "statistics.json",
        lambda r: json.encode(r.report),
        needs=OBJECTS | {"report"},
        compressible=True,
    ),
    "scores.npz": Encoder(NPZ, "scores.npz", lambda r: npz.encode(r.mask.classes, r.scores), needs=SCORES),
    "scores.png": Encoder(PNG, "scores.png", lambda r: png.scores(r.scores), IMAGE, SCORES),
    "overlay": Encoder(
        PNG,
        "overlay.png",
        lambda r: overlay.encode(r.source, r.mask.classes, r.colors),
        by_name_only=True,
        image_bytes=17,
    ),
    "mask_1bit.png": Encoder(PNG, "mask_1bit.png", lambda r: png.one_bit(r.mask.classes), IMAGE),
    "mask.seg.nrrd": Encoder(
        "application/x-nrrd",
        "mask.seg.nrrd",
        lambda r: nrrd.encode(r.affine, r.mask.classes, r.colors, r.names, r.volume.nrrd_place),
        VOLUME,
    ),
    "labels.png": Encoder(PNG, "labels.png", lambda r: png.labels(r.objects), IMAGE, OBJECTS),
    "labels.tiff": Encoder(TIFF, "labels.tiff", lambda r: tiff.labels(r.source, r.objects), PAGES, OBJECTS),
    "labels.nii.gz": Encoder(
        NIFTI, "labels.nii.gz", lambda r: nifti.labels(r.volume, r.objects), VOLUME, OBJECTS
    ),
    "csv": Encoder(
        "text/csv",
        "objects.csv",
        lambda r: csv.encode(r.objects, r.names, r.source),
        needs=OBJECTS,
        compressible=True,
        image_bytes=75,
        max_bytes=500_000_000,
    ),
    "geojson": Encoder(
        "application/geo+json",
        "objects.geojson",
        lambda r: geojson.encode(r.objects, r.colors, r.names, r.image, r.cancel),
        IMAGE,
        OBJECTS,
        compressible=True,
        outlines=True,
        image_bytes=160,
        max_bytes=160 * outlines.MAX_CORNERS,
    ),
    "coco": Encoder(
        "application/json",
        "coco.json",
        lambda r: coco.encode(r.objects, r.names, r.filename, r.cancel),
        IMAGE,
        OBJECTS,
        compressible=True,
        outlines=True,
        image_bytes=90,
        max_bytes=90 * coco.MAX_RUNS,
    ),
    "scores_8bit.npz": Encoder(
        NPZ, "scores_8bit.npz", lambda r: npz.with_bytes(r.mask.classes, r.scores), needs=SCORES
    ),
    "scores.tiff": Encoder(
        TIFF, "scores.tiff", lambda r: tiff.scores(r.source, r.scores, r.names), PAGES, SCORES
    ),
    "scores.nii.gz": Encoder(
        NIFTI, "scores.nii.gz", lambda r: nifti.scores(r.volume, r.scores), VOLUME, SCORES
    ),
    "overlay.jpg": Encoder(
        "image/jpeg",
        "overlay.jpg",
        lambda r: overlay.jpeg(r.source, r.mask.classes, r.colors),
        by_name_only=True,
        image_bytes=17,
    ),
    "picture": Encoder(
        PNG, "picture.png", lambda r: overlay.picture(r.image), IMAGE, by_name_only=True, image_bytes=12
    ),
    "uncertainty.png": Encoder(
        PNG, "uncertainty.png", lambda r: uncertainty.as_png(r.head_std), IMAGE, HEAD_STD
    ),
    "uncertainty.tiff": Encoder(
        TIFF, "uncertainty.tiff", lambda r: uncertainty.as_tiff(r.source, r.head_std), PAGES, HEAD_STD
    ),
    "uncertainty.nii.gz": Encoder(
        NIFTI, "uncertainty.nii.gz", lambda r: uncertainty.as_nifti(r.volume, r.head_std), VOLUME, HEAD_STD
    ),
    "dicomseg": Encoder(
        DICOM,
        "mask.dcm",
        dicomseg.binary,
        INSTANCES,
        voxel_bytes=2,
        class_bytes=3 / 8,
        extra="dicom",
        note=dicomseg.note,
    ),
    "dicomseg.labelmap": Encoder(
        DICOM,
        "mask_labelmap.dcm",
        dicomseg.labelmap,
        INSTANCES,
        voxel_bytes=4,
        extra="dicom",
        note=dicomseg.note,
    ),
    "dicomseg.fractional": Encoder(
        DICOM,
        "scores.dcm",
        dicomseg.fractional,
        INSTANCES,
        SCORES,
        voxel_bytes=2,
        class_bytes=5.0,
        extra="dicom",
    ),
    "dicomsr": Encoder(DICOM, "volumes.dcm", dicomsr.encode, INSTANCES[1:], extra="dicom"),
}

MASK, LABELS = "mask", "labels"

# Names that follow the input: the row per kind, and per file family of volumes.
FAMILIES: dict[str, dict[str, str]] = {
    MASK: {"image": "mask.png", "stack": "mask.tiff", "nifti": "mask.nii.gz", "nrrd": "mask.seg.nrrd"},
    LABELS: {
        "image": "labels.png",
        "stack": "labels.tiff",
        "nifti": "labels.nii.gz",
        "nrrd": "labels.nii.gz",
    },
    "scores": {
        "image": "scores.png",
        "stack": "scores.tiff",
        "nifti": "scores.nii.gz",
        "nrrd": "scores.nii.gz",
    },
    "uncertainty": {
        "image": "uncertainty.png",
        "stack": "uncertainty.tiff",
        "nifti": "uncertainty.nii.gz",
        "nrrd": "uncertainty.nii.gz",
    },
}

# Other spellings, and the names of earlier versions.
ALIASES: dict[str, str] = {
    "mask.tif": "mask.tiff",
    "labels.tif": "labels.tiff",
    "scores.tif": "scores.tiff",
    "uncertainty.tif": "uncertainty.tiff",
    "mask.nii": "mask.nii.gz",
    "labels.nii": "labels.nii.gz",
    "scores.nii": "scores.nii.gz",
    "uncertainty.nii": "uncertainty.nii.gz",
    "mask.nrrd": "mask.seg.nrrd",
    "overlay.png": "overlay",
    "overlay.jpeg": "overlay.jpg",
    "picture.png": "picture",
    "png": "mask.png",
    "nifti": "mask.nii.gz",
    "tiff": "mask.tiff",
    "nrrd": "mask.seg.nrrd",
    "png1": "mask_1bit.png",
    "npz": "scores.npz",
    "npz8": "scores_8bit.npz",
    "png16": "scores.png",
    "scores_tiff": "scores.tiff",
    "scores_nifti": "scores.nii.gz",
    "labels_png": "labels.png",
    "labels_tiff": "labels.tiff",
    "labels_nifti": "labels.nii.gz",
    "uncertainty_png": "uncertainty.png",
    "uncertainty_tiff": "uncertainty.tiff",
    "uncertainty_nifti": "uncertainty.nii.gz",
    "overlay_jpeg": "overlay.jpg",
    "geojson_gz": "geojson",
    "dicomseg.binary": "dicomseg",
}
