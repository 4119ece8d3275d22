import os
from pathlib import Path, PurePath

import pytest

from client import inputs
from client.inputs import ANSWERS, Input, InputError, check, collect, references
from server.imaging.encode import ENCODERS


def names(found: list[Input], home: Path) -> list[str]:
    return [one.path.relative_to(home).as_posix() for one in found]


def collected(*typed: object, recursive: bool = True, out: Path | None = None) -> list[Input]:
    return collect([str(one) for one in typed], recursive=recursive, out=out)


def test_a_folder(folder: Path) -> None:
    (folder / "notes.txt").touch()
    (folder / ".hidden.png").touch()
    (folder / ".thumbs").mkdir()
    (folder / ".thumbs" / "x.png").touch()
    found = collected(folder)
    assert names(found, folder) == ["a.png", "b.png", "day 2/a.png", "day 2/ü.tif"]
    assert [one.folder.as_posix() for one in found] == [".", ".", "day 2", "day 2"]
    assert names(collected(folder, recursive=False), folder) == ["a.png", "b.png"]


def test_answers_are_no_inputs(folder: Path) -> None:
    before = collected(folder)
    for one in before:
        for name in ANSWERS:
            one.answer(None, name).touch()
    assert collected(folder) == before
    # But a file that is named itself is meant.
    assert names(collected(folder / "a_mask.png"), folder) == ["a_mask.png"]
    (folder / "lonely_mask.png").touch()
    assert "lonely_mask.png" in names(collected(folder), folder)


def test_the_folder_of_answers_holds_none(folder: Path) -> None:
    out = folder / "out"
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "x.png").touch()
    assert len(collected(folder, out=out)) == 4


def test_patterns_that_the_shell_left(folder: Path) -> None:
    assert names(collected(folder / "*.png"), folder) == ["a.png", "b.png"]
    found = collected(folder / "**/a.*")
    assert names(found, folder) == ["a.png", "day 2/a.png"]
    assert [one.folder.as_posix() for one in found] == [".", "day 2"]
    assert len(collected(folder / "*")) == 4
    (folder / "[1].png").touch()
    assert names(collected(folder / "[1].png"), folder) == ["[1].png"]


def test_the_same_file_counts_once(folder: Path) -> None:
    assert len(collected(folder, folder / "a.png", folder / "*.png", folder / "day 2")) == 4


@pytest.mark.parametrize(
    ("typed", "words"), [("none.png", "does not exist"), ("*.gif", "nothing matches"), ("empty", "no image or volume")]
)
def test_nothing(tmp_path: Path, typed: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=words):
        collected(tmp_path / typed)


