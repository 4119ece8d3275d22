"""Real values of DICOM frames: rescaled (Hounsfield units of CT), upright in brightness, without padding, in colours."""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from server.errors import Unreadable
from server.imaging.decode_options import DecodeOptions, nonfinite_note, zero_nonfinite
from server.imaging.dicom_codecs import Pixels
from server.imaging.dicom_files import DOUBLE_PIXELS, FLOAT_PIXELS, Instance
from server.imaging.dicom_frames import Frame, PixelFormat
from server.imaging.dicom_pixels import PALETTE
from server.imaging.dicom_stream import FORMAT
from server.imaging.streaming import EXACT_DTYPES

# Entries of a palette.
MAX_PALETTE = 65536
# Whole numbers that single precision holds exactly.
EXACT_FLOAT = 2**24


def decoded_type(
    instance: Instance, form: PixelFormat, frames: Sequence[Frame], options: DecodeOptions
) -> "np.dtype[np.generic]":
    """Returns the type of decoded values: the smallest that holds all possible ones exactly, else float32."""
    if form.samples == 3 or (form.photometric == PALETTE and not options.labels):
        return np.dtype(np.uint16 if form.samples == 3 and form.allocated == 16 else np.uint8)
    if instance.pixels.tag in (FLOAT_PIXELS, DOUBLE_PIXELS) or form.modality_lut:
        return np.dtype(np.float32)
    low, high = form.limits
    if options.labels:
        return np.dtype(f"{'i' if form.signed else 'u'}{max(1, form.allocated // 8)}")
    scalings = {(frame.slope, frame.intercept) for frame in frames}
    if not all(slope.is_integer() and intercept.is_integer() for slope, intercept in scalings):
        return np.dtype(np.float32)
    ends = [slope * end + intercept for slope, intercept in scalings for end in (low, high)]
    for name in EXACT_DTYPES:
        if np.iinfo(name).min <= min(ends) and max(ends) <= np.iinfo(name).max:
            return np.dtype(name)
    return np.dtype(np.float32)


