"""Start of a training run from the weights of a checkpoint, or of a bundle, whose batch normalisation is folded away."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model import checkpoint
from model.config import UNetPlusPlusConfig
from model.cost import CONVOLUTIONS, TRANSPOSED
from model.recipe import RecipeError

# What may differ: heads with further channels, and batch normalisation where the file has it folded into the convolutions.
DIFFERING = {"norm", "classes", "objects"}


def begin_from(path: Path, network: nn.Module, images: Tensor) -> None:
    """Copies the weights of a network of the same shape; channels of a head that mean something else keep their random ones.

    Args:
        path: checkpoint of `unetpp train`, or weights.safetensors of a bundle.
        network: network that is about to be trained.
        images: (N, C, H, W[, D]) of the training data, whose activations give a batch normalisation its scale and
            shift where the file has none.

    Raises:
        RecipeError: the file holds no such network.
    """
    try:
        source, _ = checkpoint.load(path)
    except checkpoint.CheckpointError as error:
        raise RecipeError(str(error)) from error
    mine, theirs = network.config, source.config
    assert isinstance(mine, UNetPlusPlusConfig)  # noqa: S101 - narrows the type
    assert isinstance(theirs, UNetPlusPlusConfig)  # noqa: S101 - narrows the type
    folded = mine.norm == "batch" and theirs.norm == "none"
    if (
        type(source) is not type(network)
        or mine.model_dump(exclude=DIFFERING) != theirs.model_dump(exclude=DIFFERING)
        or not (folded or mine.norm == theirs.norm)
    ):
        raise RecipeError(
            f"{path}: holds {type(source).__name__} {theirs.model_dump_json()}, and the recipe has "
            f"{type(network).__name__} {mine.model_dump_json()}; only classes and objects may differ"
        )
    state = source.state_dict()
    with torch.no_grad():
        for name, own in network.named_parameters():
            if name.startswith("heads."):
                for rows in _same_channels(mine, theirs):
                    own[rows] = state[name][rows]
        biases = _copy_convolutions(network, state) if folded else _copy_rest(network, state)
        if biases:
            _unfold(network, biases, images)


def _same_channels(mine: UNetPlusPlusConfig, theirs: UNetPlusPlusConfig) -> list[slice]:
    """The rows of a head that mean the same in both networks: those of the classes, then that of objects."""
    if mine.classes != theirs.classes:
        return []
    same_objects = mine.objects == theirs.objects
    return [slice(mine.head_channels if same_objects else mine.classes)]


def _copy_rest(network: nn.Module, state: dict[str, Tensor]) -> dict[nn.Module, Tensor]:
    for name, own in network.state_dict().items():
        if not name.startswith("heads."):
            own.copy_(state[name])
    return {}


def _copy_convolutions(network: nn.Module, state: dict[str, Tensor]) -> dict[nn.Module, Tensor]:
    """Copies weights by their order in each node; returns the bias of each batch normalisation's convolution."""
    biases: dict[nn.Module, Tensor] = {}
    theirs = {name.removesuffix(".weight"): name for name in state if name.endswith(".weight")}
    convolutions = [
        name for name, module in network.named_modules() if isinstance(module, CONVOLUTIONS + TRANSPOSED)
    ]
    for name, other in zip(convolutions, theirs, strict=True):
        module = network.get_submodule(name)
        if name.startswith("heads."):
            continue
        weight, bias = state[theirs[other]], state[f"{other}.bias"]
        module.load_state_dict({"weight": weight, "bias": bias}, strict=module.bias is not None)
        if module.bias is None:
            parent, _, index = name.rpartition(".")
            biases[network.get_submodule(f"{parent}.{int(index) + 1}")] = bias
    return biases


def _unfold(network: nn.Module, biases: dict[nn.Module, Tensor], images: Tensor) -> None:
    """Sets each normalisation, in the order of the pass, so that it adds its bias and changes nothing else."""

    def set_affine(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, _BatchNorm)  # noqa: S101 - narrows the type
        axes = (0, *range(2, inputs[0].ndim))
        variance, mean = torch.var_mean(inputs[0].float(), dim=axes, correction=0)
        scale = torch.sqrt(variance + module.eps)
        values = {
            "weight": scale,
            "bias": mean + biases[module],
            "running_mean": mean,
            "running_var": variance,
        }
        module.load_state_dict(values, strict=False)

    hooks = [module.register_forward_pre_hook(set_affine) for module in biases]
    network.train()
    network(images)
    for hook in hooks:
        hook.remove()
