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
from typing import Any

import numpy as np
import pytest

from server.arrays import Tiles
from server.errors import (
    CallerError,
    DeadlinePassed,
    DeadlineTooShort,
    InferenceFailed,
    InvalidParameter,
    Overloaded,
    TooLarge,
    Unreadable,
    UnsupportedType,
)
from server.runtime.flow import Flow
from server.runtime.latency import Prediction
from server.segment.estimate import Estimate
from server.segment.request import QoS, Response, SegmentParams, Upload
from tests.support.files import Sent, mask_of, nifti_bytes, pages_bytes, picture_bytes, volume_of
from tests.support.memory import memory_stays_below
from tests.support.service import FakeDevice, FixedLatency, bright, engine_of, opened_service, segment

Files = dict[str, bytes] | list[tuple[str, bytes]]
Row = dict[str, Any]


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


def unpacked(response: Response) -> tuple[dict[str, bytes], list[Row]]:
    """The files of the answer, and the rows of its report."""
    assert not isinstance(response.body, bytes)
    with zipfile.ZipFile(io.BytesIO(response.body.read())) as made:
        assert made.testzip() is None
        files = {name: made.read(name) for name in made.namelist()}
    response.close()
    return files, json.loads(files.pop("report.json"))["images"]


async def answered(
    files: Files | bytes,
    reference: bytes | None = None,
    *,
    run: Any = bright,
    limits: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[str, bytes], list[Row]]:
    data = files if isinstance(files, bytes) else packed(files)
    with opened_service(run, limits=limits or {}) as service:
        return unpacked(await segment(service, data, reference, **options))


SMALL = {"max_body_mb": 1, "max_zip_mb": 100}


