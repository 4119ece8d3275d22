"""Takes out of an image's site-packages what this server cannot reach. Run while the image is built: python trim.py SITE_PACKAGES.

Each row is a glob and why nothing is lost. A glob that finds nothing fails the build: a package has moved, look again.
"""

import shutil
import sys
from pathlib import Path

EVERYWHERE = {
    "**/tests": "tests of the packages",
    "**/*.pyi": "types",
    "pillow.libs/libavif-*": "AVIF is not among the formats that are opened",
    "PIL/_avif.*.so": "the same",
    "onnxruntime/transformers": "for those who make graphs",
    "onnxruntime/quantization": "the same",
    "onnxruntime/tools": "the same",
}

# Only in the CPU image.
CPU = {
    "onnxruntime/capi/libonnxruntime.so.*": "for programs in C; Python's module has its own in it",
    "openvino/libs/libopenvino_intel_gpu_plugin.so": "graphs are compiled for CPU, by name",
    "openvino/libs/libopenvino_intel_npu_plugin.so": "the same",
    "openvino/libs/cache.json": "kernels of the GPU plugin",
    "openvino/libs/libopenvino_tensorflow*_frontend.so.*": "ONNX is the one format that is read",
    "openvino/libs/libopenvino_pytorch_frontend.so.*": "the same",
    "openvino/libs/libopenvino_paddle_frontend.so.*": "the same",
    "openvino/libs/libopenvino_jax_frontend.so.*": "the same",
    "openvino/libs/libopenvino_gguf_frontend.so.*": "the same",
    "openvino/include": "headers",
    "openvino/cmake": "build files",
}

# Of SciPy the server uses ndimage and the graphs of sparse, which need these.
SCIPY = ("ndimage", "sparse", "linalg", "special", "_lib")

# The compressions of server/imaging/decode/tiff.py; every further codec is a parser of strangers' bytes that nobody calls.
CODECS = ("_imcd.", "_ccitt.", "_deflate.", "_zlib.", "_zstd.", "_lzma.", "_shared.", "_shared_cython.")
CODEC_LIBRARIES = ("libdeflate-", "libzstd-", "liblzma-")


def unwanted(packages: Path) -> list[Path]:
    """Files and folders to remove."""
    globs = EVERYWHERE | (CPU if (packages / "openvino").is_dir() else {})
    found: list[Path] = []
    for glob in globs:
        hits = list(packages.glob(glob))
        if not hits:
            sys.exit(f"{glob}: nothing there any more")
        found += hits
    for glob, kept in (("imagecodecs/*.so", CODECS), ("imagecodecs.libs/*", CODEC_LIBRARIES), ("scipy/*/", SCIPY)):
        files = list(packages.glob(glob))
        missing = [name for name in kept if not any(file.name.startswith(name) for file in files)]
        if missing:
            sys.exit(f"{glob}: no {missing}")
        found += [file for file in files if not file.name.startswith(kept)]
    return found


def main(packages: Path) -> None:
    """Removes them and says how much that was."""
    freed = 0
    for path in filter(Path.exists, unwanted(packages)):  # else within a folder that is gone
        if path.is_dir():
            freed += sum(file.lstat().st_size for file in path.rglob("*"))
            shutil.rmtree(path)
        else:
            freed += path.lstat().st_size
            path.unlink()
    sys.stdout.write(f"removed {freed / 1e6:.0f} MB\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
