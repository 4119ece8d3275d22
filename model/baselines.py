"""U-Net and wide U-Net, the comparison of the paper's Table 2.

Built from the same blocks and configuration as UNet++, so that the same training command compares like
with like. With the paper's widths 32..512 the U-Net has 7,759,521 parameters, which is the paper's 7.76M.
The wide U-Net (35, 70, 140, 280, 560) has 9,282,246 in the same topology; the paper's 9.13M cannot be
reproduced from the widths that it states.
"""

import torch
from torch import Tensor, nn

from model.blocks import Down, Node, Up, head
from model.config import UNetPlusPlusConfig
from model.network import UNetPlusPlus

WIDE_WIDTHS = (35, 70, 140, 280, 560)


class UNet(nn.Module):
    """U-Net (Ronneberger et al., 2015) with one head; `config.deep_supervision` does not apply."""

    def __init__(self, config: UNetPlusPlusConfig) -> None:
        super().__init__()
        self.config = config.model_copy(update={"deep_supervision": False})
        widths = config.widths
        stride = 2 if config.down == "strided" else 1
        self.down = Down(config)
        self.encoder = nn.ModuleList(
            Node(config, config.in_channels if i == 0 else widths[i - 1], width, stride if i > 0 else 1)
            for i, width in enumerate(widths)
        )
        ups = [Up(config, widths[i + 1], widths[i]) for i in range(config.depth)]
        self.ups = nn.ModuleList(ups)
        self.decoder = nn.ModuleList(
            Node(config, widths[i] + up.out_channels, widths[i]) for i, up in enumerate(ups)
        )
        self.heads = nn.ModuleDict({str(config.depth): head(config)})

    def forward(self, image: Tensor) -> list[Tensor]:
        """(N, C, H, W[, D]) float to a list with one (N, K, H, W[, D]) tensor of logits."""
        rows = [self.encoder[0](image)]
        for node in self.encoder[1:]:
            rows.append(node(self.down(rows[-1])))
        x = rows.pop()
        for i in reversed(range(self.config.depth)):
            x = self.decoder[i](torch.cat([rows[i], self.ups[i](x)], dim=1))
        return [self.heads[str(self.config.depth)](x)]


ARCHITECTURES: dict[str, type[UNetPlusPlus] | type[UNet]] = {"unetpp": UNetPlusPlus, "unet": UNet}
