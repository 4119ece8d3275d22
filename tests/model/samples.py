"""Splits of data folders, and files of one image or volume, for tests of reading."""

import nibabel as nib
import numpy as np
from PIL import Image

from model.data import Split
from model.reading import read_index


def split_of(root, name="train", channels=1, classes=1):
    return Split(name, read_index(root)[name], channels, classes)


def volumes_of(root, classes=3, spacing=None):
    return Split("train", read_index(root, 3)["train"], 1, classes, dims=3, spacing=spacing)


# --- pixels ---

RANDOM = np.random.default_rng(0)


def save_png(path, pixels):
    Image.fromarray(pixels).save(path)
    return path


def save_volume(path, voxels, affine=None):
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path
