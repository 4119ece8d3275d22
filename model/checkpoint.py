"""Weights and configuration in one safetensors file. No pickle, ever."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.baselines import ARCHITECTURES
from model.config import UNetPlusPlusConfig

FORMAT = "unetpp.checkpoint/1"


class CheckpointError(ValueError):
    """The file is not a checkpoint that this version can read."""


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` only when the block has finished: never a half-written file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # Readable by the user that serves it, because safetensors writes for the owner alone.
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def metadata_of(network: nn.Module, notes: dict[str, Any] | None = None) -> dict[str, str]:
    """The checkpoint's metadata: format, architecture, configuration, and notes (JSON)."""
    config = network.config
    if not isinstance(config, UNetPlusPlusConfig):
        raise TypeError("network.config must be a UNetPlusPlusConfig")
    architecture = next(name for name, cls in ARCHITECTURES.items() if isinstance(network, cls))
    return {
        "format": FORMAT,
        "architecture": architecture,
        "config": config.model_dump_json(),
        "notes": json.dumps(notes or {}),
    }


def save(network: nn.Module, path: Path, notes: dict[str, Any] | None = None) -> None:
    """Writes the network's weights and configuration atomically.

    Args:
        network: a `UNetPlusPlus` or `UNet`.
        path: the safetensors file to write.
        notes: JSON-serialisable provenance (normalisation, data, scores, ...) kept in the metadata.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata=metadata_of(network, notes))


def load(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Reads a checkpoint.

    Returns:
        The network on the CPU in float32 and evaluation mode, and its notes.

    Raises:
        CheckpointError: not a safetensors file, not ours, or the tensors do not fit the configuration.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: a safetensors file, but not a UNet++ checkpoint (its format says "
            f"{metadata.get('format')!r}, expected {FORMAT!r}). Write one with `unetpp train`."
        )
    try:
        config = UNetPlusPlusConfig.model_validate_json(metadata["config"])
        architecture, notes = ARCHITECTURES[metadata["architecture"]], json.loads(metadata["notes"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged or of another version: {error!r}") from error
    with torch.device("meta"):
        network = architecture(config)
    try:
        floats = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
        network.load_state_dict(floats, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the tensors do not fit the configuration: {error}") from error
    return network.eval(), notes
