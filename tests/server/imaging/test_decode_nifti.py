import contextlib
import gzip
import io
import logging
import struct
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.testing import data_path

from server.arrays import Volume
from server.errors import TooLarge, UnetppError, Unreadable
from server.imaging import streaming as room
from tests.server.imaging.conftest import input_header, nifti, read
from tests.support.memory import memory_stays_below

REAL = [
    np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64, np.float32, np.float64, np.longdouble,
]  # fmt: skip
KEPT = (np.uint8, np.uint16, np.int16)
TURNED = np.array([[0, 0, 2, -5], [-1.5, 0, 0, 7], [0, 3, 0, 11], [0, 0, 0, 1.0]])


def voxels(data: bytes, **choices: bool) -> np.ndarray:
    volume = read(data, **choices)
    assert isinstance(volume, Volume)
    values = volume.voxels
    assert values.dtype in (np.uint8, np.uint16, np.int16, np.float32)
    assert values.dtype.isnative
    assert np.isfinite(values).all()
    measured = input_header(data)
    assert (measured.kind, measured.size) == ("volume", volume.size)
    assert (measured.channels, measured.sample_bytes) == (values.shape[3], values.itemsize)
    assert np.array_equal(measured.affine, volume.affine)
    assert values.shape[3] == 1
    return values[..., 0]


def by_nibabel(data: bytes) -> nib.Nifti1Image:
    kind = nib.Nifti2Image if struct.unpack("<i", data[:4])[0] in (540, 540 << 16) or b"n+2" in data[:8] else nib.Nifti1Image
    return kind.from_bytes(data)