class Values:
    """Turns stored into real values, frame by frame, into an array that the caller owns.

    Args:
        form: Format that holds the pixels of all instances.
        options: Choices.
        instance: Instance whose palette or table holds for all.

    Attributes:
        note: What was done to the values, complete after `finish`.
    """

    def __init__(self, form: PixelFormat, options: DecodeOptions, instance: Instance) -> None:
        self._inverted = False
        self._options = options
        self._table = (
            _palette(instance.dataset) if form.photometric == PALETTE and not options.labels else None
        )
        self._lowest, self._highest = math.inf, -math.inf
        self._padded: list[tuple[Any, Any, Any, int]] = []
        self._nonfinite = self._total = 0
        self.note = ""

    def convert(self, stored: Pixels, frame: Frame, instance: Instance, form: PixelFormat, out: Any) -> None:
        """Writes the values of a frame, whose instance has that format, to `out`, (rows, columns, channels)."""
        self._total += out.size
        self._inverted |= form.inverted
        if self._table is not None:
            start, colors = self._table
            out[:] = colors[np.clip(stored.astype(np.int64) - start, 0, len(colors) - 1)]
        elif stored.ndim == 3:
            out[:] = (
                stored
                if stored.dtype.itemsize <= out.dtype.itemsize
                else cast("Any", stored) >> (form.bits - 8)
            )
        elif self._options.labels:
            out[..., 0] = stored
        else:
            self._grey(stored, frame, instance.dataset, form, out[..., 0])

    def finish(self) -> None:
        """Gives padding beyond all other values the lowest of these; in between it may be a real value.

        Raises:
            Unreadable: Values are not finite and the caller does not allow their replacement.
        """
        padding = 0
        for out, low, high, count in self._padded:
            if math.isfinite(self._lowest) and (high < self._lowest or low > self._highest):
                out[(out >= low) & (out <= high)] = self._lowest
                padding += count
        notes = [nonfinite_note(self._nonfinite, self._total, self._options.zero_nonfinite)]
        if padding:
            notes.append(
                f"{padding:,} values of padding were read as {self._lowest:g}, the lowest other value"
            )
        if self._inverted:
            notes.append("MONOCHROME1 was inverted, so that high values are bright")
        self.note = "; ".join(note for note in notes if note)

    def _grey(self, stored: Pixels, frame: Frame, dataset: Any, form: PixelFormat, out: Any) -> None:
        if form.modality_lut:
            from pydicom.pixels.processing import apply_modality_lut

            out[:] = apply_modality_lut(cast("Any", stored), dataset)
        else:
            scale(stored, *self._scaling(frame, form), out)
        if out.dtype.kind == "f" and stored.dtype.kind == "f":
            self._nonfinite += zero_nonfinite(out)
        self._find_padding(stored, frame, dataset, form, out)

    @staticmethod
    def _scaling(frame: Frame, form: PixelFormat) -> tuple[float, float]:
        """Returns slope and intercept, which also invert MONOCHROME1."""
        if not form.inverted or form.modality_lut:
            return frame.slope, frame.intercept
        low, high = form.limits
        return -frame.slope, frame.intercept + frame.slope * (low + high)

    def _find_padding(self, stored: Pixels, frame: Frame, dataset: Any, form: PixelFormat, out: Any) -> None:
        """Remembers a frame with padding, whose value is known when all frames are decoded."""
        padding = dataset.get("PixelPaddingValue")
        if not isinstance(padding, int) or form.modality_lut:
            return
        other = dataset.get("PixelPaddingRangeLimit")
        ends = sorted((padding, other if isinstance(other, int) else padding))
        if form.signed:
            # Old files give the padding of signed values as an unsigned number, of all bits or of those that are used.
            for wrap in (1 << form.allocated, 1 << form.bits):
                ends = sorted(end - wrap if end >= wrap // 2 else end for end in ends)
        mask = (cast("Any", stored) >= ends[0]) & (cast("Any", stored) <= ends[1])
        count = int(np.count_nonzero(mask))
        if count < mask.size:
            others = out[~mask] if count else out
            self._lowest = min(self._lowest, float(others.min()))
            self._highest = max(self._highest, float(others.max()))
        if not count:
            return
        slope, intercept = self._scaling(frame, form)
        edges = np.empty(2, out.dtype)
        scale(np.clip(np.array(ends), *form.limits), slope, intercept, edges)
        self._padded.append((out, edges.min(), edges.max(), count))


def scale(stored: Any, slope: float, intercept: float, out: Any) -> None:
    """Writes slope × stored + intercept to `out`, exactly where the result is a whole number that its type holds."""
    if (slope, intercept) == (1.0, 0.0):
        np.copyto(out, stored, casting="unsafe")
    elif out.dtype.kind != "f":
        # Whole numbers wrap around, so that the result is right wherever it fits.
        np.multiply(
            stored, int(slope), out=out, dtype=np.int64, casting="unsafe"
        ) if slope != 1 else np.copyto(out, stored, casting="unsafe")
        with np.errstate(over="ignore"):
            out += np.int64(intercept).astype(out.dtype)
    elif (
        slope == 1.0
        and intercept.is_integer()
        and stored.dtype.itemsize <= 2
        and abs(intercept) < EXACT_FLOAT // 2
    ):
        np.add(stored, np.float32(intercept), out=out, dtype=np.float32, casting="unsafe")
    else:
        np.copyto(out, stored.astype(np.float64) * slope + intercept, casting="unsafe")


def _palette(dataset: Any) -> tuple[int, Any]:
    """Returns the first stored value of a palette, and its (N, 3) colours of eight bits.

    Raises:
        Unreadable: The palette is missing or too long.
    """
    channels = []
    first = 0
    for color in ("Red", "Green", "Blue"):
        count, first, bits = (int(n) for n in dataset[f"{color}PaletteColorLookupTableDescriptor"].value)
        count = count or MAX_PALETTE
        name = f"Segmented{color}PaletteColorLookupTableData"
        plain = dataset.get(f"{color}PaletteColorLookupTableData")
        order = "<" if dataset.original_encoding[1] else ">"
        if plain is not None:
            wide = len(plain) >= 2 * count
            entries = np.frombuffer(plain[: count * (2 if wide else 1)], f"{order}u2" if wide else "u1")
        else:
            entries = _expand(np.frombuffer(dataset[name].value, f"{order}u2" if bits > 8 else "u1"))
            wide = bits > 8
        if len(entries) < count:
            raise Unreadable(
                f"the {color.lower()} palette has {len(entries)} of {count} entries; save the file again",
                reason="palette",
                format=FORMAT,
                limit=count,
                actual=len(entries),
            )
        channels.append((entries[:count], wide))
    # Entries of 16 bits whose values have eight are written by some devices, for all three colours.
    deep = max(int(entries.max(initial=0)) for entries, _ in channels) > 255
    shortest = min(len(entries) for entries, _ in channels)
    colors = [
        (entries[:shortest] >> 8 if wide and deep else entries[:shortest]) for entries, wide in channels
    ]
    return first, np.stack([color.astype(np.uint8) for color in colors], axis=-1)


def _expand(data: Any) -> Any:
    """Expands a segmented palette: discrete values (0), and straight lines from the last value (1).

    Raises:
        Unreadable: It has other segments, or too many entries.
    """
    parts, at, total, last = [], 0, 0, 0
    values = data.astype(np.int64)
    while at + 2 < len(values) + 1 and at + 1 < len(values):
        kind, length = int(values[at]), int(values[at + 1])
        total += length
        if kind not in (0, 1) or total > MAX_PALETTE:
            raise Unreadable(
                "the segmented palette is of a kind that is not read; save the file as RGB",
                reason="palette",
                format=FORMAT,
            )
        if kind == 0:
            part = values[at + 2 : at + 2 + length]
            at += 2 + length
        else:
            part = np.rint(np.linspace(last, int(values[at + 2]), length + 1)[1:]).astype(np.int64)
            at += 3
        if len(part):
            last = int(part[-1])
            parts.append(part)
    return np.concatenate(parts).astype(data.dtype) if parts else data[:0]