class TestAnswers:
    async def test_each_image_has_its_own(self) -> None:
        volume = np.zeros((4, 5, 6), dtype=np.uint8)
        volume[2:] = 9
        inputs = {
            "a.png": picture(1),
            "day 1/b.png": picture(2),
            "day 1/c.tif": pages_bytes(np.stack([np.eye(8, dtype=np.uint8)] * 3)),
            "d.nii.gz": nifti_bytes(volume),
        }
        with opened_service() as service:
            response = await segment(service, packed(inputs))
            assert (response.media_type, response.filename, response.note) == (
                "application/zip",
                "masks.zip",
                "",
            )
            assert (response.overlaps, response.degraded) == ({}, "")
            assert response.timings["infer"] >= 0
            files, rows = unpacked(response)
        assert [*files] == ["a_mask.png", "day 1/b_mask.png", "day 1/c_mask.tiff", "d_mask.nii.gz"]
        assert mask_of(files["a_mask.png"]).sum() == 128
        assert np.array_equal(volume_of(files["d_mask.nii.gz"]), volume > 3)
        assert [row["name"] for row in rows] == [*inputs]
        assert {row["status"] for row in rows} == {"ok"}
        row = rows[0]
        assert (row["files"], row["model"], row["mode"], row["level"], row["precision"]) == (
            ["a_mask.png"], "fake", "accurate", 4, "fp32",
        )  # fmt: skip

    async def test_are_those_of_the_image_alone(self) -> None:
        files, _ = await answered({f"{k}.png": picture(k) for k in range(6)})
        with opened_service() as service:
            for k in range(6):
                assert files[f"{k}_mask.png"] == (await segment(service, picture(k))).body

    async def test_in_several_formats_with_their_facts(self) -> None:
        files, rows = await answered({"x/a.png": picture()}, format="png,json,npz", min_size_px=3)
        assert (
            sorted(files)
            == sorted(rows[0]["files"])
            == ["x/a_mask.png", "x/a_scores.npz", "x/a_statistics.json"]
        )
        assert json.loads(files["x/a_statistics.json"])["model"] == "fake"
        assert rows[0]["postprocessing"] == {"min_size_px": 3}

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
        ids=["suffix", "case", "two suffixes", "numbered", "unicode"],
    )
    async def test_have_names_of_their_own(self, names: list[str], stems: list[str]) -> None:
        files, rows = await answered({name: picture(k, 16 + 2 * k) for k, name in enumerate(names)})
        assert [row["files"] for row in rows] == [[f"{stem}_mask.png"] for stem in stems]
        assert [mask_of(files[row["files"][0]]).shape for row in rows] == [
            (16 + 2 * k,) * 2 for k in range(len(names))
        ]

    async def test_lie_in_the_order_of_their_images(self) -> None:
        """One in the middle is done last: it has the most tiles."""
        files, _ = await answered(
            {f"{k}.png": picture(k, 400 if k == 3 else 16) for k in range(6, 0, -1)}, format="png,json"
        )
        assert list(files) == [
            f"{k}_{name}" for k in range(6, 0, -1) for name in ("mask.png", "statistics.json")
        ]

    @pytest.mark.parametrize("name", ["./a.png", "x/./a.png", ".\\a.png", "x\\a.png"])
    async def test_of_names_with_other_separators_and_steps(self, name: str) -> None:
        _, rows = await answered({name: picture(), "b.png": picture()})
        assert rows[0]["status"] == "ok"
        assert rows[0]["name"] == name.replace("\\", "/").replace("./", "")

    async def test_what_systems_hide_is_left_out(self) -> None:
        hidden = {"__MACOSX/._a.png": b"x", ".DS_Store": b"x", "b/.git/c.png": picture(), "empty/": b""}
        files, rows = await answered({"a.png": picture()} | hidden)
        assert (list(files), len(rows)) == (["a_mask.png"], 1)

    async def test_of_a_bad_image_are_missing(self) -> None:
        bad = {
            "text.png": b"hello", "cut.png": picture()[:45], "nothing.png": b"", "inner.zip": packed({"a.png": picture()}),
        }  # fmt: skip
        with opened_service() as service:
            response = await segment(service, packed({"good.png": picture()} | bad))
            assert response.note
            files, rows = unpacked(response)
        assert list(files) == ["good_mask.png"]
        assert [row["status"] for row in rows] == ["ok", *["failed"] * 4]
        assert [row["code"] for row in rows[1:]] == [
            "unsupported-type",
            "unreadable",
            "unreadable",
            "unsupported-type",
        ]
        assert all(row["detail"] for row in rows[1:])

    @pytest.mark.parametrize(("other", "error"), [(b"hello", UnsupportedType), (b"", Unreadable)])
    async def test_of_bad_images_alone_is_an_error(self, other: bytes, error: type[CallerError]) -> None:
        with pytest.raises(error) as caught:
            await answered({"a.txt": b"hello", "b.txt": other})
        assert caught.value.fields == {"actual": 2, "file": "a.txt"}

    async def test_of_formats_that_do_not_fit_are_missing(self) -> None:
        files, rows = await answered(
            {"a.png": picture(), "b.nii.gz": nifti_bytes(np.zeros((4, 5, 6), np.uint8))}, format="nifti"
        )
        assert list(files) == ["b_mask.nii.gz"]
        assert rows[0]["code"] == "unknown-format"

    async def test_of_stored_files(self) -> None:
        assert len((await answered(packed({"a.png": picture()}, zipfile.ZIP_STORED)))[0]) == 1

    async def test_progress_counts_images(self) -> None:
        told: list[tuple[str, int, int]] = []
        await answered({f"{k}.png": picture(k) for k in range(5)}, on_progress=lambda *now: told.append(now))
        assert told == [("decode", 0, 5), *(("infer", k, 5) for k in range(1, 6))]

    async def test_images_share_batches(self) -> None:
        device = FakeDevice(held=True)
        with opened_service(device=device) as service:
            task = asyncio.create_task(segment(service, packed({f"{k}.png": picture(k) for k in range(9)})))
            queued, value = 0.0, service.metrics.registry.get_sample_value
            while queued < 3:
                await service.metrics.scrape()
                queued = value("unetpp_queue_tiles", {"priority": "interactive"})
            device.release()
            unpacked(await task)
            assert max(engine_of(service.registry.get("fake")).batches) >= 3


