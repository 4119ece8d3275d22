import asyncio
import contextlib
import gc
import io
import json
import math
import random
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import pytest
from server.runtime.line import Caller
from server.segment.cost import Estimate
from server.segment.pipeline import Segmenter

from server.arrays import Tiles
from server.errors import (
    CallerError,
    DeadlinePassed,
    DeadlineTooShort,
    InferenceFailed,
    InvalidParameter,
    Overloaded,
    TooLarge,
    UnknownFormat,
    Unreadable,
    UnsupportedType,
)
from server.segment import archive
from server.segment.request import Answer, Archived, SegmentRequest, Terms
from server.settings import LimitsSettings
from tests.server.segment.test_pipeline import segmenting
from tests.support.files import Sent, mask_of, nifti_bytes, pages_bytes, picture_bytes, volume_of
from tests.support.memory import memory_stays_below
from tests.support.service import bright

Files = dict[str, bytes] | list[tuple[str, bytes]]


def packed(files: Files, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip."""
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as made:
        warnings.simplefilter("ignore")  # of two files of one name
        for name, body in files.items() if isinstance(files, dict) else files:
            made.writestr(name, body)
    return out.getvalue()


def picture(value: int = 0, side: int = 16) -> bytes:
    """Bright on its right half, and never the same twice."""
    pixels = np.full((side, side), value, dtype=np.uint8)
    pixels[:, side // 2 :] = 200
    return picture_bytes(pixels)


def answered(data: bytes, *, terms: Terms | None = None, reference: BinaryIO | None = None, run: Any = bright, limits: LimitsSettings | None = None,
             progress: Callable[[str, int, int], None] = lambda *_: None, **wanted: Any) -> tuple[Answer, dict[str, bytes], list[dict[str, Any]]]:  # fmt: skip
    """The answer, its files and the rows of its report."""
    with segmenting(run, limits) as segmenter:
        answer = asyncio.run(archive.segment(segmenter, Sent(data), SegmentRequest(**wanted), reference, progress, terms))
    assert isinstance(answer, Archived)
    with zipfile.ZipFile(io.BytesIO(answer.zip.read())) as made:
        assert made.testzip() is None
        files = {name: made.read(name) for name in made.namelist()}
    answer.close()
    return answer, files, json.loads(files.pop("report.json"))["images"]


def tiny(**changes: Any) -> LimitsSettings:
    return LimitsSettings(**({"max_body_mb": 1, "max_zip_mb": 1} | changes))


class TestAnswers:
    def test_each_image_has_its_own(self) -> None:
        volume = np.zeros((4, 5, 6), dtype=np.uint8)
        volume[2:] = 9
        answer, files, rows = answered(packed({
            "a.png": picture(1), "day 1/b.png": picture(2), "day 1/c.tif": pages_bytes(np.stack([np.eye(8, dtype=np.uint8)] * 3)),
            "d.nii.gz": nifti_bytes(volume),
        }))  # fmt: skip
        assert sorted(files) == ["a_mask.png", "d_mask.nii.gz", "day 1/b_mask.png", "day 1/c_mask.tif"]
        assert mask_of(files["a_mask.png"]).sum() == 128
        assert np.array_equal(volume_of(files["d_mask.nii.gz"]), volume > 3)
        assert [row["name"] for row in rows] == ["a.png", "day 1/b.png", "day 1/c.tif", "d.nii.gz"]
        assert {row["status"] for row in rows} == {"ok"}
        assert rows[0]["files"] == ["a_mask.png"]
        assert (rows[0]["model"], rows[0]["mode"], rows[0]["level"], rows[0]["precision"]) == ("fake", "accurate", 4, "fp32")
        assert {"decode", "infer", "encode"} <= rows[0]["timings_ms"].keys()
        assert (answer.media_type, answer.file, answer.note, answer.quality) == ("application/zip", "masks.zip", "", {})
        assert answer.seconds["infer"] > 0

    def test_are_those_of_the_image_alone(self) -> None:
        _, files, _ = answered(packed({f"{k}.png": picture(k) for k in range(9)}))
        with segmenting() as segmenter:
            for k in range(9):
                alone = asyncio.run(segmenter.segment(Sent(picture(k)), SegmentRequest()))
                assert files[f"{k}_mask.png"] == alone.body

    def test_in_several_formats(self) -> None:
        _, files, rows = answered(packed({"x/a.png": picture()}), format="png,json,npz")
        assert sorted(files) == ["x/a_mask.png", "x/a_scores.npz", "x/a_statistics.json"]
        assert sorted(rows[0]["files"]) == sorted(files)
        assert json.loads(files["x/a_statistics.json"])["model"] == "fake"

    @pytest.mark.parametrize(
        ("names", "stems"),
        [
            (["a.png", "a.bmp", "b"], ["a", "a_2", "b"]),
            # Of which the first three have the same name in a folder of Windows or macOS.
            (["a.png", "A.PNG", "A.tif", "x/a.png"], ["a", "A_2", "A_3", "x/a"]),
            (["a.png", "a.tif", "a.png.png"], ["a", "a_2", "a.png"]),
            # A name that an image has by itself is not given to another.
            (["a.png", "a.tif", "a_2.png", "a.bmp"], ["a", "a_3", "a_2", "a_4"]),
            # One composed, one decomposed.
            (["\u00e9.png", "e\u0301.tif"], ["\u00e9", "e\u0301_2"]),
        ],
    )  # fmt: skip
    def test_have_names_of_their_own(self, names: list[str], stems: list[str]) -> None:
        _, files, rows = answered(packed({name: picture(k, 16 + 2 * k) for k, name in enumerate(names)}), format="png,json")
        assert [row["files"] for row in rows] == [[f"{stem}_mask.png", f"{stem}_statistics.json"] for stem in stems]
        assert [mask_of(files[row["files"][0]]).shape for row in rows] == [(16 + 2 * k,) * 2 for k in range(len(names))]

    def test_lie_in_the_order_of_their_images(self) -> None:
        """The first is done last: it has the most tiles."""
        _, files, _ = answered(packed({f"{k}.png": picture(k, 900 if k == 3 else 16) for k in range(9, 0, -1)}), format="png,json")
        assert list(files) == [f"{k}_{name}" for k in range(9, 0, -1) for name in ("mask.png", "statistics.json")]

    @pytest.mark.parametrize("name", ["./a.png", "x/./a.png", ".\\a.png", "././a.png"])
    def test_of_names_that_begin_here(self, name: str) -> None:
        _, files, rows = answered(packed({name: picture(), "b.png": picture()}))
        assert (len(files), rows[0]["status"]) == (2, "ok")
        assert rows[0]["name"] == name.replace("\\", "/").replace("./", "")

    def test_what_systems_hide_is_left_out(self) -> None:
        _, files, rows = answered(packed({
            "a.png": picture(), "__MACOSX/._a.png": b"x", ".DS_Store": b"x", "b/.git/c.png": picture(), "empty/": b"",
        }))  # fmt: skip
        assert list(files) == ["a_mask.png"]
        assert len(rows) == 1

    def test_of_a_bad_image_are_missing(self) -> None:
        answer, files, rows = answered(packed({
            "good.png": picture(), "text.png": b"hello", "cut.png": picture()[:45], "nothing.png": b"", "inner.zip": packed({"a.png": picture()}),
        }))  # fmt: skip
        assert list(files) == ["good_mask.png"]
        assert [row["status"] for row in rows] == ["ok", *["failed"] * 4]
        assert "not a format that this server reads" in rows[1]["detail"]
        assert "cannot be decoded" in rows[2]["detail"]
        assert "empty" in rows[3]["detail"]
        assert "not a format that this server reads" in rows[4]["detail"]
        assert answer.note == "4 of 5 files could not be segmented; see report.json"

    def test_only_bad_images(self) -> None:
        with pytest.raises(UnsupportedType, match=r"none of the zip's 2 files could be segmented; 'a.txt': not a format"):
            answered(packed({"a.txt": b"hello", "b.txt": b"hello"}))
        with pytest.raises(Unreadable, match=r"none of the zip's 2 files could be segmented; 'a.txt': not a format"):
            answered(packed({"a.txt": b"hello", "b.png": b""}))

    def test_formats_that_do_not_fit_are_each_images_own(self) -> None:
        _, files, rows = answered(
            packed({"a.png": picture(), "b.nii.gz": nifti_bytes(np.zeros((4, 5, 6), np.uint8))}), format="nifti"
        )
        assert list(files) == ["b_mask.nii.gz"]
        assert "does not fit" in rows[0]["detail"]

    def test_stored_or_deflated(self) -> None:
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            assert len(answered(packed({"a.png": picture()}, method))[1]) == 1

    def test_progress_counts_images(self) -> None:
        told: list[tuple[str, int, int]] = []
        answered(packed({f"{k}.png": picture(k) for k in range(7)}), progress=lambda *said: told.append(said))
        assert told == [("decode", 0, 7), *(("infer", k, 7) for k in range(1, 8))]

    def test_share_batches(self) -> None:
        batches: list[int] = []

        def run(tiles: Tiles) -> np.ndarray:
            batches.append(len(tiles))
            return bright(tiles)

        answered(packed({f"{k:02}.png": picture(k, 200) for k in range(12)}), run=run)
        assert max(batches) > 16 // 2

    def test_anything_else_passes(self) -> None:
        with segmenting() as segmenter:
            answer = asyncio.run(archive.segment(segmenter, Sent(picture()), SegmentRequest()))
            assert mask_of(answer.body).sum() == 128
            answer.close()


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("../a.png", "leads out"), ("x/../../a.png", "leads out"), ("/etc/a.png", "leads out"), ("C:\\a.png", "leads out"), ("C:a.png", "leads out"),
            ("..\\a.png", "leads out"), ("a\nb.png", "leads out"), ("a\x1b[2J.png", "leads out"), ("x//a.png", "leads out"), ("a" * 501, "leads out"),
        ],
    )  # fmt: skip
    def test_names_that_lead_elsewhere(self, name: str, why: str) -> None:
        _, files, rows = answered(packed({"good.png": picture(), name: picture()}))
        assert list(files) == ["good_mask.png"]
        assert why in rows[1]["detail"]
        assert len(rows[1]["name"]) <= 500

    def test_no_name(self) -> None:
        """What zipfile never writes: the list names the second file with no letters at all."""
        data = packed({"good.png": picture(), "x": picture()}, zipfile.ZIP_STORED)
        at, end = data.rindex(b"PK\x01\x02"), data.rindex(b"PK\x05\x06")
        size = struct.unpack_from("<I", data, end + 12)[0]
        data = (
            data[: at + 28]
            + bytes(2)
            + data[at + 30 : at + 46]
            + data[at + 47 : end + 12]
            + struct.pack("<I", size - 1)
            + data[end + 16 :]
        )
        _, files, rows = answered(data)
        assert list(files) == ["good_mask.png"]
        assert (rows[1]["name"], rows[1]["status"]) == ("", "failed")
        assert "or is none" in rows[1]["detail"]

    def test_two_of_one_place(self) -> None:
        with pytest.raises(Unreadable, match=r"two files named 'a.png'"):
            answered(packed({"a.png": picture(), "./a.png": picture(3)}))

    def test_windows_folders_are_folders(self) -> None:
        assert list(answered(packed({"x\\a.png": picture()}))[1]) == ["x/a_mask.png"]

    def test_two_of_one_name(self) -> None:
        with pytest.raises(Unreadable, match=r"two files named 'a.png'"):
            answered(packed([("a.png", picture()), ("a.png", picture(3))]))

    @pytest.mark.parametrize("files", [{}, {"folder/": b""}, {".hidden": b"x"}])
    def test_no_files(self, files: Files) -> None:
        with pytest.raises(Unreadable, match="holds no files"):
            answered(packed(files))

    def test_very_many_files(self) -> None:
        with pytest.raises(TooLarge, match=r"holds 6 files; the limit is 5\. .*UNETPP_LIMITS__MAX_ZIP_IMAGES"):
            answered(packed({f"{k}.png": b"" for k in range(6)}), limits=tiny(max_zip_images=5))

    def test_an_endless_list(self) -> None:
        data = packed({f"{k:06}": b"" for k in range(30_000)})
        with memory_stays_below(20), pytest.raises(TooLarge, match="list of files has more than 1,048,576 bytes"):
            answered(data)

    def test_encrypted(self) -> None:
        data = bytearray(packed({"a.png": picture(), "b.png": picture()}, zipfile.ZIP_STORED))
        # The second file's flags, in its own header and in the list.
        first = data.index(b"PK\x01\x02")
        data[data.index(b"PK\x03\x04", 4) + 6] |= 1
        data[data.index(b"PK\x01\x02", first + 4) + 8] |= 1
        _, files, rows = answered(bytes(data))
        assert list(files) == ["a_mask.png"]
        assert "encrypted" in rows[1]["detail"]

    @pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_other_methods(self, method: int) -> None:
        with pytest.raises(Unreadable, match="packed by a method that is not read; pack it with deflate"):
            answered(packed({"a.png": picture()}, method))

    def test_a_wrong_checksum(self) -> None:
        good, bad = picture(), picture(7)
        data = packed({"good.png": good, "bad.png": bad}, zipfile.ZIP_STORED).replace(bad, bad[:-1] + b"?")
        _, files, rows = answered(data)
        assert list(files) == ["good_mask.png"]
        assert "cannot be unpacked" in rows[1]["detail"]

    def test_dicom(self) -> None:
        with pytest.raises(UnsupportedType, match="holds DICOM files, which are not read here; convert the series to NIfTI"):
            answered(packed({"a.png": picture(), "b.dcm": bytes(128) + b"DICM" + bytes(100)}))

    def test_a_reference(self) -> None:
        with pytest.raises(InvalidParameter, match="a reference is for one image"):
            answered(packed({"a.png": picture()}), reference=Sent(picture()))

    def test_wrong_choices_before_anything_else(self) -> None:
        with pytest.raises(InvalidParameter):
            answered(packed({"a.png": picture()}), level=9)


class TestBombs:
    def test_one_file(self) -> None:
        _, files, rows = answered(packed({"good.png": picture(), "bomb.png": bytes(3_000_000)}), limits=tiny(max_zip_mb=100))
        assert list(files) == ["good_mask.png"]
        assert "more than 1 MiB, which is the limit; UNETPP_LIMITS__MAX_BODY_MB" in rows[1]["detail"]

    def test_a_large_one(self) -> None:
        data = packed({"bomb.png": bytes(300_000_000)})
        with memory_stays_below(60), pytest.raises(Unreadable, match="more than 1 MiB"):
            answered(data, limits=tiny(max_zip_mb=100))

    def test_all_together(self) -> None:
        data = packed({f"{k}.png": bytes(900_000) for k in range(3)})
        with pytest.raises(TooLarge, match=r"all files of the zip together have more than 1 MiB.*UNETPP_LIMITS__MAX_ZIP_MB"):
            answered(data, limits=tiny())

    def test_all_answers_together(self) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (600, 600), dtype=np.uint8)
        data = packed({"a.png": picture_bytes(noise), "b.png": picture_bytes(noise)})
        with pytest.raises(TooLarge, match="all answers of the zip together"):
            answered(data, limits=tiny(max_zip_mb=1), format="npz", run=lambda tiles: tiles.pixels[:, :1].astype(np.float32) / 255)

    def test_sizes_that_lie(self) -> None:
        """The list says that a file of 3 MB has 10 bytes."""
        body = zlib.compressobj(wbits=-15)
        squeezed = body.compress(bytes(3_000_000)) + body.flush()
        data = bytearray(packed({"a.png": bytes(3_000_000)}))
        assert squeezed[:50] in data
        at = data.index(b"PK\x01\x02")
        data[at + 24 : at + 28] = struct.pack("<I", 10)
        with pytest.raises(Unreadable):
            answered(bytes(data), limits=tiny(max_zip_mb=100))

    def test_files_that_share_their_bytes(self) -> None:
        """As David Fifield's better zip bomb: many entries in the list, one kernel."""
        data = packed({"a.png": picture(), "b.png": picture()}, zipfile.ZIP_STORED)
        start = data.index(b"PK\x01\x02")
        second = data.index(b"PK\x01\x02", start + 4)
        forged = bytearray(data)
        forged[second + 42 : second + 46] = struct.pack("<I", 0)
        with pytest.raises(Unreadable, match="lie over each other"):
            answered(bytes(forged))

    def test_a_zip_in_a_zip_stays_closed(self) -> None:
        inner = packed({"a.png": picture()})
        for _ in range(5):
            inner = packed({"a.zip": inner})
        with pytest.raises(UnsupportedType, match="not a format that this server reads"):
            answered(inner)

    def test_memory_does_not_grow_with_images(self) -> None:
        rng = np.random.default_rng(0)
        bodies = {f"{k}.bmp": picture_bytes(rng.integers(0, 255, (900, 900), dtype=np.uint8), "BMP") for k in range(50)}
        few, many = (packed(dict(list(bodies.items())[:count]), zipfile.ZIP_STORED) for count in (8, 50))

        async def go(segmenter: Segmenter, data: bytes) -> None:
            answer = await archive.segment(segmenter, Sent(data), SegmentRequest())
            assert isinstance(answer, Archived)
            assert answer.zip.seek(0, 2) > len(data) / 8
            answer.close()

        with segmenting(lambda tiles: tiles.pixels[:, :1].astype(np.float32) / 255) as segmenter:
            asyncio.run(go(segmenter, few))
            gc.collect()
            with memory_stays_below(60):
                asyncio.run(go(segmenter, many))


class TestEnds:
    def test_a_fault_of_ours_ends_all(self) -> None:
        def broken(tiles: Tiles) -> np.ndarray:
            raise RuntimeError("no")

        with pytest.raises(InferenceFailed):
            answered(packed({f"{k}.png": picture(k) for k in range(9)}), run=broken)

    def test_a_deadline_ends_all(self) -> None:
        with pytest.raises(DeadlinePassed):
            answered(packed({f"{k}.png": picture(k) for k in range(9)}), terms=Terms(deadline=0.0))

    def test_patience_is_for_all_together(self) -> None:
        with pytest.raises(
            TooLarge, match=r"holds 9 images, 0 of which were done in the 0\.001 s that POST /segment works for at most"
        ):
            answered(packed({f"{k}.png": picture(k) for k in range(9)}), terms=Terms(patience_s=0.001, begun=-1e9))

    @pytest.mark.parametrize(
        ("patience_s", "left_s", "error", "said"),
        [
            (10.0, math.inf, TooLarge, r"9 images, which would take about 18 s here.*at most 10 s\. Send it to POST /jobs, or in parts"),
            (100.0, 8.0, DeadlineTooShort, r"9 images, which take about 18 s here"),
            (100.0, -1.0, DeadlinePassed, "deadline"),
        ],
    )  # fmt: skip
    def test_what_would_be_too_late_is_not_begun(self, patience_s: float, left_s: float, error: type[Exception], said: str) -> None:
        ran: list[int] = []

        def run(tiles: Tiles) -> np.ndarray:
            ran.append(len(tiles))
            return bright(tiles)

        data = packed({"a.txt": b"no image", **{f"{k}.png": picture(k) for k in range(8)}})
        with segmenting(run, pace=2 / 256) as segmenter:
            terms = Terms(patience_s, time.monotonic() + left_s)
            with pytest.raises(error, match=said):
                asyncio.run(archive.segment(segmenter, Sent(data), SegmentRequest(), terms=terms))
        assert not ran

    def test_nor_what_others_leave_no_time_for(self) -> None:
        data = packed({f"{k}.png": picture(k) for k in range(9)})
        with segmenting(pace=2 / 256) as segmenter:
            caller, lane = Caller(), segmenter.choose(SegmentRequest()).lane
            with segmenter.line.join(caller, lane, 256, 100), pytest.raises(Overloaded, match="others wait already") as refused:
                asyncio.run(archive.segment(segmenter, Sent(data), SegmentRequest(), terms=Terms(patience_s=30.0)))
        assert refused.value.retry_after_s == 6

    def test_sizes_are_counted_once(self) -> None:
        """To estimate it the first image is unpacked too."""
        body = picture_bytes(np.random.default_rng(0).integers(0, 255, (500, 1400), dtype=np.uint8))
        assert 2**20 / 2 < len(body) < 2**20
        assert len(answered(packed({"a.png": body}), limits=tiny(), terms=Terms(patience_s=1000.0))[1]) == 1

    def test_no_shallower_levels(self) -> None:
        with pytest.raises(InvalidParameter, match=r"min_level is for one image.*level="):
            answered(packed({"a.png": picture()}), min_level=1)

    def test_who_leaves_stops_it(self) -> None:
        begun, ran = asyncio.Event(), 0

        async def go() -> None:
            nonlocal ran
            loop = asyncio.get_running_loop()

            def run(tiles: Tiles) -> np.ndarray:
                nonlocal ran
                ran += len(tiles)
                loop.call_soon_threadsafe(begun.set)
                return bright(tiles)

            with segmenting(run, max_batch=1) as segmenter:
                data = packed({f"{k}.png": picture(k, 100) for k in range(200)})
                task = asyncio.create_task(archive.segment(segmenter, Sent(data), SegmentRequest()))
                await begun.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert segmenter.line.idle()

        asyncio.run(go())
        assert ran < 200


class TestEstimates:
    def estimate(self, data: bytes, **limits: Any) -> Estimate:
        with segmenting(limits=LimitsSettings(**limits), pace=0.5) as segmenter:
            return asyncio.run(archive.estimate(segmenter, Sent(data), SegmentRequest()))

    def test_the_first_image_stands_for_all(self) -> None:
        alone = self.estimate(picture())
        found = self.estimate(packed({"a.txt": b"no image", **{f"{k}.png": picture(k) for k in range(9)}}))
        assert (found.windows, found.pixels) == (10, 256)
        assert math.isclose(found.seconds, 10 * alone.seconds)

    def test_of_what_cannot_be_read(self) -> None:
        for files in ({"a.txt": b"no image"}, {"b.dcm": bytes(128) + b"DICM", "a.png": picture()}):
            with pytest.raises(UnsupportedType):
                self.estimate(packed(files))
        with pytest.raises(TooLarge):
            self.estimate(packed({"a.png": picture(), "b.png": picture()}), max_zip_images=1)
        with pytest.raises(Unreadable):
            self.estimate(b"PK\x03\x04 and then nothing")


def test_damaged_zips_are_only_ever_refused() -> None:
    """Bytes changed, cut out and cut off, with one segmenter."""
    good = packed({"a.png": picture(), "b/c.png": picture(2), "d.txt": b"hello"}), packed({"a.png": picture()}, zipfile.ZIP_STORED)

    async def go(segmenter: Segmenter) -> None:
        for number in range(400):
            draw = random.Random(number)  # noqa: S311 - no secret
            data = bytearray(draw.choice(good))
            for _ in range(draw.randint(1, 4)):
                at = draw.randrange(4, len(data))
                if draw.random() < 0.7:
                    data[at] = draw.randrange(256)
                elif draw.random() < 0.5:
                    del data[at : at + draw.randrange(20)]
                else:
                    del data[max(30, at) :]
            with contextlib.suppress(CallerError):
                (await archive.segment(segmenter, Sent(bytes(data)), SegmentRequest())).close()

    with segmenting() as segmenter:
        asyncio.run(go(segmenter))


def test_unknown_formats_of_all_images_are_said() -> None:
    with pytest.raises((Unreadable, UnknownFormat)):
        answered(packed({"a.png": picture()}), format="gif")