def test_a_folder_of_folders_alone(folder: Path) -> None:
    with pytest.raises(InputError, match="left out"):
        collected(folder.parent, recursive=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_closed_folder(folder: Path) -> None:
    (folder / "day 2").chmod(0)
    try:
        with pytest.raises(InputError, match="cannot be read"):
            collected(folder)
    finally:
        (folder / "day 2").chmod(0o700)


@pytest.mark.parametrize(
    ("name", "stem"),
    [("x.png", "x"), ("x.nii.gz", "x"), ("scan.v2.nii.gz", "scan.v2"), ("x.seg.nrrd", "x.seg"), ("x", "x"), ("x.gz", "x")],
)
def test_stems(name: str, stem: str) -> None:
    assert Input(Path(name)).stem == stem


def test_where_answers_go(tmp_path: Path) -> None:
    one = Input(tmp_path / "in" / "day" / "x.nii.gz", PurePath("day"))
    assert one.answer(None, "mask.nii.gz") == tmp_path / "in" / "day" / "x_mask.nii.gz"
    assert one.answer(tmp_path / "out", "mask.nii.gz") == tmp_path / "out" / "day" / "x_mask.nii.gz"
    assert one.answer(None, "../../etc/passwd") == tmp_path / "in" / "day" / "x_passwd"
    (tmp_path / "scans.zip").write_bytes(b"PK\x03\x04")
    archive = Input(tmp_path / "scans.zip")
    assert archive.answer(None, "a/x_mask.png") == tmp_path / "scans" / "a" / "x_mask.png"
    assert archive.answer(tmp_path / "out", "/../../x_mask.png") == tmp_path / "out" / "scans" / "x_mask.png"


def test_the_same_name_twice(folder: Path, tmp_path: Path) -> None:
    (folder / "a.jpg").touch()
    with pytest.raises(InputError, match=r"a\.jpg.*a\.png.*--out"):
        check(collected(folder), None, None)
    (folder / "a.jpg").unlink()
    check(collected(folder), None, None)
    check(collected(folder), tmp_path / "out", None)
    # Two files of one name from two folders, into one.
    with pytest.raises(InputError, match="same name"):
        check(collected(folder / "a.png", folder / "day 2" / "a.png"), tmp_path / "out", None)
    check(collected(folder / "a.png", folder / "day 2" / "a.png"), None, None)


def test_no_input_is_overwritten(folder: Path, tmp_path: Path) -> None:
    (folder / "a_mask.png").touch()
    both = collected(folder / "a.png", folder / "a_mask.png")
    with pytest.raises(InputError, match="an input or a reference"):
        check(both, None, None)
    check(both, tmp_path / "out", None)
    with pytest.raises(InputError, match="an input or a reference"):
        check(collected(folder / "a.png"), None, folder / "a.png")
    with pytest.raises(InputError, match="an input or a reference"):
        check(both, folder, None)
    (tmp_path / "link.png").symlink_to(folder / "a.png")
    with pytest.raises(InputError, match="an input or a reference"):
        check(collected(folder / "a.png"), None, tmp_path / "link.png")


def test_no_reference_is_overwritten(folder: Path) -> None:
    """Labels often lie beside their images, by this very name."""
    (folder / "a_mask.png").touch()
    one = collected(folder / "a.png")
    check(one, None, None)
    with pytest.raises(InputError, match="an input or a reference"):
        check(one, None, None, references(folder / "a_mask.png", one).values())


def test_one_output_for_many(folder: Path) -> None:
    with pytest.raises(InputError, match="4 inputs"):
        check(collected(folder), None, folder / "x.png")
    with pytest.raises(InputError, match="not a folder"):
        check(collected(folder / "a.png"), None, folder / "none" / "x.png")


def test_references(folder: Path, tmp_path: Path) -> None:
    one = collected(folder / "a.png")
    truth = tmp_path / "truth"
    (truth / "day 2").mkdir(parents=True)
    for name in ("a.tif", "b.png", "day 2/a.png"):
        (truth / name).touch()
    assert references(None, one) == {}
    assert references(truth / "b.png", one) == {one[0]: truth / "b.png"}
    with pytest.raises(InputError, match=r"ü\.tif"):
        references(truth, collected(folder))
    (truth / "day 2" / "ü.png").touch()
    assert [path.relative_to(truth).as_posix() for path in references(truth, collected(folder)).values()] == [
        "a.tif", "b.png", "day 2/a.png", "day 2/ü.png",
    ]  # fmt: skip
    with pytest.raises(InputError, match="name the folder"):
        references(truth / "b.png", collected(folder))
    with pytest.raises(InputError, match="does not exist"):
        references(tmp_path / "none", one)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"bad\xff.png")
    try:
        path.touch()
    except OSError:
        pytest.skip("this file system takes text only")
    (one,) = collected(tmp_path)
    assert one.shown.endswith(r"bad\xff.png")


def test_all_pictures_of_the_server_are_known_as_answers() -> None:
    pictures = {row.file for row in ENCODERS.values() if row.file.endswith(inputs.SUFFIXES)}
    assert pictures <= set(ANSWERS)