@pytest.fixture
def values(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(-1000, 1000, (4, 5, 6), dtype=np.int16)


class TestValues:
    @pytest.mark.parametrize("dtype", REAL)
    @pytest.mark.parametrize("order", "<>")
    @pytest.mark.parametrize("version", [1, 2])
    @pytest.mark.parametrize("zipped", [False, True])
    def test_are_nibabels(self, rng: np.random.Generator, dtype: type, order: str, version: int, zipped: bool) -> None:
        if np.issubdtype(dtype, np.integer):
            span = np.iinfo(dtype)
            stored = rng.integers(span.min, span.max, (4, 5, 6), dtype=dtype, endpoint=True)
        else:
            stored = (rng.normal(0, 1e4, (4, 5, 6))).astype(dtype)
        try:
            data = nifti(stored, TURNED, version=version, order=order)
        except nib.spatialimages.HeaderDataError:
            pytest.skip("nibabel cannot hold this type on this machine")
        decoded = voxels(gzip.compress(data) if zipped else data)
        assert decoded.dtype == (dtype if dtype in KEPT else np.float32)
        assert np.array_equal(decoded, stored.astype(decoded.dtype))
        assert np.array_equal(decoded, np.asanyarray(by_nibabel(data).dataobj).astype(decoded.dtype))

    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64, np.float32, np.float64])
    @pytest.mark.parametrize("order", "<>")
    @pytest.mark.parametrize("scaling", [(2, 0), (1, -1024), (0.37, 11.5), (-1, 0), (1e-4, 0)])
    def test_slope_and_intercept_are_applied(
        self, rng: np.random.Generator, dtype: type, order: str, scaling: tuple[float, float]
    ) -> None:
        data = nifti(rng.integers(0, 200, (4, 5, 6)).astype(dtype), TURNED, order=order, scl_slope=scaling[0], scl_inter=scaling[1])
        decoded = voxels(data)
        assert decoded.dtype == np.float32
        assert np.array_equal(decoded, by_nibabel(data).get_fdata().astype(np.float32))

    @pytest.mark.parametrize("slope", [0, np.nan, np.inf, -np.inf])
    def test_no_slope_is_no_scaling(self, values: np.ndarray, slope: float) -> None:
        decoded = voxels(nifti(values, TURNED, scl_slope=slope, scl_inter=7))
        assert decoded.dtype == np.int16
        assert np.array_equal(decoded, values)

    def test_that_come_in_several_blocks(self, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(room, "BLOCK", 64)
        for dtype in (np.uint8, np.float64):
            stored = rng.integers(0, 200, (5, 7, 9)).astype(dtype)
            data = nifti(stored, TURNED)
            assert np.array_equal(voxels(data), stored)
            assert np.array_equal(voxels(gzip.compress(data)), stored)
            with pytest.raises(Unreadable, match="in the middle of its voxels"):
                read(data[:-1])

    def test_at_any_offset(self, values: np.ndarray) -> None:
        data = nifti(values, TURNED)
        for offset in (353, 368, 100_000):
            moved = nifti(values, TURNED, vox_offset=offset)[:352].ljust(offset, b"\0") + data[352:]
            assert np.array_equal(voxels(moved), values)
        assert np.array_equal(voxels(nifti(values, TURNED, vox_offset=0)), values)

    @pytest.mark.parametrize(("bad", "count"), [([np.nan], "1"), ([np.inf, -np.inf, np.nan], "3")])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_that_are_not_finite_are_counted(self, bad: list[float], count: str, dtype: type) -> None:
        stored = np.ones((4, 5, 6), dtype=dtype)
        stored.flat[: len(bad)] = bad
        with pytest.raises(Unreadable, match=f"^{count} of 120 values are not finite.*add nonfinite=zero"):
            read(nifti(stored, TURNED))
        volume = read(nifti(stored, TURNED), zero_nonfinite=True)
        assert volume.note == f"{count} values that are not finite were read as 0"
        assert np.array_equal(volume.voxels[..., 0], np.where(np.isfinite(stored), stored, 0))

    def test_too_large_for_float32_are_not_finite(self) -> None:
        with pytest.raises(Unreadable, match="24 of 24 values are not finite"):
            read(nifti(np.full((2, 3, 4), 1e300), TURNED))
        with pytest.raises(Unreadable, match="24 of 24 values are not finite"):
            read(nifti(np.full((2, 3, 4), 1000, dtype=np.int16), TURNED, scl_slope=3e38))

    def test_notes_are_joined(self) -> None:
        note = read(nifti(np.full((2, 3, 4), np.nan, dtype=np.float32)), zero_nonfinite=True).note
        assert note.startswith("24 values that are not finite were read as 0; the header gives no orientation")


class TestShape:
    @pytest.mark.parametrize(
        "shape", [(4, 5), (4, 5, 1), (1, 5, 6), (1, 1, 1), (4, 5, 6, 1), (4, 5, 6, 1, 1), (4, 5, 6, 1, 1, 1, 1)]
    )
    @pytest.mark.parametrize("version", [1, 2])
    def test_one_volume(self, rng: np.random.Generator, shape: tuple[int, ...], version: int) -> None:
        stored = rng.integers(0, 9, shape, dtype=np.uint8)
        decoded = voxels(nifti(stored, TURNED, version=version))
        assert decoded.shape == (*shape, 1)[:3]
        assert np.array_equal(decoded.ravel(), stored.ravel())

    @pytest.mark.parametrize("shape", [(4, 5, 6, 2), (4, 5, 6, 1, 3), (4, 5, 1, 2), (7,), (2, 2, 2, 1, 1, 1, 2)])
    def test_several_volumes_or_a_line(self, shape: tuple[int, ...]) -> None:
        data = nifti(np.zeros(shape, dtype=np.uint8), TURNED)
        shown = " × ".join(map(str, shape))
        for attempt in (read, input_header):
            with pytest.raises(Unreadable, match=f"the file has {shown} values: one volume of three dimensions"):
                attempt(data)

    @pytest.mark.parametrize("shape", [(), (0, 5, 6), (4, 5, 0), (4, 5, 6, 0), (-3, 5, 6)])
    def test_no_voxels(self, shape: tuple[int, ...]) -> None:
        dim = [len(shape), *shape, *[1] * (7 - len(shape))]
        for attempt in (read, input_header):
            with pytest.raises(Unreadable, match=r"no voxels|without axes"):
                attempt(nifti(np.zeros((4, 5, 6), dtype=np.uint8), TURNED, dim=dim))

    @pytest.mark.parametrize(("version", "side"), [(1, 32767), (2, 2**62)])
    def test_over_the_limit(self, version: int, side: int) -> None:
        data = nifti(np.zeros((2, 2, 2), dtype=np.uint8), TURNED, version=version, dim=[3, side, side, side, 1, 1, 1, 1])
        with memory_stays_below(20), pytest.raises(TooLarge, match=r"voxels; the limit is 100,000,000.*UNETPP_LIMITS__MAX_VOXELS"):
            read(data)
        assert input_header(data).size == (side,) * 3  # judged by what it would cost

    def test_the_limit_is_inclusive(self, values: np.ndarray) -> None:
        data = nifti(values, TURNED)
        assert read(data, voxels=120).size == (4, 5, 6)
        with pytest.raises(TooLarge, match="4 × 5 × 6 = 120 voxels; the limit is 119"):
            read(data, voxels=119)


class TestRefused:
    @pytest.mark.parametrize(
        ("dtype", "why"),
        [
            (np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]), "colours"),
            (np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1"), ("A", "u1")]), "colours"),
            (np.complex64, "complex numbers"), (np.complex128, "complex numbers"),
        ],
    )  # fmt: skip
    def test_voxels_that_are_no_numbers(self, dtype: type, why: str) -> None:
        data = nifti(np.zeros((2, 3, 4), dtype=dtype), TURNED)
        for attempt in (read, input_header):
            with pytest.raises(Unreadable, match=f"the voxels are {why}; send one real number per voxel"):
                attempt(data)

    @pytest.mark.parametrize("code", [0, 1, 3, 255, -1, 32767])
    def test_types_that_do_not_exist(self, values: np.ndarray, code: int) -> None:
        with pytest.raises(Unreadable, match=f"header is not sound: data code {code}"):
            read(nifti(values, TURNED, datatype=code))

    @pytest.mark.parametrize("version", [1, 2])
    @pytest.mark.parametrize("order", "<>")
    def test_half_of_a_pair(self, values: np.ndarray, version: int, order: str) -> None:
        data = nifti(values, TURNED, version=version, order=order, magic=b"ni1" if version == 1 else b"ni2\0\r\n\x1a\n")
        for attempt in (data, data[: 348 if version == 1 else 540], gzip.compress(data)):
            with pytest.raises(Unreadable, match=r"the \.hdr half of a \.hdr/\.img pair"):
                read(attempt)

    @pytest.mark.parametrize("kind", [nib.AnalyzeHeader, nib.Spm99AnalyzeHeader, nib.Spm2AnalyzeHeader])
    @pytest.mark.parametrize("order", "<>")
    def test_analyze(self, kind: type[nib.AnalyzeHeader], order: str) -> None:
        header = kind(endianness=order)
        header.set_data_shape((2, 3, 4))
        with pytest.raises(Unreadable, match="ANALYZE"):
            read(header.binaryblock + bytes(100))

    @pytest.mark.parametrize(
        "inside", [b"hello, this is no volume", b"\x89PNG\r\n\x1a\n" + bytes(400), bytes(1000), b"\x5c\x01\0\x01" * 99]
    )
    def test_gzip_of_something_else(self, inside: bytes) -> None:
        with pytest.raises(Unreadable, match="without a NIfTI header"):
            read(gzip.compress(inside))

    def test_gzip_of_gzip(self, values: np.ndarray) -> None:
        with pytest.raises(Unreadable, match="without a NIfTI header"):
            read(gzip.compress(gzip.compress(nifti(values, TURNED))))

    @pytest.mark.parametrize("data", [b"\x1f\x8b", b"\x1f\x8b\x08" + bytes(30), gzip.compress(b""), gzip.compress(b"\x5c\x01")])
    def test_gzip_of_nothing(self, data: bytes) -> None:
        with pytest.raises(Unreadable, match="truncated"):
            read(data)

    @pytest.mark.parametrize("offset", [-1, 1, 347, 348, 351, np.nan, np.inf, -np.inf, -1e30])
    def test_voxels_inside_of_the_header(self, values: np.ndarray, offset: float) -> None:
        with pytest.raises(Unreadable, match=r"voxels begin at byte|vox offset"):
            read(nifti(values, TURNED, vox_offset=offset))

    @pytest.mark.parametrize("offset", [1e9, 1e30, 16 * 1024 * 1024 + 16])
    def test_voxels_after_endless_extensions(self, values: np.ndarray, offset: float) -> None:
        with memory_stays_below(20), pytest.raises(TooLarge, match="bytes of header; 16,777,216 are read"):
            read(nifti(values, TURNED, vox_offset=offset))
        with memory_stays_below(20), pytest.raises(TooLarge, match="bytes of header; 16,777,216 are read"):
            read(nifti(values, TURNED, version=2, vox_offset=2**62))


