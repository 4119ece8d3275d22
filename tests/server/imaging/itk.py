"""Files as SimpleITK writes and reads them."""

import tempfile
from pathlib import Path

import SimpleITK


def by_itk(image: SimpleITK.Image, suffix: str, *, packed: bool = False) -> bytes:
    """A file as SimpleITK writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"image{suffix}"
        SimpleITK.WriteImage(image, path, packed)
        return path.read_bytes()


def itk_read(data: bytes, suffix: str) -> SimpleITK.Image:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"image{suffix}"
        path.write_bytes(data)
        return SimpleITK.ReadImage(path)
