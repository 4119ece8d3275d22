import os
import zipfile
from pathlib import Path, PurePath
from typing import Any

import pytest

from client.errors import InputError
from client.files import sha256, zip_series
from client.inputs import ANSWERS, Input, check_outputs, collect, match_references


def collected(*arguments: object, recursive: bool = True, out: Path | None = None) -> list[Input]:
    return collect(map(str, arguments), recursive=recursive, out=out)


def names(inputs: list[Input], home: Path) -> list[str]:
    return [one.path.relative_to(home).as_posix() for one in inputs]


ALL = ["a.png", "b.png", "day 2/a.png", "day 2/ü.tif"]


def test_collect_of_folder_takes_images_in_order(folder: Path) -> None:
    (folder / ".thumbs").mkdir()
    for name in ("notes.txt", ".hidden.png", ".thumbs/x.png"):
        (folder / name).touch()
    inputs = collected(folder)
    assert names(inputs, folder) == ALL
    assert [one.folder.as_posix() for one in inputs] == [".", ".", "day 2", "day 2"]
    assert names(collected(folder, recursive=False), folder) == ["a.png", "b.png"]


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".nii.gz", ".seg.nrrd"])
def test_collect_of_folder_leaves_out_answers(folder: Path, suffix: str) -> None:
    for one in collected(folder):
        for name in ANSWERS:
            one.output(None, f"{name}{suffix}").touch()
    (folder / "lonely_mask.png").touch()
    assert names(collected(folder), folder) == ["a.png", "b.png", "lonely_mask.png", *ALL[2:]]
    # A file that is named itself is an input.
    assert names(collected(folder / f"a_mask{suffix}"), folder) == [f"a_mask{suffix}"]


def test_collect_leaves_out_folder_of_answers(folder: Path) -> None:
    out = folder / "out"
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "x.png").touch()
    assert names(collected(folder, out=out), folder) == ALL


@pytest.mark.parametrize(
    ("patterns", "expected", "folders"),
    [
        (["?.png"], ["a.png", "b.png"], [".", "."]),
        (["**/a.*"], ["a.png", "day 2/a.png"], [".", "day 2"]),
        (["*"], ["[1].png", *ALL], [".", ".", ".", "day 2", "day 2"]),
        (["[1].png"], ["[1].png"], ["."]),
        (["", "a.png", "*.png", "day 2"], ["[1].png", *ALL], [".", ".", ".", "day 2", "day 2"]),
    ],
)
def test_collect_of_patterns_counts_files_once(
    folder: Path, patterns: list[str], expected: list[str], folders: list[str]
) -> None:
    (folder / "[1].png").touch()
    inputs = collected(*(folder / pattern for pattern in patterns))
    assert sorted(names(inputs, folder)) == sorted(expected)
    assert [one.folder.as_posix() for one in inputs] == folders


