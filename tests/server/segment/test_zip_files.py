"""Zips that are refused: nothing in them is trusted."""

import contextlib
import gc
import io
import random
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from server.errors import (
    CallerError,
    InvalidParameter,
    TooLarge,
    Unreadable,
    UnsupportedType,
)
from server.segment.request import QoS
from server.segment.zip_files import ZipFiles
from server.settings import LimitsSettings
from tests.server.segment.zips import SMALL, Files, answered, packed, picture
from tests.support.files import picture_bytes
from tests.support.memory import memory_stays_below
from tests.support.service import FakeDevice, opened_service, segment


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
        assert (fields["limit"], fields["actual"]) == (5, 6)

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
        with pytest.raises(Unreadable) as caught:
            await answered({"a.png": picture(), "b.dcm": bytes(128) + b"DICM" + bytes(100)})
        assert caught.value.fields["format"] == "DICOM"

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
        assert (caught.value.fields["limit"], caught.value.fields["unit"]) == (1, "MiB")

    async def test_all_answers_together(self) -> None:
        noise = picture_bytes(np.random.default_rng(0).integers(0, 255, (600, 600), dtype=np.uint8))
        run = lambda tiles: tiles.pixels[:, :1].astype(np.float32) / 255  # noqa: E731
        with pytest.raises(TooLarge) as caught:
            await answered(
                {"a.png": noise, "b.png": noise}, limits=SMALL | {"max_zip_mb": 1}, format="npz", run=run
            )
        assert (caught.value.fields["limit"], caught.value.fields["unit"]) == (1, "MiB")

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
        for _ in range(400):
            inner = packed({"a.zip": inner}, zipfile.ZIP_STORED)
        for qos in (QoS(), QoS(60.0)):
            with pytest.raises(UnsupportedType) as caught:
                await answered(inner, qos=qos)
            assert caught.value.fields == {"actual": 1, "file": "a.zip"}

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


def test_zip_is_the_same_in_whatever_order_the_answers_come(tmp_path: Path) -> None:
    sent, made = tmp_path / "sent.zip", []
    sent.write_bytes(packed({f"{name}.png": picture() for name in "abc"}))
    for order in ([0, 1, 2], [2, 0, 1]):
        with sent.open("rb") as file, contextlib.closing(ZipFiles(file, LimitsSettings())) as zips:
            entries = zips.entries()
            names = {index: zips.add(entries[index], {"mask.png": bytes([index]) * 9}) for index in order}
            zips.finish([name for index in range(3) for name in names[index]], "report.json", b"{}")
            made.append(zips.out.read())
    assert made[0] == made[1]
    with zipfile.ZipFile(io.BytesIO(made[0])) as zipped:
        assert [(one, zipped.read(one)[:1]) for one in zipped.namelist()] == [
            ("a_mask.png", b"\0"),
            ("b_mask.png", b"\1"),
            ("c_mask.png", b"\2"),
            ("report.json", b"{"),
        ]