class TestRefusals:
    @pytest.mark.parametrize(
        "name",
        ["../a.png", "x/../../a.png", "/etc/a.png", "C:\\a.png", "C:a.png", "..\\a.png", "a\nb.png", "a\x1b[2J.png", "x//a.png", "a" * 501],
        ids=["up", "up twice", "absolute", "drive", "drive alone", "backslash", "newline", "escape", "empty part", "long"],
    )  # fmt: skip
    async def test_names_that_lead_elsewhere(self, name: str) -> None:
        files, rows = await answered({"good.png": picture(), name: picture()})
        assert list(files) == ["good_mask.png"]
        assert rows[1]["code"] == "unreadable"
        assert len(rows[1]["name"]) <= 500

    async def test_no_name(self) -> None:
        """What zipfile never writes: the list names the second file with no letters at all."""
        data = packed({"good.png": picture(), "x": picture()}, zipfile.ZIP_STORED)
        at, end = data.rindex(b"PK\x01\x02"), data.rindex(b"PK\x05\x06")
        size = struct.unpack_from("<I", data, end + 12)[0]
        entry = data[: at + 28] + bytes(2) + data[at + 30 : at + 46] + data[at + 47 : end + 12]
        files, rows = await answered(entry + struct.pack("<I", size - 1) + data[end + 16 :])
        assert list(files) == ["good_mask.png"]
        assert (rows[1]["name"], rows[1]["code"]) == ("", "unreadable")

    @pytest.mark.parametrize(
        "files",
        [
            {"a.png": picture(), "./a.png": picture(3)},
            [("a.png", picture()), ("a.png", picture(3))],
            {},
            {"folder/": b""},
            {".hidden": b"x"},
            b"PK\x03\x04 and then nothing",
        ],
        ids=["one place", "one name", "nothing", "folder", "hidden", "no list"],
    )
    async def test_lists_that_make_no_sense(self, files: Files | bytes) -> None:
        with pytest.raises(Unreadable):
            await answered(files)

    async def test_very_many_files(self) -> None:
        with pytest.raises(TooLarge) as caught:
            await answered({f"{k}.png": b"" for k in range(6)}, limits={"max_zip_images": 5})
        fields = caught.value.fields
        assert (fields["limit"], fields["actual"], fields["setting"]) == (
            5,
            6,
            "UNETPP_LIMITS__MAX_ZIP_IMAGES",
        )

    async def test_an_endless_list(self) -> None:
        data = packed({f"{k:06}": b"" for k in range(30_000)})
        with memory_stays_below(20), pytest.raises(TooLarge) as caught:
            await answered(data)
        assert caught.value.fields["limit"] == 2**20

    async def test_encrypted(self) -> None:
        data = bytearray(packed({"a.png": picture(), "b.png": picture()}, zipfile.ZIP_STORED))
        # The second file's flags, in its own header and in the list.
        first = data.index(b"PK\x01\x02")
        data[data.index(b"PK\x03\x04", 4) + 6] |= 1
        data[data.index(b"PK\x01\x02", first + 4) + 8] |= 1
        files, rows = await answered(bytes(data))
        assert (list(files), rows[1]["code"]) == (["a_mask.png"], "unreadable")

    @pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    async def test_other_methods(self, method: int) -> None:
        with pytest.raises(Unreadable):
            await answered(packed({"a.png": picture()}, method))

    async def test_a_wrong_checksum(self) -> None:
        good, bad = picture(), picture(7)
        data = packed({"good.png": good, "bad.png": bad}, zipfile.ZIP_STORED).replace(bad, bad[:-1] + b"?")
        files, rows = await answered(data)
        assert (list(files), rows[1]["code"]) == (["good_mask.png"], "unreadable")

    async def test_dicom_is_one_volume_and_not_many_images(self) -> None:
        with pytest.raises(UnsupportedType) as caught:
            await answered({"a.png": picture(), "b.dcm": bytes(128) + b"DICM" + bytes(100)})
        assert caught.value.fields == {"remedy": "dcm2niix"}

    async def test_parameters_that_are_for_one_image(self) -> None:
        for parameter, options in (("reference", {"reference": picture()}), ("min_level", {"min_level": 1})):
            with pytest.raises(InvalidParameter) as caught:
                await answered({"a.png": picture()}, **options)
            assert caught.value.fields == {"parameter": parameter}

    async def test_wrong_parameters_before_anything_else(self) -> None:
        with pytest.raises(InvalidParameter):
            await answered(b"PK\x03\x04", level=5)