class TestExtensions:
    def extended(self, values: np.ndarray, block: bytes, order: str = "<") -> bytes:
        plain = nifti(values, TURNED, order=order, vox_offset=352 + len(block))
        return plain[:348] + b"\1\0\0\0" + block + plain[352:]

    @pytest.mark.parametrize("code", [0, 2, 4, 6, 30, 32, 44, 9999])
    @pytest.mark.parametrize("order", "<>")
    def test_of_any_content_do_no_harm(self, values: np.ndarray, code: int, order: str) -> None:
        data = self.extended(values, struct.pack(f"{order}ii", 32, code) + b"\xff<garbage \x01\0 &&&&&&&&".ljust(24, b"&"), order)
        assert np.array_equal(voxels(data), values)
        assert len(read(data).header.extensions) == 1

    @pytest.mark.filterwarnings("ignore:Extension size is not a multiple")
    @pytest.mark.parametrize("size", [0, -1, -8, 7, 2**31 - 1, -(2**31), 48])
    def test_of_a_wrong_size(self, values: np.ndarray, size: int) -> None:
        with pytest.raises(Unreadable, match=r"header is not sound: failed to read extension|damaged"):
            read(self.extended(values, struct.pack("<ii", size, 4) + bytes(24)))

    def test_that_contain_bombs_are_not_opened(self, values: np.ndarray) -> None:
        laughs = b"".join(b'<!ENTITY %c "%s">' % (98 + k, b"&%c;" % (97 + k) * 10) for k in range(9))
        xml = b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">' + laughs + b']><CIFTI Version="2">&j;</CIFTI>'
        xml += b" " * (-(len(xml) + 8) % 16)
        with memory_stays_below(20):
            assert np.array_equal(voxels(self.extended(values, struct.pack("<ii", len(xml) + 8, 32) + xml)), values)

    @pytest.mark.parametrize("size", [8, 16])
    @pytest.mark.parametrize("orders", ["<<", ">>", "<>", "><"])
    def test_in_great_numbers(self, values: np.ndarray, size: int, orders: str) -> None:
        """A file of 30 kB that would take seconds and hundreds of megabytes, also where its fields disagree on the byte order."""
        block = (struct.pack(f"{orders[1]}ii", size, 4) + bytes(size - 8)) * (900_000 // (size // 8))
        data = self.extended(values, block, orders[1])
        data = struct.pack(f"{orders[0]}i", 348) + data[4:]
        with memory_stays_below(60), pytest.raises(TooLarge, match="more than 1,000 extensions"):
            read(gzip.compress(data, 1))


class TestPlace:
    def placed(self, **fields: object) -> Volume:
        data = nifti(np.zeros((4, 5, 6), dtype=np.uint8), TURNED, **fields)
        volume = read(data)
        assert isinstance(volume, Volume)
        assert np.array_equal(input_header(data).affine, volume.affine)
        return volume

    @pytest.mark.parametrize(("qform_code", "sform_code"), [(1, 0), (0, 1), (1, 1), (0, 4), (3, 2)])
    def test_one_code_is_enough(self, qform_code: int, sform_code: int) -> None:
        volume = self.placed(qform_code=qform_code, sform_code=sform_code)
        assert np.allclose(volume.affine, TURNED, atol=1e-5)
        assert volume.note == ""

    def test_neither_code(self) -> None:
        volume = self.placed(qform_code=0, sform_code=0)
        assert np.array_equal(volume.affine, volume.header.get_base_affine())
        assert nib.aff2axcodes(volume.affine) == ("L", "A", "S")
        assert volume.note == "the header gives no orientation; axes were taken as left, anterior, superior"

    def test_the_sform_wins_where_they_disagree(self) -> None:
        volume = self.placed(qoffset_x=5.0)
        assert np.array_equal(volume.affine, TURNED)
        assert volume.note == "sform and qform lie up to 10 mm apart; the sform was used"
        assert self.placed(qoffset_x=-5.01).note == ""

    @pytest.mark.parametrize("quatern", [2.0, np.nan])
    def test_a_broken_qform_behind_a_good_sform(self, quatern: float) -> None:
        volume = self.placed(quatern_b=quatern)
        assert np.array_equal(volume.affine, TURNED)
        assert "the sform was used" in volume.note

    def test_a_broken_qform_alone(self) -> None:
        with pytest.raises(Unreadable, match="qform is no rotation"):
            self.placed(sform_code=0, quatern_b=2.0)
        with pytest.raises(Unreadable, match="not finite"):
            self.placed(sform_code=0, quatern_b=np.nan)

    @pytest.mark.parametrize(("unit", "scale"), [(0, 1), (1, 1000), (2, 1), (3, 0.001), (10, 1), (7, 1)])
    def test_units(self, unit: int, scale: float) -> None:
        linear = TURNED[:3] / scale
        rows = {f"srow_{axis}": row for axis, row in zip("xyz", linear, strict=True)}
        volume = self.placed(xyzt_units=unit, qform_code=0, **rows)
        assert np.allclose(volume.affine, TURNED, rtol=1e-6)

    @pytest.mark.parametrize("step", [0, 1e-5, 101, 1e30])
    def test_absurd_spacing(self, step: float) -> None:
        with pytest.raises(Unreadable, match=r"mm apart; between 0\.0001 and 100 mm is read"):
            self.placed(srow_x=[0, 0, step, 0])

    def test_absurd_spacing_in_double_precision(self) -> None:
        data = nifti(np.zeros((4, 5, 6), dtype=np.uint8), TURNED, version=2, srow_x=[0, 0, 1e300, 0])
        with pytest.raises(Unreadable, match="inf mm apart"):
            read(data)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("where", range(4))
    def test_not_finite(self, bad: float, where: int) -> None:
        row = [0, 0, 2.0, 0]
        row[where] = bad
        with pytest.raises(Unreadable, match="affine holds values that are not finite"):
            self.placed(srow_x=row)

    def test_flat(self) -> None:
        with pytest.raises(Unreadable, match="two axes point the same way"):
            self.placed(srow_x=[1, 1, 0, 0], srow_y=[1, 1, 0, 0], srow_z=[0, 0, 1, 0])

    def test_a_gantrys_shear_is_read(self) -> None:
        volume = self.placed(srow_x=[2, 0, 0, 0], srow_y=[0, 2, 1, 0], srow_z=[0, 0, 4, 0], qform_code=0)
        assert volume.affine[1, 2] == 1


class TestDamage:
    PLAIN = nifti(np.arange(600, dtype=np.int16).reshape(10, 10, 6), TURNED)
    ZIPPED = gzip.compress(PLAIN)

    @pytest.mark.parametrize("data", [PLAIN, ZIPPED, nifti(np.zeros((5, 5, 5)), TURNED, version=2)], ids=["plain", "gz", "2"])
    def test_every_truncation_is_refused(self, data: bytes) -> None:
        for length in range(len(data)):
            with pytest.raises(UnetppError):
                read(data[:length])

    @given(st.floats(0, 1, exclude_max=True), st.booleans(), st.integers(0, 9))
    @settings(deadline=None)
    def test_a_cut_is_told(self, where: float, zipped: bool, seed: int) -> None:
        values = np.random.default_rng(seed).integers(0, 2000, (40, 40, 40), dtype=np.uint16)
        data = gzip.compress(nifti(values, TURNED), 1) if zipped else nifti(values, TURNED)
        # The first bytes are needed to know the kind of file.
        with pytest.raises(
            Unreadable, match=r"the file ends in the middle of its (header|voxels) \(truncated\?\)|truncated or damaged"
        ):
            read(data[: 4 + int(where * (len(data) - 4))])

    def test_trailing_bytes_of_a_plain_file_are_ignored(self) -> None:
        assert np.array_equal(voxels(self.PLAIN + b"garbage" * 99), voxels(self.PLAIN))

    def test_trailing_bytes_in_a_gzip_file(self) -> None:
        longer = gzip.compress(self.PLAIN + b"garbage" * 99)
        assert np.array_equal(voxels(longer), voxels(self.PLAIN))
        # Tape blocks are padded with zeros.
        assert np.array_equal(voxels(self.ZIPPED + bytes(100)), voxels(self.PLAIN))
        with pytest.raises(Unreadable, match="truncated or damaged"):
            read(self.ZIPPED + b"garbage" * 99)

    def test_gzip_in_members(self) -> None:
        members = b"".join(gzip.compress(self.PLAIN[first : first + 100]) for first in range(0, len(self.PLAIN), 100))
        assert np.array_equal(voxels(members), voxels(self.PLAIN))

    def test_gzip_with_a_name_and_a_comment(self) -> None:
        flagged = self.ZIPPED[:3] + b"\x18" + self.ZIPPED[4:10] + b"volume.nii\0a comment\0" + self.ZIPPED[10:]
        assert np.array_equal(voxels(flagged), voxels(self.PLAIN))

    @pytest.mark.parametrize("field", [range(-8, -4), range(-4, 0)], ids=["checksum", "length"])
    def test_a_wrong_checksum(self, field: range) -> None:
        for at in field:
            data = bytearray(self.ZIPPED)
            data[at] ^= 1
            with pytest.raises(Unreadable, match="truncated or damaged"):
                read(bytes(data))

    def test_a_wrong_checksum_behind_many_voxels(self, rng: np.random.Generator) -> None:
        """Behind all voxels it is read only if asked for."""
        data = bytearray(gzip.compress(nifti(rng.integers(0, 9999, (100, 100, 100), dtype=np.uint16), TURNED), 1))
        data[-8] ^= 1
        with pytest.raises(Unreadable, match="truncated or damaged"):
            read(bytes(data))
        with pytest.raises(Unreadable, match="truncated"):
            read(bytes(data[:-8]))

    @settings(max_examples=300, deadline=None)
    @pytest.mark.filterwarnings("ignore:Extension size is not a multiple")
    @given(st.booleans(), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))
    def test_changed_bytes_never_crash(self, zipped: bool, changes: list[tuple[float, int]]) -> None:
        data = bytearray(self.PLAIN[:500])
        for where, value in changes:
            data[int(where * 356)] = value
        with contextlib.suppress(UnetppError):
            read(gzip.compress(bytes(data)) if zipped else bytes(data), voxels=1_000_000)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=3))
    def test_changed_bytes_of_a_gzip_stream_are_noticed(self, changes: list[tuple[float, int]]) -> None:
        data = bytearray(self.ZIPPED)
        for where, value in changes:
            data[int(where * (len(data) - 1))] = value
        with contextlib.suppress(UnetppError):
            assert np.array_equal(read(bytes(data)).voxels[..., 0], voxels(self.PLAIN))

    def test_nibabel_stays_silent(self, values: np.ndarray, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture) -> None:
        with caplog.at_level(logging.DEBUG):
            read(nifti(values, TURNED, pixdim=[0, -1, 0, 2, 1, 1, 1, 1], qform_code=77))
        assert not caplog.records
        assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def rest() -> bytes:
    """Zeros without end, as the second member of a gzip file."""
    packer, zeros = zlib.compressobj(1, zlib.DEFLATED, 31), bytes(10**6)
    return b"".join(packer.compress(zeros) for _ in range(3000)) + packer.flush()


