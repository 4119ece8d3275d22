"""Configuration of a network: the one declaration that builds UNet++ and its baselines."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ObjectTarget = Literal["distance", "boundary"]

PAPER_WIDTHS = (32, 64, 128, 256, 512)


class UNetPlusPlusConfig(BaseModel):
    """Shape of a UNet++ (Zhou et al., 2018, section 3), in 2D or 3D.

    The grid has rows i = 0..depth (row 0 = full resolution) and columns j = 0..depth - i
    (column 0 = encoder). The defaults are the paper's network.

    Attributes:
        dims: 2 for images (N, C, H, W), 3 for volumes (N, C, H, W, D).
        in_channels: C, channels of the input.
        classes: K, classes of every head; 1 = one sigmoid foreground class, more = softmax.
        objects: a further sigmoid channel of every head, after the class, that tells touching objects apart.
            "distance": how far inside its object a pixel lies; "boundary": its outermost pixels (model/objects.py).
        widths: channels of the nodes in each row; its length is depth + 1.
        convs_per_node: 3x3(x3) convolutions in a node.
        norm: normalisation after each convolution.
        activation: activation function after each normalisation.
        down: 2x2 max-pooling, or a strided first convolution of the next row.
        up: transposed convolution, or linear (bilinear/trilinear) or nearest interpolation.
        up_conv: whether a 1x1 convolution to the row's width follows an interpolation.
        deep_supervision: a head on every X^{0,j}, j >= 1, or only on the last.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dims: Literal[2, 3] = 2
    in_channels: int = Field(default=1, ge=1)
    classes: int = Field(default=1, ge=1)
    objects: tuple[ObjectTarget, ...] = Field(default=(), max_length=1)
    widths: tuple[int, ...] = PAPER_WIDTHS
    convs_per_node: int = Field(default=2, ge=1, le=4)
    norm: Literal["none", "batch", "instance"] = "none"
    activation: Literal["relu", "leaky_relu", "elu", "silu"] = "relu"
    down: Literal["maxpool", "strided"] = "maxpool"
    up: Literal["transposed", "linear", "nearest"] = "transposed"
    up_conv: bool = True
    deep_supervision: bool = True

    @model_validator(mode="after")
    def _check(self) -> "UNetPlusPlusConfig":
        if not 2 <= len(self.widths) <= 6 or min(self.widths) < 1:
            raise ValueError(
                f"widths must list 2 to 6 positive numbers, one per row (depth 1 to 5): got {list(self.widths)}"
            )
        if self.objects and self.classes > 1:
            raise ValueError(f"objects needs a network of one class, this one has {self.classes}")
        return self

    @property
    def head_channels(self) -> int:
        """Channels of a head: the classes, then those of objects."""
        return self.classes + len(self.objects)

    @property
    def depth(self) -> int:
        """The deepest level: nodes X^{i,j} exist for i + j <= depth."""
        return len(self.widths) - 1

    @property
    def heads(self) -> tuple[int, ...]:
        """Levels that have a head, shallowest first."""
        return tuple(range(1, self.depth + 1)) if self.deep_supervision else (self.depth,)

    def pruned(self, level: int) -> "UNetPlusPlusConfig":
        """The configuration of this network cut to the nodes i + j <= level, with head `level` alone.

        Raises:
            ValueError: there is no head at that level.
        """
        if level not in self.heads:
            raise ValueError(
                f"no head at level {level}: this network has heads at {list(self.heads)}"
                + ("" if self.deep_supervision else " (it was built without deep supervision)")
            )
        return self.model_copy(update={"widths": self.widths[: level + 1], "deep_supervision": False})

    def divisor(self, level: int) -> int:
        """Every input axis must be a multiple of this at the given level (one halving per row)."""
        return int(2**level)
