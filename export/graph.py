"""`ServedGraph`: normalise, network, probabilities. Arithmetic that must not drift lives in the graph."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model.config import UNetPlusPlusConfig
from model.network import UNetPlusPlus


class ServedGraph(nn.Module):
    """The computation of one ONNX file.

    The network runs in the dtype of its weights; normalisation and activation always in float32.

    Args:
        network: pruned to a level (one head), or whole (all heads, averaged).
        activation: sigmoid for one class, softmax for several.
        head_std: also returns the standard deviation over the heads, as a last channel.
    """

    def __init__(
        self, network: UNetPlusPlus, activation: Literal["sigmoid", "softmax"], *, head_std: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        self.activation = activation
        self.head_std = head_std

    def forward(self, image: Tensor, mean: Tensor, inverse_std: Tensor) -> Tensor:
        """Computes the mean of the heads' probabilities.

        Args:
            image: (N, C, h, w[, d]) float32 raw values.
            mean: (N, C, 1, 1[, 1]) float32, of the whole image.
            inverse_std: (N, C, 1, 1[, 1]) float32.

        Returns:
            (N, K, h, w[, d]) float32 in [0, 1]; with head_std (N, K + 1, h, w[, d]).
        """
        x = (image - mean) * inverse_std
        dtype = next(self.network.parameters()).dtype
        heads = self.network(x.to(dtype))
        scores = [self._probabilities(logits.float()) for logits in heads]
        total = scores[0]
        for score in scores[1:]:
            total = total + score
        mean_score = total / len(scores) if len(scores) > 1 else total
        return (
            torch.cat([mean_score, self._head_std(scores, mean_score)], dim=1)
            if self.head_std
            else mean_score
        )

    @staticmethod
    def _head_std(scores: list[Tensor], mean_score: Tensor) -> Tensor:
        """Computes the standard deviation of the foreground probability over the heads, in [0, 0.5]."""
        # With several classes the first is the background, and 1 - background deviates as much as the
        # background.
        variance = (scores[0][:, :1] - mean_score[:, :1]) ** 2
        for score in scores[1:]:
            variance = variance + (score[:, :1] - mean_score[:, :1]) ** 2
        return torch.sqrt(variance / len(scores))

    def _probabilities(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits) if self.activation == "sigmoid" else torch.softmax(logits, dim=1)


def fold_batch_norm(network: UNetPlusPlus) -> UNetPlusPlus:
    """Folds batch normalisation into the convolutions before it, which keeps the function.

    All engines then run the same arithmetic, and the weights file needs no running statistics.
    Networks with another normalisation, or none, are returned as they are.
    """
    if network.config.norm != "batch":
        return network
    config = UNetPlusPlusConfig.model_validate(network.config.model_dump() | {"norm": "none"})
    folded = UNetPlusPlus(config).eval()
    with torch.no_grad():
        for name, node in network.nodes.items():
            layers = node.children()
            target = [layer for layer in folded.nodes[name].children() if hasattr(layer, "weight")]
            for into in target:
                convolution, norm, _ = next(layers), next(layers), next(layers)
                into.load_state_dict(fuse_conv_bn_eval(convolution, norm).state_dict())  # type: ignore[type-var, arg-type]
        folded.ups.load_state_dict(network.ups.state_dict())
        folded.heads.load_state_dict(network.heads.state_dict())
    return folded


def round_to_fp16(network: UNetPlusPlus) -> UNetPlusPlus:
    """Rounds every parameter to float16, in place and kept as float32, because that is what the weights file holds."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.half().float())
    return network


def level_networks(network: UNetPlusPlus) -> dict[str, tuple[int, UNetPlusPlus]]:
    """Returns (level, network) per graph name: L1..Ln pruned, and "accurate", the whole network."""
    graphs = {f"L{level}": (level, network.prune(level)) for level in network.config.heads}
    return graphs | {"accurate": (network.config.depth, network)}
