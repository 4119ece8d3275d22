"""COCO's JSON with compressed run lengths, as pycocotools reads them.

pycocotools itself encodes from masks as large as the image, one per object. Here the runs of all objects are found in one pass over
the label map, and packed into characters at once.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, Shaped
from msgspec import json
from numpy import ndarray

from server.arrays import Mask, Objects
from server.cancel import NO_CANCEL, CancelToken
from server.errors import InvalidParameter

# Of a character: five bits of a number, and whether more follow; offset to be printable.
BITS, MORE, FIRST = 5, 32, 48
# Down the columns, background included; each takes some 90 bytes meanwhile. A hundred thousand nuclei have eight million.
MOST_RUNS = 20_000_000
# Characters of the largest number.
MOST = 7


def encode(mask: Mask, names: dict[int, str], file: str = "", stop: CancelToken = NO_CANCEL) -> bytes:
    """One image, id 1, of the name `file`, which loaders look for; annotations and categories have the numbers of objects and classes.

    Boxes are [x, y, width, height].

    Raises:
        InvalidParameter: there are more runs than anybody could use.
        Stopped: see `Product`.
    """
    assert mask.objects is not None  # noqa: S101 - the table asks for them
    height, width = mask.objects.labels.shape
    document = {
        "info": {"description": "objects of one mask"},
        "images": [{"id": 1, "file_name": file or "image", "width": width, "height": height}],
        "categories": [{"id": value, "name": name} for value, name in names.items()],
    }
    # One by one, see `geojson`.
    annotations = b",".join(map(json.encode, _annotations(mask.objects, [height, width], stop)))
    return json.encode(document)[:-1] + b',"annotations":[' + annotations + b"]}"


def _annotations(objects: Objects, size: list[int], stop: CancelToken) -> Iterator[dict[str, Any]]:
    boxes = np.concatenate([objects.low[:, ::-1], (objects.high - objects.low)[:, ::-1]], axis=1)
    columns = (objects.value, objects.pixels, boxes, objects.mean_score.astype(np.float64).round(4))
    rows = zip(run_lengths(objects.labels), *(column.tolist() for column in columns), strict=True)
    for number, (counts, value, pixels, box, score) in enumerate(rows, 1):
        stop.check()
        yield {
            "id": number, "image_id": 1, "category_id": value, "segmentation": {"size": size, "counts": counts},
            "area": pixels, "bbox": box, "iscrowd": 0,
        } | ({} if math.isnan(score) else {"score": score})  # fmt: skip


def run_lengths(labels: Int32[ndarray, "H W"]) -> list[str]:
    """Of each object from 1 on the compressed lengths of its runs, of background and object by turns, down the columns."""
    starts, lengths, numbers = _runs(labels)
    ends = starts + lengths
    # Before a run lies what is not the object's: since its last run, or the beginning.
    begins = np.diff(numbers, prepend=0) != 0
    gaps = starts - np.where(begins, 0, np.append(0, ends[:-1]))
    counts = np.stack([gaps, lengths], axis=1).ravel()
    last = np.flatnonzero(np.diff(numbers, append=0) != 0)
    rest = labels.size - ends[last]
    # Behind the last of them too, unless it ends with the image.
    counts = np.insert(counts, (2 * last + 2)[rest > 0], rest[rest > 0])
    ending = 2 * (last + 1) + np.cumsum(rest > 0)
    return _characters(counts, ending)


def _runs(labels: Int32[ndarray, "H W"]) -> tuple[Int64[ndarray, " R"], Int64[ndarray, " R"], Int32[ndarray, " R"]]:
    """Start, length and number of each run down the columns, ordered by number and start; without the background's."""
    begins = np.ones(labels.shape, dtype=bool)
    np.not_equal(labels[1:], labels[:-1], out=begins[1:])
    np.not_equal(labels[0, 1:], labels[-1, :-1], out=begins[0, 1:])
    if np.count_nonzero(begins) > MOST_RUNS:
        raise InvalidParameter(
            f"the objects have more than {MOST_RUNS:,} runs of pixels, which is noise. Drop the small objects with min_size_px, or ask "
            "for labels_tiff"
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
    """Each number less the last but one, from an object's fourth on; low bits first, the sign in the last character.

    Args:
        counts: of all objects.
        ending: where the next object's begin.
    """
    length = np.diff(ending, prepend=0)
    place = np.arange(len(counts)) - np.repeat(ending - length, length)
    left = counts.copy()
    left[2:] -= np.where(place[2:] > 2, counts[:-2], 0)
    text, used = np.zeros((len(counts), MOST), dtype=np.uint8), np.zeros((len(counts), MOST), dtype=bool)
    going: Shaped[ndarray, " C"] = np.ones(len(counts), dtype=bool)
    for k in range(MOST):
        low, left = left & (MORE - 1), left >> BITS
        more = left != np.where(low & (MORE >> 1), -1, 0)
        text[:, k], used[:, k] = FIRST + low + MORE * more, going
        going = going & more
    until = np.cumsum(used.sum(axis=1))[ending - 1].tolist()
    whole = text[used].tobytes().decode("ascii")
    return [whole[start:end] for start, end in zip([0, *until], until, strict=False)]
