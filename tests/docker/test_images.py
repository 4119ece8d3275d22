"""The images, as far as their recipes show."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from server.imaging.decode import tiff
from tests.conftest import ROOT
from tests.docker.conftest import DOCKER, script

DOCKERFILES = {name: (DOCKER / f"{name}.Dockerfile").read_text() for name in ("serve", "serve-gpu")}
each = pytest.mark.parametrize("text", DOCKERFILES.values(), ids=DOCKERFILES)

# Which codec of imagecodecs reads a compression of TIFF.
CODEC_OF = {
    "LZW": "_imcd.", "PACKBITS": "_imcd.", "DEFLATE": "_deflate.", "ADOBE_DEFLATE": "_deflate.", "ZSTD": "_zstd.", "LZMA": "_lzma.",
    "CCITTRLE": "_ccitt.", "CCITT_T4": "_ccitt.", "CCITT_T6": "_ccitt.",
}  # fmt: skip


def environment(text: str) -> dict[str, str]:
    """What the last stage sets."""
    (line,) = re.findall(r"^ENV (.*)$", text.replace("\\\n", ""), re.MULTILINE)
    return dict(pair.split("=", 1) for pair in line.split())


@each
def test_serves_as_nobody_in_particular_and_from_what_was_installed(text: str) -> None:
    last = text[text.rindex("FROM ") :]
    assert re.search(r"^USER [1-9]\d+:[1-9]\d+$", last, re.MULTILINE)
    assert 'ENTRYPOINT ["unetpp"]\nCMD ["serve"]' in last
    assert "HEALTHCHECK" in last
    assert not re.search(r"curl|apt-get|^ADD |^RUN ", last, re.MULTILINE)
    assert {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}.items() <= environment(text).items()
    assert re.search(r"^FROM python:\d+\.\d+\.\d+-slim-bookworm AS base$", text, re.MULTILINE), "the base image may change unseen"


def test_gpu_image_is_the_cpu_image_with_other_packages() -> None:
    def lines(name: str) -> list[str]:
        text = re.sub(r"^# .*\n", "", DOCKERFILES[name], flags=re.MULTILINE).replace(" \\\n", "\n")
        return [line.replace("EXTRAS=cpu", "EXTRAS=…").replace("EXTRAS=gpu", "EXTRAS=…") for line in text.splitlines()]

    gpu = "\n".join(lines("serve-gpu"))
    for only in (r"\n +NVIDIA_\w+=\S+", " docker/cuda.txt", " --constraint /build/cuda.txt"):
        gpu, found = re.subn(only, "", gpu)
        assert found
    assert gpu.splitlines() == lines("serve")


@each
def test_variables_are_settings(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.settings import Settings, unknown_variables

    for name, value in environment(text).items():
        if name.startswith("UNETPP_"):
            monkeypatch.setenv(name, value)
    assert unknown_variables() == []
    settings = Settings()
    assert settings.http.ops_port == 9000
    assert settings.http.ops_host == "127.0.0.1"


def test_no_file_is_copied_that_the_context_lacks() -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    lines = [line for text in DOCKERFILES.values() for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE)]
    assert {source for line in lines for source in line.split() if not source.startswith("--")} == let_in


def test_tiff_reads_all_its_compressions_with_the_codecs_that_stay(tmp_path: Path) -> None:
    """In a process of its own, with a copy of imagecodecs that was trimmed as in the image."""
    import imagecodecs

    trim = script("trim.py")
    assert {CODEC_OF[name] for name in tiff.COMPRESSIONS - {"NONE"}} <= set(trim.CODECS)
    packages = Path(imagecodecs.__file__).parents[1]
    if not list((packages / "imagecodecs").glob("_imcd.*.so")):
        pytest.skip("knows the files of Linux wheels only")
    for folder, kept in (("imagecodecs", trim.CODECS), ("imagecodecs.libs", trim.CODEC_LIBRARIES)):
        (tmp_path / folder).mkdir()
        for file in (packages / folder).iterdir():
            if file.is_file() and (file.name.startswith(kept) or file.suffix == ".py"):
                shutil.copy(file, tmp_path / folder)
    reads = f"""
import io, sys
sys.path.insert(0, {str(tmp_path)!r})
import imagecodecs, numpy, tifffile
assert imagecodecs.__file__.startswith({str(tmp_path)!r})
pixels = numpy.arange(64 * 64 * 3, dtype=numpy.uint8).reshape(64, 64, 3)
for compression in ("LZW", "DEFLATE", "ADOBE_DEFLATE", "PACKBITS", "ZSTD", "LZMA"):
    for dtype, predictor in (("uint8", False), ("uint16", True), ("float32", True)):
        predictor = predictor and compression != "PACKBITS"
        file = io.BytesIO()
        tifffile.imwrite(file, pixels.astype(dtype), compression=compression, predictor=predictor, photometric="rgb")
        file.seek(0)
        assert (tifffile.imread(file) == pixels).all(), compression
assert imagecodecs.CCITTRLE.available and imagecodecs.CCITTFAX3.available and imagecodecs.CCITTFAX4.available
assert not imagecodecs.JPEG8.available
"""
    subprocess.run([sys.executable, "-P", "-c", reads], check=True)


def test_trim_finds_each_of_its_rows_in_the_packages_as_pinned() -> None:
    import imagecodecs

    packages = Path(imagecodecs.__file__).parents[1]
    if not list(packages.glob("imagecodecs/_imcd.*.so")):
        pytest.skip("knows the files of Linux wheels only")
    found = script("trim.py").unwanted(packages)
    names = {path.name.split(".")[0] for path in found if path.suffix != ".pyi"}
    assert {"_jpeg2k", "_avif", "tests"} <= names
    assert not {"_imcd", "_zstd"} & names


def test_server_uses_of_scipy_what_stays() -> None:
    kept = script("trim.py").SCIPY
    for file in (ROOT / "server").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                imported = [f"{node.module}.{alias.name}" for alias in node.names]
            used = {name.split(".")[1] for name in imported if name.startswith("scipy.")}
            assert used <= set(kept), file
            assert "scipy" not in imported, file


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint(name: str) -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint")
    subprocess.run([hadolint, DOCKER / f"{name}.Dockerfile"], check=True)