class TestBombs:
    """Files of 13 MB that inflate to 3 GB."""

    @pytest.fixture
    def zeros(self) -> np.ndarray:
        return np.zeros((20, 20, 20), dtype=np.uint8)

    def test_is_inflated_no_further_than_its_header_promises(self, zeros: np.ndarray, rest: bytes) -> None:
        with memory_stays_below(60):
            assert not voxels(gzip.compress(nifti(zeros, TURNED)) + rest).any()

    def test_of_more_voxels_than_the_limit(self, zeros: np.ndarray, rest: bytes) -> None:
        data = gzip.compress(nifti(zeros, TURNED, dim=[3, 1500, 1500, 1300, 1, 1, 1, 1])) + rest
        with memory_stays_below(60), pytest.raises(TooLarge):
            read(data)

    def test_of_as_many_voxels_as_the_limit(self, zeros: np.ndarray, rest: bytes) -> None:
        """Doubles: 800 MB in the stream, of which float32 is kept."""
        side = 464
        data = gzip.compress(nifti(zeros, TURNED, dim=[3, side, side, side, 1, 1, 1, 1], datatype=64, bitpix=64)[:352]) + rest
        with memory_stays_below(4e-6 * side**3 + 80):
            assert read(data).size == (side, side, side)

    def test_without_a_header(self, rest: bytes) -> None:
        with memory_stays_below(20), pytest.raises(Unreadable, match="without a NIfTI header"):
            read(rest)

    def test_that_ends_early_takes_no_memory_in_advance(self, zeros: np.ndarray) -> None:
        data = nifti(zeros, TURNED, dim=[3, 464, 464, 464, 1, 1, 1, 1], datatype=64, bitpix=64)
        for attempt in (data, gzip.compress(data)):
            with memory_stays_below(40), pytest.raises(Unreadable, match="in the middle of its voxels"):
                read(attempt)

    def test_of_header(self, zeros: np.ndarray, rest: bytes) -> None:
        data = gzip.compress(nifti(zeros, TURNED, vox_offset=3e9)[:352]) + rest
        with memory_stays_below(20), pytest.raises(TooLarge, match="bytes of header"):
            read(data)


