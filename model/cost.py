"""Cost of a network: parameters, and multiply-accumulates of its convolutions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)


def parameters(network: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in network.parameters())


def macs(network: nn.Module, in_channels: int, size: Sequence[int]) -> int:
    """Multiply-accumulates of all (transposed) convolutions for one input of `size` (H, W[, D]).

    Counted on the meta device from the shapes of a real forward pass; nothing is computed.
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, CONVOLUTIONS + TRANSPOSED)  # noqa: S101 - narrows the type
        per_position = module.in_channels * module.out_channels * math.prod(module.kernel_size)
        # A transposed convolution does its work once per input position.
        positions = inputs[0] if isinstance(module, TRANSPOSED) else output
        total += per_position // module.groups * math.prod(positions.shape[2:])

    shadow = _on_meta(network)
    for module in shadow.modules():
        if isinstance(module, CONVOLUTIONS + TRANSPOSED):
            module.register_forward_hook(count)
    with torch.no_grad():
        shadow(torch.empty(1, in_channels, *size, device="meta"))
    return total


def _on_meta(network: nn.Module) -> nn.Module:
    with torch.device("meta"):
        return type(network)(network.config).eval()