@pytest.mark.parametrize("argument", ["none.png", "*.gif", "empty"])
def test_collect_of_nothing_raises(tmp_path: Path, argument: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        collected(tmp_path / argument)


def test_collect_of_folder_of_folders_without_recursion_raises(folder: Path) -> None:
    with pytest.raises(InputError):
        collected(folder.parent, recursive=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_collect_of_unreadable_folder_raises(folder: Path) -> None:
    (folder / "day 2").chmod(0)
    try:
        with pytest.raises(InputError):
            collected(folder)
    finally:
        (folder / "day 2").chmod(0o700)


@pytest.mark.parametrize(
    ("name", "stem"),
    [("x.png", "x"), ("x.nii.gz", "x"), ("scan.v2.nii.gz", "scan.v2"), ("x", "x"), ("x.gz", "x")],
)
def test_stem(name: str, stem: str) -> None:
    assert Input(Path(name)).stem == stem


@pytest.mark.parametrize(
    ("name", "answer", "beside", "in_out"),
    [
        ("x.nii.gz", "mask.nii.gz", "in/day/x_mask.nii.gz", "out/day/x_mask.nii.gz"),
        ("x.png", "../../etc/passwd", "in/day/x_passwd", "out/day/x_passwd"),
        ("scans.zip", "a/x_mask.png", "in/day/scans/a/x_mask.png", "out/day/scans/a/x_mask.png"),
        ("scans.zip", "/../../x_mask.png", "in/day/scans/x_mask.png", "out/day/scans/x_mask.png"),
        ("zip", "x_mask.png", "in/day/zip_answers/x_mask.png", "out/day/zip_answers/x_mask.png"),
    ],
)
def test_output_stays_in_its_folder(tmp_path: Path, name: str, answer: str, beside: str, in_out: str) -> None:
    path = tmp_path / "in" / "day" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK\x03\x04" if "zip" in name else b"")
    one = Input(path, PurePath("day"))
    assert one.output(None, answer) == tmp_path / beside
    assert one.output(tmp_path / "out", answer) == tmp_path / in_out


@pytest.mark.parametrize(
    ("files", "options", "valid"),
    [
        (["a.png", "b.png", "day 2/a.png"], {}, True),
        (["a.png", "a.jpg"], {}, False),
        (["a.png", "day 2/a.png"], {"out": "out"}, False),
        (["a.png", "a_mask.png"], {}, False),
        (["a.png", "a_mask.tif"], {}, False),
        (["a.png", "a_mask.png"], {"out": "out"}, True),
        (["a.png", "a_mask.png"], {"out": "."}, False),
        (["a.png"], {"output": "a.png"}, False),
        (["a.png"], {"output": "link.png"}, False),
        (["a.png"], {"output": "x.png"}, True),
        (["a.png"], {"output": "none/x.png"}, False),
        (["a.png", "b.png"], {"output": "x.png"}, False),
        (["a.zip"], {"output": "x.png"}, False),
        (["a.png"], {"references": ["a_mask.png"]}, False),
        (["a.png"], {"references": ["truth/a.png"]}, True),
    ],
)
def test_outputs_overwrite_nothing(
    tmp_path: Path, files: list[str], options: dict[str, Any], valid: bool
) -> None:
    for name in ("a.png", "a.jpg", "a_mask.png", "a_mask.tif", "b.png", "day 2/a.png", "truth/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    inputs = [Input(tmp_path / name) for name in files]
    out, output = (tmp_path / options[key] if key in options else None for key in ("out", "output"))
    references = [tmp_path / name for name in options.get("references", [])]
    if valid:
        check_outputs(inputs, out, output, references)
    else:
        with pytest.raises(InputError):
            check_outputs(inputs, out, output, references)


def test_references_have_stem_and_folder_of_their_input(folder: Path, tmp_path: Path) -> None:
    truth = tmp_path / "truth"
    (truth / "day 2").mkdir(parents=True)
    for name in ("a.tif", "b.png", "day 2/a.png"):
        (truth / name).touch()
    one, several = collected(folder / "a.png"), collected(folder)
    assert match_references(None, one) == {}
    assert match_references(truth / "b.png", one) == {one[0]: truth / "b.png"}
    for reference, inputs in ((truth, several), (truth / "b.png", several), (tmp_path / "none", one)):
        with pytest.raises(InputError):
            match_references(reference, inputs)
    (truth / "day 2" / "ü.png").touch()
    matched = [path.relative_to(truth).as_posix() for path in match_references(truth, several).values()]
    assert matched == ["a.tif", "b.png", "day 2/a.png", "day 2/ü.png"]


def test_folder_with_a_dicom_series_is_one_input(tmp_path: Path) -> None:
    series = tmp_path / "CT.1"
    series.mkdir()
    for name in ("a", "b.ima"):
        (series / name).write_bytes(bytes(128) + b"DICM" + name.encode())
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    for argument, out in ((tmp_path, tmp_path), (series, tmp_path)):
        (one,) = collect([str(argument)], recursive=True, out=None)
        assert (one.path, one.stem, one.is_archive) == (series, "CT.1", False)
        assert one.output(None, "mask.nii.gz") == out / "CT.1_mask.nii.gz"
    with zip_series(series) as file, zipfile.ZipFile(file) as packed:
        assert sorted(packed.read(name)[132:] for name in packed.namelist()) == [b"a", b"b.ima"]
        assert not {"a", "b.ima"} & set(packed.namelist())
    before = sha256(series)
    (series / "a").rename(series / "c")
    assert sha256(series) == before
    (series / "c").write_bytes(bytes(128) + b"DICM")
    assert sha256(series) != before


def test_zip_of_a_dicom_series_has_one_answer(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("readme.txt", "text")
        packed.writestr("1", bytes(128) + b"DICM")
    assert not Input(path).is_archive
