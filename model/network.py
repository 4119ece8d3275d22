"""UNet++: the grid of nodes X^{i,j}, its heads, and pruning."""

import torch
from torch import Tensor, nn

from model.blocks import Down, Node, Up, head
from model.config import UNetPlusPlusConfig


class UNetPlusPlus(nn.Module):
    """UNet++ (Zhou et al., "UNet++: A Nested U-Net Architecture for Medical Image Segmentation", 2018).

    Modules are named by their place in the grid: `nodes["i_j"]` is the convolution block H of X^{i,j},
    `ups["i_j"]` brings X^{i+1,j-1} up into it, `heads["j"]` sits on X^{0,j}.
    """

    def __init__(self, config: UNetPlusPlusConfig) -> None:
        super().__init__()
        self.config = config
        self.down = Down(config)
        self.nodes = nn.ModuleDict()
        self.ups = nn.ModuleDict()
        self.heads = nn.ModuleDict({str(j): head(config) for j in config.heads})
        widths = config.widths
        stride = 2 if config.down == "strided" else 1
        for j in range(config.depth + 1):
            for i in range(config.depth - j + 1):
                if j == 0:
                    incoming = config.in_channels if i == 0 else widths[i - 1]
                    self.nodes[f"{i}_{j}"] = Node(config, incoming, widths[i], stride if i > 0 else 1)
                else:
                    up = Up(config, widths[i + 1], widths[i])
                    self.ups[f"{i}_{j}"] = up
                    self.nodes[f"{i}_{j}"] = Node(config, j * widths[i] + up.out_channels, widths[i])

    def forward(self, image: Tensor) -> list[Tensor]:
        """Logits of every head, shallowest first: equation 1 of the paper, column by column.

        Args:
            image: (N, C, H, W[, D]) float; every spatial axis a multiple of 2**depth.

        Returns:
            One (N, K, H, W[, D]) tensor of logits per head, in the order of `config.heads`.
        """
        x: dict[tuple[int, int], Tensor] = {}
        for j in range(self.config.depth + 1):
            for i in range(self.config.depth - j + 1):
                if j == 0:
                    incoming = image if i == 0 else self.down(x[i - 1, 0])
                else:
                    skips = [x[i, k] for k in range(j)]
                    incoming = torch.cat([*skips, self.ups[f"{i}_{j}"](x[i + 1, j - 1])], dim=1)
                x[i, j] = self.nodes[f"{i}_{j}"](incoming)
        return [self.heads[str(j)](x[0, j]) for j in self.config.heads]

    def prune(self, level: int) -> "UNetPlusPlus":
        """The network with exactly the nodes i + j <= level and head `level`.

        Parameters are shared with this network, not copied; the output is bit-identical to the
        corresponding head of the full network.

        Raises:
            ValueError: there is no head at that level.
        """
        with torch.device("meta"):
            pruned = UNetPlusPlus(self.config.pruned(level))
        mine = self.state_dict(keep_vars=True)
        pruned.load_state_dict({name: mine[name] for name in pruned.state_dict()}, assign=True)
        return pruned.train(self.training)