@pytest.mark.filterwarnings("ignore")  # decoders warn about what they tolerate
@pytest.mark.parametrize("family", ["go-fuzz", "image-png", "image-rs", "libpng", "nibabel", "nifti-rs", "pillow"])
def test_bad_inputs_raise_nothing_but_our_own(bad_inputs: Path, family: str) -> None:
    files = sorted(path for path in (bad_inputs / family).rglob("*") if path.is_file())
    assert files
    with memory_stays_below(700):
        for path in files:
            data = path.read_bytes()
            for variant in (data, gzip.compress(data, 1)):
                with contextlib.suppress(UnetppError):
                    read(variant, limit=20_000_000, voxels=20_000_000, zero_nonfinite=True)
                with contextlib.suppress(UnetppError):
                    input_header(variant)


def agrees_with_nibabel(path: Path) -> None:
    image = nib.load(path)
    data = path.read_bytes()
    volume = read(data, zero_nonfinite=True)
    assert isinstance(volume, Volume)
    assert np.array_equal(volume.affine, image.affine)
    wanted = np.nan_to_num(image.get_fdata(dtype=np.float32)).reshape(volume.size)
    assert np.array_equal(volume.voxels[..., 0], wanted)
    plain = gzip.decompress(data) if path.suffix == ".gz" else data
    # As it lies in the file (nibabel empties some fields of an image's header), but for a qfac of 0, which means 1.
    stored = volume.header.from_fileobj(io.BytesIO(plain), check=False)
    stored["pixdim"][0] = stored["pixdim"][0] or 1
    assert volume.header.binaryblock == stored.binaryblock


