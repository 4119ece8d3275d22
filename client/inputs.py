"""Which files the command line means, and where their answers go."""

import functools
import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from client.errors import InputError
from client.files import is_archive, is_dicom_file, printable

# File types that are taken from a folder; a file that is named itself is always tried, because the server
# looks at its content.
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".nii", ".nii.gz", ".nrrd", ".mha")

# File names without suffix of answers that are pictures: x_mask.png beside x.png is not an input.
ANSWERS = ("mask", "mask_1bit", "labels", "score", "scores", "overlay", "picture", "uncertainty", "levels")

LISTED = 5
TOP = PurePath()


@dataclass(frozen=True)
class Input:
    """One input: a file, or a folder with the files of a DICOM series.

    Attributes:
        path: path of the file or folder.
        folder: its folder, relative to the folder on the command line.
    """

    path: Path
    folder: PurePath = TOP

    @property
    def stem(self) -> str:
        """The file name without its type; of x.nii.gz it is x. Of a folder it is the whole name."""
        if self.path.is_dir():
            return self.path.resolve().name
        return self.path.stem if self.path.suffix != ".gz" else PurePath(self.path.stem).stem

    @functools.cached_property
    def is_archive(self) -> bool:
        """Whether it is a zip of images, which has many answers."""
        return is_archive(self.path)

    def output_folder(self, out: Path | None) -> Path:
        """The folder of its answers."""
        return self.path.parent if out is None else out / self.folder

    def output(self, out: Path | None, name: str) -> Path:
        """The path of an answer called `name` by the server, whose folders count only for a zip, and never lead upwards."""
        parts = [part for part in PurePosixPath(name).parts if part.strip("./")]
        if self.is_archive:
            # A zip whose name has no suffix occupies the name of the folder.
            folder = self.stem if self.path.suffix else f"{self.stem}_answers"
            return self.output_folder(out).joinpath(folder, *parts)
        return self.output_folder(out) / f"{self.stem}_{parts[-1]}"


def collect(arguments: Iterable[str], *, recursive: bool, out: Path | None) -> list[Input]:
    """Lists the inputs: files, the content of folders but `out`, and matches of patterns, each once.

    Raises:
        InputError: a file does not exist, or a folder has no input.
    """
    inputs: dict[Path, Input] = {}
    for argument in arguments:
        files: list[Input] = []
        for path, base in _expand(argument):
            one = Input(path, _relative(path.parent, base))
            files += _walk(path, base, recursive, out) if path.is_dir() else [one]
        if not files:
            hint = "" if recursive else "; folders in it are not searched without --recursive"
            raise InputError(
                f"{argument}: no image or volume in it (file types: {', '.join(SUFFIXES)}, and DICOM){hint}"
            )
        for one in files:
            inputs.setdefault(one.path.absolute(), one)
    return list(inputs.values())


def _expand(argument: str) -> Iterator[tuple[Path, Path]]:
    """Yields paths, and the folder that their own folders are relative to."""
    path = Path(argument)
    if path.exists():
        yield path, path if path.is_dir() else path.parent
        return
    matches = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207 - the pattern may be absolute
    if not matches:
        raise InputError(
            f"{argument} matches no file" if glob.has_magic(argument) else f"{argument} does not exist"
        )
    base = Path(*path.parts[: next(i for i, part in enumerate(path.parts) if glob.has_magic(part))])
    yield from ((Path(match), base) for match in matches)


def _walk(folder: Path, base: Path, recursive: bool, out: Path | None) -> Iterator[Input]:
    """Yields the inputs in a folder in order, without hidden files and without answers to other inputs in it."""

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}")

    skipped = out.resolve() if out else None
    for place, folders, names in os.walk(folder, onerror=fail):
        here = Path(place)
        visible = sorted(name for name in (*folders, *names) if not name.startswith("."))
        folders[:] = [
            name for name in visible if recursive and name in folders and (here / name).resolve() != skipped
        ]
        # The DICOM files in a folder, of any names, are one series.
        if any(is_dicom_file(here / name) for name in visible if name in names):
            yield Input(here, _relative(here.parent, base))
        images = [name for name in visible if name in names and name.lower().endswith(SUFFIXES)]
        files = [Input(here / name, _relative(here, base)) for name in images]
        answers = {f"{one.stem}_{answer}" for one in files for answer in ANSWERS}
        yield from (one for one in files if one.stem.removesuffix(".seg") not in answers)


def _relative(folder: Path, base: Path) -> PurePath:
    return folder.relative_to(base) if folder.is_relative_to(base) else PurePath()


def check_outputs(
    inputs: list[Input],
    out: Path | None,
    output: Path | None,
    references: Iterable[Path] = (),
    answers: tuple[str, ...] = ANSWERS,
) -> None:
    """Refuses answers that would overwrite an input, a reference or another answer.

    Args:
        inputs: all inputs.
        out: folder of the answers; beside the inputs if None.
        output: file of the only answer instead.
        references: references of the inputs.
        answers: names of the answers, without suffix.
    """
    if output:
        if len(inputs) > 1 or inputs[0].is_archive:
            many = "a zip of images" if len(inputs) == 1 else f"{len(inputs)} inputs"
            raise InputError(f"-o names one file, but {many} have several answers; use --out FOLDER")
        if not output.parent.is_dir():
            raise InputError(f"{output.parent} is not a folder")
    taken = {path.resolve(): path for path in (*references, *(one.path for one in inputs))}
    if output is None:
        # Of which type the answers will be only the server knows.
        taken = {path.parent / Input(path).stem.removesuffix(".seg"): path for path in taken}
    for one in inputs:
        places = [output] if output else [one.output(out, answer) for answer in answers]
        if clash := next((taken[place.resolve()] for place in places if place.resolve() in taken), None):
            raise InputError(
                f"an answer to {printable(one.path)} would overwrite {printable(clash)}, "
                "an input or a reference; use --out FOLDER"
            )
    names = Counter(one.output_folder(out).resolve() / one.stem for one in inputs)
    same = [one.path for one in inputs if names[one.output_folder(out).resolve() / one.stem] > 1]
    if same:
        raise InputError(
            f"the answers to these inputs would have the same name: {_list(same)}; segment them in separate runs"
        )


def match_references(reference: Path | None, inputs: list[Input]) -> dict[Input, Path]:
    """Finds the reference of each input: the file itself for one input, else the file of the same stem and folder in a folder.

    Raises:
        InputError: references are missing.
    """
    if reference is None:
        return {}
    if reference.is_file() and len(inputs) == 1:
        return {inputs[0]: reference}
    if not reference.is_dir():
        problem = f"is one file for {len(inputs)} inputs" if reference.exists() else "does not exist"
        raise InputError(
            f"--reference {reference} {problem}; name a file for one input, or a folder for several"
        )
    known = {
        (folder, Input(path).stem): path
        for folder in {one.folder for one in inputs}
        for path in sorted((reference / folder).glob("*"))
        if path.is_file()
    }
    if missing := [one.path for one in inputs if (one.folder, one.stem) not in known]:
        raise InputError(
            f"{reference} has no reference for {_list(missing)}; references have the name and folder of their input"
        )
    return {one: known[one.folder, one.stem] for one in inputs}


def _list(paths: list[Path]) -> str:
    more = f" and {len(paths) - LISTED} more" if len(paths) > LISTED else ""
    return ", ".join(map(printable, paths[:LISTED])) + more
