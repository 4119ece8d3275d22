"""Images that the benchmarks send: crops of a real microscopy image (scikit-image's immunohistochemistry)."""

import io

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image
from skimage import data


def picture(side: int) -> UInt8[ndarray, "H W 3"]:
    """A crop of side × side pixels, 512 at most."""
    image: UInt8[ndarray, "H W 3"] = data.immunohistochemistry()[:side, :side]
    return image


def png_of(pixels: UInt8[ndarray, "H W 3"]) -> bytes:
    """PNG at the usual compression."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def bodies(side: int, count: int = 8) -> list[bytes]:
    """PNG files of different parts of the image, each turned another way."""
    image = data.immunohistochemistry()
    files = []
    for index in range(count):
        at = (len(image) - side) * index // (count - 1)
        crop = np.rot90(image[at : at + side, at : at + side], index % 4)
        files.append(png_of(crop[:, ::-1] if index >= 4 else crop))
    return files
