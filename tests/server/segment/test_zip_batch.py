import asyncio
import json
import math
import time
import zipfile
from typing import Any

import numpy as np
import pytest

from server.arrays import Tiles
from server.errors import (
    CallerError,
    DeadlinePassed,
    DeadlineTooShort,
    InferenceFailed,
    Overloaded,
    TooLarge,
    Unreadable,
    UnsupportedType,
)
from server.runtime.flow import Flow
from server.runtime.latency import Prediction
from server.segment.estimate import Estimate
from server.segment.request import QoS, SegmentParams, Upload
from tests.server.segment.zips import SMALL, Files, answered, packed, picture, unpacked
from tests.support.files import Sent, mask_of, nifti_bytes, pages_bytes, picture_bytes, volume_of
from tests.support.service import FakeDevice, FixedLatency, engine_of, opened_service, segment


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


class TestEnds:
    IMAGES = {f"{k}.png": picture(k) for k in range(9)}  # noqa: RUF012 - never changed

    async def test_a_fault_of_ours_ends_all(self) -> None:
        def broken(tiles: Tiles) -> np.ndarray:
            raise RuntimeError("no")

        with pytest.raises(InferenceFailed):
            await answered(self.IMAGES, run=broken)

    async def test_a_timeout_that_is_not_the_requests_is_passed_on(self) -> None:
        def tell(stage: str, done: int, total: int) -> None:
            raise TimeoutError

        with pytest.raises(TimeoutError):
            await answered(self.IMAGES, on_progress=tell)

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

    @pytest.mark.parametrize("first", [b"no image", packed({"a.png": picture(0, 64)})], ids=["text", "zip"])
    async def test_the_first_image_that_can_be_read_stands_for_all(self, first: bytes) -> None:
        alone = await self.estimate(picture())
        every = await self.estimate(packed({"a": first, **{f"{k}.png": picture(k) for k in range(9)}}))
        assert (every.windows, every.pixels) == (10, 256)
        assert math.isclose(every.seconds, 10 * alone.seconds)

    @pytest.mark.parametrize(
        ("files", "limits", "error"),
        [
            ({"a.txt": b"no image"}, {}, UnsupportedType),
            ({"b.dcm": bytes(128) + b"DICM", "a.png": picture()}, {}, Unreadable),
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