@pytest.mark.parametrize(
    "name",
    ["brain_t1_full", "brain_t1_full_tissues", "ct_body_3mm", "ct_spleen_anisotropic", "ct_spleen_anisotropic_mask", "spine_t2_psr", "us_prostate"],
)  # fmt: skip
def test_real_volumes_are_read_as_nibabel_reads_them(volumes: Path, name: str) -> None:
    agrees_with_nibabel(volumes / f"{name}.nii.gz")


SHIPPED = [path for path in sorted(Path(data_path).iterdir()) if path.name.endswith((".nii", ".nii.gz"))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_nibabels_own_files(path: Path) -> None:
    shape = tuple(nib.load(path).header.get_data_shape()) if "dconn" not in path.name else (1, 1, 1, 1, 10, 10)
    if max((*shape[3:], 1)) > 1:
        with pytest.raises(Unreadable, match="one volume of three dimensions"):
            read(path.read_bytes())
        return
    agrees_with_nibabel(path)


def test_nibabel_ships_files_of_both_kinds() -> None:
    assert {"anatomical.nii", "functional.nii", "example4d.nii.gz", "example_nifti2.nii.gz"} <= {path.name for path in SHIPPED}


def test_one_of_several_volumes_reads_as_nibabel_reads_it(tmp_path: Path) -> None:
    image = nib.load(Path(data_path) / "example4d.nii.gz").slicer[..., :1]
    nib.save(image, tmp_path / "one.nii.gz")
    agrees_with_nibabel(tmp_path / "one.nii.gz")
