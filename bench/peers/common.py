"""Steps that every peer takes with a request, so that each peer's own file holds only its project's boilerplate.

    PNG (RGB) → pixels → mean and 1 / standard deviation per channel → ONNX Runtime → score > 0.5
    → indexed PNG

Our server takes the same steps and writes PNG with the same parameters. Every peer imports this file in its
own virtual environment, which holds numpy, Pillow and ONNX Runtime.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

# Index 1 of the mask's palette, as in the bundle's manifest.
COLOR = (255, 127, 14)

# Longest time that a batch waits for more requests, in seconds.
BATCH_WAIT_S = 0.002


class Model:
    """Graph of one level.

    Args:
        graph: ONNX file; its weights lie beside it.
        threads: number of threads of one run.
    """

    def __init__(self, graph: Path | str, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that spin after a run take the cores that HTTP and PNG need: at L1 and 16 connections
        # LitServe answered 237 instead of 173 per second without, MLServer 160 instead of 122. Our server
        # does without, too.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def run(self, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """Runs one batch.

        Args:
            images: (h, w, 3) each, all of one size, sides divisible by 16.

        Returns:
            Masks (h, w) of 0 and 1.
        """
        scores = self.session.run(["scores"], feed(images))[0]
        return [foreground(score[0]) for score in scores]

    def answer(self, bodies: Sequence[bytes]) -> list[bytes]:
        """PNG files in, PNG files out, in one batch."""
        return [encode(mask) for mask in self.run([decode(body) for body in bodies])]


def decode(body: bytes) -> NDArray[np.uint8]:
    """Pixels (h, w, 3) of a PNG file."""
    return np.asarray(Image.open(io.BytesIO(body)))


def feed(images: Sequence[NDArray[np.uint8]]) -> dict[str, NDArray[np.float32]]:
    """Makes the graph's inputs: pixels, and statistics per image and channel; the graph itself normalises.

    Returns:
        image (N, 3, h, w), mean (N, 3, 1, 1) and inverse_std (N, 3, 1, 1), float32.
    """
    pixels = np.stack([image.transpose(2, 0, 1) for image in images])
    moments = np.array([[_moments(channel) for channel in image] for image in pixels])
    mean, variance = np.moveaxis(moments, -1, 0)[..., None, None]
    # A constant channel stays constant: zero after the mean is taken off.
    inverse_std = 1 / np.sqrt(np.where(variance > 0, variance, 1))
    feed = {"image": pixels, "mean": mean, "inverse_std": inverse_std}
    return {name: values.astype(np.float32) for name, values in feed.items()}


def _moments(channel: NDArray[np.uint8]) -> tuple[float, float]:
    """Computes mean and variance of (h, w) from its histogram, because that is exact and faster than a float per pixel."""
    values = np.arange(256, dtype=np.float64)
    histogram = np.array(Image.fromarray(channel).histogram(), dtype=np.float64)
    mean = histogram @ values / histogram.sum()
    return mean, histogram @ np.square(values - mean) / histogram.sum()


def foreground(scores: NDArray[np.float32]) -> NDArray[np.uint8]:
    """1 where the score is above one half."""
    return (scores > 0.5).astype(np.uint8)


def encode(mask: NDArray[np.uint8]) -> bytes:
    """Indexed PNG: the index is the class."""
    picture = Image.fromarray(mask)
    picture.putpalette(bytes(3) + bytes(COLOR) + bytes(762))
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=1)
    return out.getvalue()


def arguments() -> argparse.Namespace:
    """Reads --graph, --threads, --max-batch and --port of a peer that is a script."""
    parser = argparse.ArgumentParser()
    for option, kind in {"--graph": Path, "--threads": int, "--max-batch": int, "--port": int}.items():
        parser.add_argument(option, type=kind, required=True)
    return parser.parse_args()
