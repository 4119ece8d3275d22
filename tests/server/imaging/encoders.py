"""Results to encode, one per kind of input, and helpers that read the files back."""

import dataclasses
from typing import Any

import numpy as np

from server.arrays import DicomSource, Image, LabelledMask, Mask, Volume
from server.imaging.encode import ENCODERS, SegmentationResult
from tests.server.imaging.conftest import nifti, numbered, objects_of, read
from tests.server.imaging.dicom_series import ALGORITHM, instances

COLORS = {1: (255, 127, 14), 2: (0, 0, 255), 255: (1, 2, 3)}
NAMES = {1: "Großhirn & <Kern>", 2: 'two, "quoted"', 255: "last"}
VALUES = np.array([0, 1, 2, 255], dtype=np.uint8)
SIZES = {"image": (5, 7), "stack": (5, 7, 3), "volume": (6, 5, 4)}

# Rotated about two axes, mirrored, anisotropic.
ANGLE = np.pi / 7
ROTATION = np.array([[np.cos(ANGLE), -np.sin(ANGLE), 0], [np.sin(ANGLE), np.cos(ANGLE), 0], [0, 0, 1]])
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = ROTATION @ ROTATION[[2, 0, 1]] @ np.diag([0.5, -1, 3])
OBLIQUE[:3, 3] = -91.5, 126.25, -72


def random_classes(size: tuple[int, ...], seed: int = 0) -> np.ndarray:
    classes = np.random.default_rng(seed).choice(VALUES, size)
    return np.asfortranarray(classes) if len(size) == 3 else classes


def source_of(kind: str, size: tuple[int, ...]) -> Image | Volume:
    if kind.startswith("dicom "):
        source = source_of(kind.removeprefix("dicom "), size)
        series = instances((*size[::-1], 1) if len(size) == 2 else size)  # type: ignore[arg-type]
        return dataclasses.replace(
            source, dicom=DicomSource(tuple(series), tuple((k, 1) for k in range(len(series))))
        )
    if kind == "image":
        return Image(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8))
    if kind == "stack":
        return Volume(np.full((*size, 1), 7, dtype=np.uint8), None)
    return read(nifti(np.zeros(size, dtype=np.int16), OBLIQUE))


def result_of(kind: str, needs: frozenset[str] | None = None) -> SegmentationResult:
    """Everything that a row for this kind of input may read, or only what is named."""
    size, rng = SIZES[kind.removeprefix("dicom ")], np.random.default_rng(2)
    arrays = {
        "scores": rng.random((4, *size)).astype(np.float16),
        "head_std": rng.random(size).astype(np.float16) / 2,
    }
    labels = numbered(rng.integers(0, 9, size))
    objects = objects_of(labels, np.arange(labels.max()) % 2 + 1)
    classes = np.append(0, objects.value)[labels].astype(np.uint8)
    arrays = {name: array for name, array in arrays.items() if needs is None or name in needs}
    with_objects = needs is None or "objects" in needs
    mask = LabelledMask(classes, **arrays, objects=objects) if with_objects else Mask(classes, **arrays)
    report = {"a": "µ", "b": [1]}
    return SegmentationResult(
        source_of(kind, size), mask, COLORS, NAMES, "cells.png", report=report, algorithm=ALGORITHM
    )


def masked(classes: np.ndarray, source: Image | Volume | None = None, **arrays: Any) -> SegmentationResult:
    """A result of these classes; without a source of an image, or of a stack."""
    kind = "image" if classes.ndim == 2 else "stack"
    return SegmentationResult(
        source or source_of(kind, classes.shape), Mask(classes, **arrays), COLORS, NAMES
    )


def labelled(
    labels: np.ndarray, source: Image | Volume | None = None, **measured: float
) -> SegmentationResult:
    """A result of these objects, of class 1 and 2 by turns."""
    objects = objects_of(labels, np.arange(int(labels.max(initial=0))) % 2 + 1, **measured)
    classes = np.append(0, objects.value)[labels].astype(np.uint8)
    plain = masked(classes, source)
    return dataclasses.replace(plain, mask=LabelledMask(classes, objects=objects))


def encoded(name: str, result: SegmentationResult) -> bytes:
    return ENCODERS[name].encode(result)