class TestBombs:
    async def test_one_file(self) -> None:
        files, rows = await answered({"good.png": picture(), "bomb.png": bytes(3_000_000)}, limits=SMALL)
        assert (list(files), rows[1]["code"]) == (["good_mask.png"], "too-large")

    async def test_a_large_one(self) -> None:
        data = packed({"bomb.png": bytes(200_000_000)})
        with memory_stays_below(60), pytest.raises(Unreadable):
            await answered(data, limits=SMALL)

    async def test_all_together(self) -> None:
        with pytest.raises(TooLarge) as caught:
            await answered({f"{k}.png": bytes(900_000) for k in range(3)}, limits=SMALL | {"max_zip_mb": 1})
        assert (caught.value.fields["limit"], caught.value.fields["setting"]) == (
            1,
            "UNETPP_LIMITS__MAX_ZIP_MB",
        )

    async def test_all_answers_together(self) -> None:
        noise = picture_bytes(np.random.default_rng(0).integers(0, 255, (600, 600), dtype=np.uint8))
        run = lambda tiles: tiles.pixels[:, :1].astype(np.float32) / 255  # noqa: E731
        with pytest.raises(TooLarge) as caught:
            await answered(
                {"a.png": noise, "b.png": noise}, limits=SMALL | {"max_zip_mb": 1}, format="npz", run=run
            )
        assert caught.value.fields["setting"] == "UNETPP_LIMITS__MAX_ZIP_MB"

    async def test_sizes_that_lie(self) -> None:
        """The list says that a file of 3 MB has 10 bytes."""
        body = zlib.compressobj(wbits=-15)
        squeezed = body.compress(bytes(3_000_000)) + body.flush()
        data = bytearray(packed({"a.png": bytes(3_000_000)}))
        assert squeezed[:50] in data
        at = data.index(b"PK\x01\x02")
        data[at + 24 : at + 28] = struct.pack("<I", 10)
        with pytest.raises(Unreadable):
            await answered(bytes(data), limits=SMALL)

    async def test_files_that_share_their_bytes(self) -> None:
        """As David Fifield's better zip bomb: many entries in the list, one kernel."""
        data = packed({"a.png": picture(), "b.png": picture()}, zipfile.ZIP_STORED)
        second = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)
        forged = bytearray(data)
        forged[second + 42 : second + 46] = struct.pack("<I", 0)
        with pytest.raises(Unreadable):
            await answered(bytes(forged))

    async def test_a_zip_in_a_zip_stays_closed(self) -> None:
        inner = packed({"a.png": picture()})
        for _ in range(3):
            inner = packed({"a.zip": inner})
        with pytest.raises(UnsupportedType):
            await answered(inner)

    async def test_memory_does_not_grow_with_images(self) -> None:
        rng = np.random.default_rng(0)
        bodies = {
            f"{k}.bmp": picture_bytes(rng.integers(0, 255, (700, 700), dtype=np.uint8), "BMP")
            for k in range(40)
        }
        few, many = (packed(dict(list(bodies.items())[:count]), zipfile.ZIP_STORED) for count in (8, 40))
        window = {"window": {"size": [512, 512], "overlap": 0.0}}
        with opened_service(lambda tiles: tiles.pixels[:, :1].astype(np.float32) / 255, window) as service:
            (await segment(service, few)).close()
            gc.collect()
            with memory_stays_below(40):
                (await segment(service, many)).close()


