"""COCO's JSON with compressed run lengths, as pycocotools reads them.

The run lengths are computed here in one pass over the label map, because pycocotools needs a mask as large as
the image per object.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, Shaped
from msgspec import json
from numpy import ndarray

from server.arrays import Objects
from server.cancel import NO_CANCEL, CancelToken
from server.errors import InvalidParameter

# A character holds five bits of a number and whether more follow, plus 48 to be printable.
BITS, MORE, FIRST = 5, 32, 48
# Runs down the columns, background included. Each takes 90 bytes during encoding; 100,000 nuclei have eight
# million.
MAX_RUNS = 20_000_000
# Characters of the largest number.
MAX_CHARACTERS = 7


def encode(
    objects: Objects, names: dict[int, str], filename: str = "", cancel: CancelToken = NO_CANCEL
) -> bytes:
    """Writes one image of id 1; annotations have the ids of objects, categories those of classes.

    Boxes are [x, y, width, height].

    Args:
        objects: objects of an image.
        names: class name per class value.
        filename: name of the image file, by which loaders look for it.
        cancel: token that ends the work between two objects.

    Raises:
        InvalidParameter: there are more than `MAX_RUNS` runs.
        Cancelled: the token was set.
    """
    height, width = objects.labels.shape
    document = {
        "info": {"description": "objects of one mask"},
        "images": [{"id": 1, "file_name": filename or "image", "width": width, "height": height}],
        "categories": [{"id": value, "name": name} for value, name in names.items()],
    }
    # One by one, because hundreds of thousands of dictionaries at once keep the garbage collector busy.
    annotations = b",".join(map(json.encode, _annotations(objects, [height, width], cancel)))
    return json.encode(document)[:-1] + b',"annotations":[' + annotations + b"]}"


def _annotations(objects: Objects, size: list[int], cancel: CancelToken) -> Iterator[dict[str, Any]]:
    boxes = np.concatenate([objects.low[:, ::-1], (objects.high - objects.low)[:, ::-1]], axis=1)
    columns = (objects.value, objects.pixels, boxes, objects.mean_score.astype(np.float64).round(4))
    rows = zip(run_lengths(objects.labels), *(column.tolist() for column in columns), strict=True)
    for number, (counts, value, pixels, box, score) in enumerate(rows, 1):
        cancel.check()
        yield {
            "id": number,
            "image_id": 1,
            "category_id": value,
            "segmentation": {"size": size, "counts": counts},
            "area": pixels,
            "bbox": box,
            "iscrowd": 0,
        } | ({} if math.isnan(score) else {"score": score})


def run_lengths(labels: Int32[ndarray, "H W"], max_runs: int = MAX_RUNS) -> list[str]:
    """Per object the compressed lengths of its runs down the columns, alternately background and object.

    Raises:
        InvalidParameter: there are more than `max_runs` runs.
    """
    starts, lengths, numbers = _runs(labels, max_runs)
    ends = starts + lengths
    # The gap before a run reaches back to the object's previous run, or to the first pixel.
    is_first = np.diff(numbers, prepend=0) != 0
    gaps = starts - np.where(is_first, 0, np.append(0, ends[:-1]))
    counts = np.stack([gaps, lengths], axis=1).ravel()
    last = np.flatnonzero(np.diff(numbers, append=0) != 0)
    rest = labels.size - ends[last]
    # A gap follows the last run too, unless that ends with the image.
    counts = np.insert(counts, (2 * last + 2)[rest > 0], rest[rest > 0])
    ending = 2 * (last + 1) + np.cumsum(rest > 0)
    return _characters(counts, ending)


def _runs(
    labels: Int32[ndarray, "H W"], limit: int
) -> tuple[Int64[ndarray, " R"], Int64[ndarray, " R"], Int32[ndarray, " R"]]:
    """Start, length and object number of each run down the columns, sorted by number, then start."""
    begins = np.ones(labels.shape, dtype=bool)
    np.not_equal(labels[1:], labels[:-1], out=begins[1:])
    np.not_equal(labels[0, 1:], labels[-1, :-1], out=begins[0, 1:])
    count = np.count_nonzero(begins)
    if count > limit:
        raise InvalidParameter(
            f"the objects have {count:,} runs of pixels and format=coco takes {limit:,}; remove small "
            "objects with min_size_px, or use format=labels.tiff",
            parameter="format",
            value="coco",
            limit=limit,
            actual=int(count),
            unit="runs",
            remedy="min_size_px",
        )
    row, column = np.nonzero(begins)
    starts, numbers = column * len(labels) + row, labels[begins]
    order = np.argsort(starts)
    starts, numbers = starts[order], numbers[order]
    lengths = np.diff(starts, append=labels.size)
    kept = np.flatnonzero(numbers)
    kept = kept[np.argsort(numbers[kept], kind="stable")]
    return starts[kept], lengths[kept], numbers[kept]


def _characters(counts: Int64[ndarray, " C"], ending: Int64[ndarray, " N"]) -> list[str]:
    """The text of each object's numbers: low bits first, the sign in the last character.

    From the fourth number of an object on, the difference from the last but one is stored.

    Args:
        counts: numbers of all objects.
        ending: index at which the numbers of the next object begin.
    """
    length = np.diff(ending, prepend=0)
    place = np.arange(len(counts)) - np.repeat(ending - length, length)
    left = counts.copy()
    left[2:] -= np.where(place[2:] > 2, counts[:-2], 0)
    text, used = (
        np.zeros((len(counts), MAX_CHARACTERS), dtype=np.uint8),
        np.zeros((len(counts), MAX_CHARACTERS), dtype=bool),
    )
    pending: Shaped[ndarray, " C"] = np.ones(len(counts), dtype=bool)
    for k in range(MAX_CHARACTERS):
        low, left = left & (MORE - 1), left >> BITS
        more = left != np.where(low & (MORE >> 1), -1, 0)
        text[:, k], used[:, k] = FIRST + low + MORE * more, pending
        pending = pending & more
    until = np.cumsum(used.sum(axis=1))[ending - 1].tolist()
    whole = text[used].tobytes().decode("ascii")
    return [whole[start:end] for start, end in zip([0, *until], until, strict=False)]
