"""The pieces of a node: convolution block, downsampling, upsampling, for 2D and 3D."""

from torch import Tensor, nn

from model.config import UNetPlusPlusConfig

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
MAX_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
LINEAR = {2: "bilinear", 3: "trilinear"}
ACTIVATION = {
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.01, inplace=True),
    "elu": lambda: nn.ELU(inplace=True),
    "silu": lambda: nn.SiLU(inplace=True),
}


def _norm(config: UNetPlusPlusConfig, channels: int) -> list[nn.Module]:
    if config.norm == "batch":
        return [BATCH_NORM[config.dims](channels)]
    if config.norm == "instance":
        return [INSTANCE_NORM[config.dims](channels, affine=True)]
    return []


class Node(nn.Sequential):
    """One node X^{i,j}: `convs_per_node` times convolution, normalisation, activation.

    Args:
        config: the network's configuration.
        in_channels: channels of the (concatenated) input.
        width: channels of the node.
        stride: stride of the first convolution; 2 where downsampling is a strided convolution.
    """

    def __init__(self, config: UNetPlusPlusConfig, in_channels: int, width: int, stride: int = 1) -> None:
        layers: list[nn.Module] = []
        for k in range(config.convs_per_node):
            # A bias before batch or instance normalisation is removed again by its mean.
            layers.append(
                CONV[config.dims](
                    in_channels if k == 0 else width,
                    width,
                    kernel_size=3,
                    stride=stride if k == 0 else 1,
                    padding=1,
                    bias=config.norm == "none",
                )
            )
            layers += _norm(config, width)
            layers.append(ACTIVATION[config.activation]())  # type: ignore[no-untyped-call]
        super().__init__(*layers)


class Down(nn.Module):
    """Halves every spatial axis, or leaves it to the next node's strided convolution."""

    def __init__(self, config: UNetPlusPlusConfig) -> None:
        super().__init__()
        self.pool: nn.Module = MAX_POOL[config.dims](2) if config.down == "maxpool" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, 2h, 2w[, 2d]) to (N, C, h, w[, d]); unchanged for strided convolutions."""
        pooled: Tensor = self.pool(x)
        return pooled


class Up(nn.Sequential):
    """Doubles every spatial axis, from a row's width to the width of the row above.

    `out_channels` tells how many channels come out: interpolation without a 1x1 keeps them.
    """

    def __init__(self, config: UNetPlusPlusConfig, in_channels: int, width: int) -> None:
        layers: list[nn.Module]
        if config.up == "transposed":
            layers = [CONV_TRANSPOSED[config.dims](in_channels, width, kernel_size=2, stride=2)]
        elif config.up == "nearest":
            layers = [nn.Upsample(scale_factor=2, mode="nearest")]
        else:
            layers = [nn.Upsample(scale_factor=2, mode=LINEAR[config.dims], align_corners=False)]
        if config.up != "transposed" and config.up_conv:
            layers.append(CONV[config.dims](in_channels, width, kernel_size=1))
        super().__init__(*layers)
        self.out_channels = width if config.up == "transposed" or config.up_conv else in_channels


def head(config: UNetPlusPlusConfig) -> nn.Module:
    """The 1x1 convolution from row 0 to the classes and the channels of objects; its output is logits."""
    return CONV[config.dims](config.widths[0], config.head_channels, kernel_size=1)