class TestEnds:
    IMAGES = {f"{k}.png": picture(k) for k in range(9)}  # noqa: RUF012 - never changed

    async def test_a_fault_of_ours_ends_all(self) -> None:
        def broken(tiles: Tiles) -> np.ndarray:
            raise RuntimeError("no")

        with pytest.raises(InferenceFailed):
            await answered(self.IMAGES, run=broken)

    async def test_a_deadline_ends_all(self) -> None:
        device = FakeDevice(held=True)
        with opened_service(device=device) as service:
            with pytest.raises(DeadlinePassed):
                await segment(service, packed(self.IMAGES), qos=QoS(deadline=time.monotonic() + 0.3))
            device.release()
            assert service.scheduler.is_idle

    async def test_the_timeout_is_for_all_together(self) -> None:
        device = FakeDevice(held=True)
        with opened_service(device=device) as service:
            with pytest.raises(TooLarge) as caught:
                await segment(service, packed(self.IMAGES), qos=QoS(0.3))
            device.release()
        assert caught.value.fields == {"limit": 0.3, "unit": "s", "actual": 0, "remedy": "POST /jobs"}

    @pytest.mark.parametrize(
        ("timeout_s", "left_s", "error"),
        [(10.0, math.inf, TooLarge), (100.0, 8.0, DeadlineTooShort), (100.0, -1.0, DeadlinePassed)],
    )
    async def test_what_would_be_too_late_is_not_begun(
        self, timeout_s: float, left_s: float, error: type[Exception]
    ) -> None:
        data = packed({"a.txt": b"no image", **{f"{k}.png": picture(k) for k in range(8)}})
        with opened_service(latency=FixedLatency(2.0)) as service:
            with pytest.raises(error):
                await segment(service, data, qos=QoS(timeout_s, time.monotonic() + left_s))
            assert not engine_of(service.registry.get("fake")).batches

    async def test_what_others_leave_no_time_for_is_not_begun(self) -> None:
        with opened_service(latency=FixedLatency(2.0)) as service:
            flow = Flow(
                service.registry.get("fake").recommended,
                expected=100,
                tile=Prediction(2.0, 2.0, confident=True),
            )
            with service.scheduler.join(flow), pytest.raises(Overloaded) as caught:
                await segment(service, packed(self.IMAGES), qos=QoS(30.0))
        # Of the others' 200 s it would wait for as much as it needs itself.
        assert caught.value.fields["actual"] == 1.5 * (18 + 18)

    async def test_sizes_are_counted_once(self) -> None:
        """To estimate it the first image is unpacked too."""
        body = picture_bytes(np.random.default_rng(0).integers(0, 255, (500, 1400), dtype=np.uint8))
        assert 2**20 / 2 < len(body) < 2**20
        assert (
            len((await answered({"a.png": body}, limits=SMALL | {"max_zip_mb": 1}, qos=QoS(1000.0)))[0]) == 1
        )

    async def test_a_caller_who_leaves_ends_all(self) -> None:
        device = FakeDevice(held=True)
        with opened_service(device=device) as service:
            task = asyncio.create_task(segment(service, packed({f"{k}.png": picture(k) for k in range(40)})))
            while not device.waiting:  # noqa: ASYNC110 - threads have no event of the loop
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert service.scheduler.is_idle
            device.release()
            await segment(service, picture())
            assert sum(engine_of(service.registry.get("fake")).batches) < 10


class TestEstimates:
    async def estimate(self, data: bytes, **limits: Any) -> Estimate:
        with opened_service(latency=FixedLatency(0.5), limits=limits) as service:
            upload = Upload(Sent(data))
            estimate: Estimate = await service.estimate(upload, SegmentParams())
            assert upload.file.tell() == 0
            return estimate

    async def test_the_first_image_that_can_be_read_stands_for_all(self) -> None:
        alone = await self.estimate(picture())
        every = await self.estimate(
            packed({"a.txt": b"no image", **{f"{k}.png": picture(k) for k in range(9)}})
        )
        assert (every.windows, every.pixels) == (10, 256)
        assert math.isclose(every.seconds, 10 * alone.seconds)

    @pytest.mark.parametrize(
        ("files", "limits", "error"),
        [
            ({"a.txt": b"no image"}, {}, UnsupportedType),
            ({"b.dcm": bytes(128) + b"DICM", "a.png": picture()}, {}, UnsupportedType),
            ({"a.png": picture(), "b.png": picture()}, {"max_zip_images": 1}, TooLarge),
            (b"PK\x03\x04 and then nothing", {}, Unreadable),
        ],
        ids=["no image", "DICOM", "many", "no list"],
    )
    async def test_of_what_cannot_be_read(
        self, files: Files | bytes, limits: dict[str, Any], error: type[Exception]
    ) -> None:
        with pytest.raises(error):
            await self.estimate(files if isinstance(files, bytes) else packed(files), **limits)


async def test_damaged_zips_are_only_ever_refused() -> None:
    """Bytes changed, cut out and cut off, with one service."""
    good = (
        packed({"a.png": picture(), "b/c.png": picture(2), "d.txt": b"hello"}),
        packed({"a.png": picture()}, zipfile.ZIP_STORED),
    )
    with opened_service(device=FakeDevice()) as service:
        for number in range(300):
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
                response = await segment(service, bytes(data))
                response.close()
