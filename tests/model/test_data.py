"""Data folders: every wrong file is named before the first step."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from model.data import Split
from model.reading import DataError, read_image, read_index
from tests.model.samples import split_of

# MONAI says so once for each image without foreground; such images are meant.
pytestmark = pytest.mark.filterwarnings("ignore:Num foregrounds:UserWarning")


# --- index.csv ---


def test_splits_and_attributes(discs):
    splits = read_index(discs)
    assert {name: len(samples) for name, samples in splits.items()} == {"train": 4, "val": 2}
    first = splits["train"][0]
    assert (first.id, first.image.name, first.label.parent.name) == ("train0", "train0.png", "labels")
    assert first.attributes["stain"] == "rare"


def test_missing_index(tmp_path):
    with pytest.raises(DataError, match=r"index\.csv: not found.*images/, labels/"):
        read_index(tmp_path)


@pytest.mark.parametrize("text", ["", "id,split\n", "name,split\na,train\n"])
def test_missing_columns_or_rows(tmp_path, text):
    (tmp_path / "index.csv").write_text(text)
    with pytest.raises(DataError, match=r"index\.csv: needs the columns id and split and at least one row"):
        read_index(tmp_path)


@pytest.mark.parametrize("row", ["train1", "train1,", ",train"])
def test_a_row_without_id_or_split_is_named_by_its_line(discs, row):
    with (discs / "index.csv").open("a") as file:
        file.write(f"{row}\n")
    with pytest.raises(DataError, match=r"rows without id or split:\s+8"):
        read_index(discs)


def test_a_byte_order_mark_is_no_part_of_the_first_column(discs):
    index = discs / "index.csv"
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    assert len(read_index(discs)["train"]) == 4


def test_another_encoding_is_a_data_error(discs):
    (discs / "index.csv").write_bytes("id,split\nzürich,train\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"index\.csv: not a CSV file in UTF-8"):
        read_index(discs)


def test_every_missing_file_is_named(discs):
    (discs / "labels" / "train1.png").unlink()
    (discs / "images" / "val0.png").unlink()
    with pytest.raises(DataError) as caught:
        read_index(discs)
    assert "2 files" in str(caught.value)
    assert "labels/train1.*" in str(caught.value)
    assert "images/val0.*" in str(caught.value)
    assert "train0" not in str(caught.value)


def test_a_long_list_is_cut(tmp_path):
    (tmp_path / "index.csv").write_text("id,split\n" + "".join(f"n{n},train\n" for n in range(50)))
    with pytest.raises(DataError, match="100 files") as caught:
        read_index(tmp_path)
    assert "and 80 more" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 22


# --- split ---


def test_a_split_without_samples():
    with pytest.raises(DataError, match="'val' has no samples"):
        Split("val", [], 1, 1)


def test_all_wrong_files_are_named_at_once(discs):
    Image.fromarray(np.zeros((31, 32), np.uint8)).save(discs / "labels" / "train0.png")
    (discs / "images" / "train1.png").write_bytes(b"no image")
    whole = (discs / "labels" / "train2.png").read_bytes()
    (discs / "labels" / "train2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as caught:
        split_of(discs)
    text = str(caught.value)
    assert "3 samples of the split 'train'" in text
    assert "train0: image is (32, 32), label is (31, 32)" in text
    assert "images/train1.png: cannot be read" in text
    assert "labels/train2.png: cannot be read" in text
    assert "train3" not in text


def test_labels_that_are_all_empty(discs):
    for file in (discs / "labels").iterdir():
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(file)
    with pytest.raises(DataError, match="no label of the split 'train' has any foreground"):
        split_of(discs)


def test_one_empty_label_is_fine(discs):
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(discs / "labels" / "train0.png")
    assert [bool(label.any()) for label in split_of(discs).labels] == [False, True, True, True]


def test_unknown_classes(discs):
    Image.fromarray(np.full((32, 32), 3, np.uint8)).save(discs / "labels" / "train1.png")
    with pytest.raises(DataError, match=r"train\d\.png: class 255 of a network with 3 classes"):
        split_of(discs, classes=3)


def test_wide_class_values_do_not_wrap_around(discs):
    # As uint8, 257 would silently become class 1.
    for n in range(4):
        label = np.zeros((32, 32), np.uint16)
        label[0, 0] = 257
        Image.fromarray(label).save(discs / "labels" / f"train{n}.png")
    with pytest.raises(DataError, match=r"labels/train0\.png: values from 0 to 257 are no class indices"):
        split_of(discs, classes=2)
    # For one class, such an instance map means foreground.
    assert split_of(discs, classes=1).labels[0].sum() == 1


@pytest.mark.parametrize("channels", [2, 4])
def test_channels_that_the_network_does_not_take(discs, channels):
    for n in range(4):
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(discs / "images" / f"train{n}.png")
    with pytest.raises(DataError, match=rf"train0\.png: 3 channels, the network takes {channels}"):
        split_of(discs, channels=channels)


def test_values_that_are_not_finite(discs):
    pixels = np.ones((32, 32), np.float32)
    pixels[3, 3] = np.nan
    (discs / "images" / "train0.png").unlink()
    tifffile.imwrite(discs / "images" / "train0.tif", pixels)
    with pytest.raises(DataError, match=r"train0\.tif: holds values that are not finite"):
        split_of(discs)


def test_damaged_tiff(discs):
    # Truncated deflate raises a RuntimeError deep down, garbled tags a TypeError or ZeroDivisionError.
    (discs / "images" / "train0.png").unlink()
    file = discs / "images" / "train0.tif"
    tifffile.imwrite(file, np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8), compression="zlib")
    whole = file.read_bytes()
    for damaged in (
        whole[:-200],
        whole[:300],
        whole[:6],
        whole.replace(b"\x01\x01\x04\x00", b"\x01\x01\x04\xff"),
        b"",
    ):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"images/train0\.tif: cannot be read"):
            split_of(discs)


def test_a_stack_is_no_image(tmp_path):
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((2, 3, 16, 16), np.uint8), photometric="minisblack")
    with pytest.raises(DataError, match=r"stack\.tif: an array of shape"):
        read_image(tmp_path / "stack.tif", 1)
