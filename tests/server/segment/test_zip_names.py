"""Names in zips survive, whatever their packer says about their characters."""

import io
import struct
import unicodedata
import zipfile
import zlib

import pytest

from tests.server.segment.zips import answered, packed, picture

UTF8 = 0x800


def with_name(raw: bytes, *, flag: bool = False, extra: bytes = b"") -> bytes:
    """A zip of one picture whose name is any bytes, as zipfile itself does not write it."""
    body = picture()
    checksum, flags = zlib.crc32(body), UTF8 if flag else 0
    sizes = struct.pack("<LLLHH", checksum, len(body), len(body), len(raw), len(extra))
    local = struct.pack("<4s5H", b"PK\x03\x04", 20, flags, 0, 0, 33) + sizes + raw + extra
    entry = struct.pack("<4s6H", b"PK\x01\x02", 0x031E, 20, flags, 0, 0, 33) + sizes
    entry += struct.pack("<HHHLL", 0, 0, 0, 0, 0) + raw + extra
    at = len(local) + len(body)
    end = struct.pack("<4s4HLLH", b"PK\x05\x06", 0, 0, 1, 1, len(entry), at, 0)
    return local + body + entry + end


def unicode_path(name: str, raw: bytes, *, version: int = 1, broken: bool = False) -> bytes:
    """Info-ZIP's extra field, behind another one."""
    body = struct.pack("<BL", version, zlib.crc32(raw) ^ broken) + name.encode()
    return struct.pack("<HHB", 0x5455, 1, 0) + struct.pack("<HH", 0x7075, len(body)) + body


MACOS = unicodedata.normalize("NFD", "äö/Zürich ß.png")
NAMES = {
    "macOS": (with_name(MACOS.encode()), MACOS),
    "UTF-8 without the flag": (with_name("äö.png".encode()), "äö.png"),
    "Japanese without the flag": (with_name("細胞.png".encode()), "細胞.png"),
    "emoji without the flag": (with_name("🔬.png".encode()), "🔬.png"),
    "UTF-8 with the flag": (with_name("äö.png".encode(), flag=True), "äö.png"),
    "ASCII": (with_name(b"a b.png"), "a b.png"),
    "code page 437": (with_name("Zürich.png".encode("cp437")), "Zürich.png"),
    "code page 437, all letters": (with_name("éâäàåçêëèïîì.png".encode("cp437")), "éâäàåçêëèïîì.png"),
    "Windows-1252": (with_name("Zürich.png".encode("cp1252")), "Zⁿrich.png"),
    "Info-ZIP": (with_name(b"Z?rich.png", extra=unicode_path("Zürich.png", b"Z?rich.png")), "Zürich.png"),
    "Info-ZIP of another name": (
        with_name(b"Z?rich.png", extra=unicode_path("Zürich.png", b"Z?rich.png", broken=True)),
        "Z?rich.png",
    ),
    "Info-ZIP of another version": (
        with_name(b"Z?rich.png", extra=unicode_path("Zürich.png", b"Z?rich.png", version=2)),
        "Z?rich.png",
    ),
    "broken extra field": (
        with_name("ä.png".encode(), extra=struct.pack("<HH", 0x7075, 2) + b"\x01\x02"),
        None,
    ),
    "zipfile": (packed({"äö 細胞.png": picture()}), "äö 細胞.png"),
}


@pytest.mark.parametrize(("data", "name"), NAMES.values(), ids=NAMES)
async def test_name_survives(data: bytes, name: str | None) -> None:
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    files, rows = await answered(data)
    assert rows[0]["status"] == "ok"
    if name:
        assert rows[0]["name"] == name
        assert list(files) == [name.replace(".png", "_mask.png")]


@pytest.mark.parametrize("raw", [b"../a.png", "../ä.png".encode(), b"\xff\xff/../a.png"])
async def test_name_that_leads_out_is_refused_in_any_characters(raw: bytes) -> None:
    with pytest.raises(Exception, match="leads out"):
        await answered(with_name(raw))


async def test_extra_field_may_not_lead_out() -> None:
    with pytest.raises(Exception, match="leads out"):
        await answered(with_name(b"a.png", extra=unicode_path("../../a.png", b"a.png")))
