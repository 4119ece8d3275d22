"""Which files are meant by what was typed, and what their answers are called."""

import functools
import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from client.sources import is_zip

# What is taken from a folder; whatever is named itself is tried. The server knows files by what is in them.
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".nii", ".nii.gz", ".nrrd", ".mha")  # fmt: skip

# What the server calls its files, which follows the input's name: an answer in a folder is no further input.
ANSWERS = (
    "mask.png", "mask_1bit.png", "mask.tif", "mask.nii.gz", "mask.seg.nrrd", "labels.png", "labels.tif", "labels.nii.gz",
    "score.png", "scores.tif", "scores.nii.gz", "overlay.png", "overlay.jpg", "picture.png",
    "uncertainty.png", "uncertainty.tif", "uncertainty.nii.gz", "levels.png",
)  # fmt: skip

SHOWN = 5
HERE = PurePath()


class InputError(Exception):
    """Said before anything is begun."""


@dataclass(frozen=True)
class Input:
    """One file.

    Attributes:
        path: where it is.
        folder: the folder in which it was found, below the one that was typed; "." of a file that was named.
    """

    path: Path
    folder: PurePath = HERE

    @property
    def stem(self) -> str:
        """Its name without what says the format; of x.nii.gz it is x."""
        name = self.path.name
        return PurePath(name.removesuffix(".gz")).stem if name.endswith(".gz") else self.path.stem

    @property
    def shown(self) -> str:
        """Its path as text, also where a name is none."""
        return shown(self.path)

    @functools.cached_property
    def is_archive(self) -> bool:
        """Whether it is a zip of images, whose answers are many."""
        return is_zip(self.path)

    def home(self, out: Path | None) -> Path:
        """The folder of its answers."""
        return self.path.parent if out is None else out / self.folder

    def answer(self, out: Path | None, name: str) -> Path:
        """Where a file of its answer goes; of an archive's into a folder of its name, as there are many."""
        # The server's names lead nowhere else, even if they try.
        parts = [part for part in PurePosixPath(name).parts if part.strip("./")]
        if self.is_archive:
            # Where its name has no suffix, a folder of that name cannot stand beside it.
            return self.home(out).joinpath(self.stem if self.path.suffix else f"{self.stem}_answers", *parts)
        return self.home(out) / f"{self.stem}_{parts[-1]}"


def shown(path: Path) -> str:
    """A path as text; what is none in it is escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def collect(typed: Iterable[str], *, recursive: bool, out: Path | None) -> list[Input]:
    """The inputs: files, what is in folders, and what patterns match.

    Args:
        typed: paths and patterns.
        recursive: whether folders in folders are looked into.
        out: the folder of answers, which holds no inputs.

    Raises:
        InputError: there is no such file, or nothing in a folder.
    """
    found: dict[Path, Input] = {}
    for text in typed:
        matches = [
            one
            for path, base in _expand(text)
            for one in (
                _walk(path, base, recursive=recursive, out=out) if path.is_dir() else [Input(path, _below(path.parent, base))]
            )
        ]
        if not matches:
            deeper = "" if recursive else ", folders in it left out"
            raise InputError(f"{text}: no image or volume in it{deeper} (names end with {', '.join(SUFFIXES)})")
        for one in matches:
            found.setdefault(one.path.absolute(), one)
    return list(found.values())


def _expand(text: str) -> Iterator[tuple[Path, Path]]:
    """Paths and the folder from which their own folders are counted."""
    path = Path(text)
    if path.exists():
        yield path, path if path.is_dir() else path.parent
        return
    if not glob.has_magic(text):
        raise InputError(f"{text} does not exist")
    matches = sorted(glob.glob(text, recursive=True))  # noqa: PTH207 - it may be absolute
    if not matches:
        raise InputError(f"{text}: nothing matches")
    parts = path.parts
    base = Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
    # A folder and what is in it are the same files once.
    yield from ((Path(match), base) for match in matches)


def _walk(folder: Path, base: Path, *, recursive: bool, out: Path | None) -> Iterator[Input]:
    """What looks like an input in a folder, in order."""

    def closed(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}")

    for place, folders, names in os.walk(folder, onerror=closed):
        here = Path(place)
        folders[:] = sorted(name for name in folders if recursive and not name.startswith("."))
        folders[:] = [name for name in folders if out is None or not _same(here / name, out)]
        files = [Input(here / name, _below(here, base)) for name in sorted(names) if _fits(name)]
        answers = {f"{one.stem}_{name}" for one in files for name in ANSWERS}
        yield from (one for one in files if one.path.name not in answers)


def _fits(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def _below(folder: Path, base: Path) -> PurePath:
    return folder.relative_to(base) if folder.is_relative_to(base) else PurePath()


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def check(inputs: list[Input], out: Path | None, output: Path | None, references: Iterable[Path] = ()) -> None:
    """Refuses what would overwrite an input, a reference or another answer.

    Raises:
        InputError: names the files.
    """
    if output:
        if len(inputs) > 1:
            raise InputError(f"-o names one file, and there are {len(inputs)} inputs; use --out FOLDER")
        if inputs[0].is_archive:
            raise InputError("-o names one file, but the answer to a zip of images has many; use --out FOLDER")
        if not output.parent.is_dir():
            raise InputError(f"{output.parent} is not a folder")
    own = {path.resolve() for path in (*references, *(one.path for one in inputs))}
    places = {one: [one.answer(out, name) for name in ANSWERS] if output is None else [output] for one in inputs}
    if over := [(one, place) for one in inputs for place in places[one] if place.resolve() in own]:
        one, place = over[0]
        raise InputError(
            f"the answer to {one.shown} would be {Input(place).shown}, which is an input or a reference itself; use --out FOLDER"
        )
    homes = {one: one.home(out).resolve() / one.stem for one in inputs}
    twice = {home for home, times in Counter(homes.values()).items() if times > 1}
    if same := [one.shown for one in inputs if homes[one] in twice]:
        more = f" and {len(same) - SHOWN} more" if len(same) > SHOWN else ""
        raise InputError(
            f"the answers to these would have the same name: {', '.join(same[:SHOWN])}{more}; segment them apart, with --out FOLDER"
        )


def references(given: Path | None, inputs: list[Input]) -> dict[Input, Path]:
    """The reference of each input: the file itself for one input, else the file of the same name, whatever its format, in a folder like its own.

    Raises:
        InputError: references are missing.
    """
    if given is None:
        return {}
    if given.is_file():
        if len(inputs) > 1:
            raise InputError(
                f"--reference {given} is one file, and there are {len(inputs)} inputs; name the folder of the references"
            )
        return {inputs[0]: given}
    if not given.is_dir():
        raise InputError(f"--reference {given} does not exist")
    known: dict[PurePath, dict[str, Path]] = {}
    for folder in {one.folder for one in inputs}:
        place = given / folder
        known[folder] = {Input(path).stem: path for path in sorted(place.iterdir()) if path.is_file()} if place.is_dir() else {}
    missing = [one.shown for one in inputs if one.stem not in known[one.folder]]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise InputError(
            f"no reference in {given} for {', '.join(missing[:SHOWN])}{more}; references have the name of their input, in the same folders"
        )
    return {one: known[one.folder][one.stem] for one in inputs}
