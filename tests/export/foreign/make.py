"""Writes the foreign networks of these tests, and what they answer: `python make.py FAMILY CHECKOUT`, see README.md.

Each family is built from its own class, read from a checkout or an installed package: nothing of it is copied here.
Widths are cut to a few channels, weights are random, and the statistics and affine parameters of norms differ from 0 and 1.
"""

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np

HERE = Path(__file__).parent
# An odd size of an image, and the padding that the server would add: reflection at the end of each axis.
SIZES = {2: (45, 35), 3: (21, 30, 13)}


def source(file: Path, *narrow: tuple[str, str]) -> types.ModuleType:
    """The module of a file with other widths."""
    text = file.read_text()
    for old, new in narrow:
        assert old in text, f"{file} has no {old}"
        text = text.replace(old, new)
    module = types.ModuleType(file.stem)
    exec(compile(text, str(file), "exec"), module.__dict__)  # noqa: S102 - a checkout that the caller names
    return module


def shuffle(network):
    """Random weights, so that no two tensors are alike and no norm is the identity."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) * 0.2)
            elif tensor.is_floating_point():
                torch.nn.init.kaiming_normal_(tensor, nonlinearity="relu")
    return network.eval()


def four(checkout: Path):
    module = source(checkout / "archs.py", ("[32, 64, 128, 256, 512]", "[4, 5, 6, 7, 8]"))
    return module.NestedUNet(2, input_channels=3, deep_supervision=True), 3, 16, {"opset_version": 13}


def bigmb(checkout: Path):
    module = source(checkout / "Models.py", ("n1 = 64", "n1 = 3"))
    return module.NestedUNet(in_ch=3, out_ch=2), 3, 16, {"opset_version": 20, "dynamo": True}


def shawn(checkout: Path):
    sys.path += [str(checkout), str(checkout / "networks")]
    network = importlib.import_module("UNet_Nested").UNet_Nested(in_channels=1, n_classes=2, feature_scale=32)
    return network, 1, 16, {"heads": ["final_1", "final_2", "final_3", "final_4"]}


def official(checkout: Path, dims: int):
    """nnU-Net v1 as the authors of UNet++ published it; the 3D one with anisotropic kernels and pooling."""
    from torch import nn

    sys.path.append(str(checkout / "pytorch"))
    # Of use to its training alone, and not to be had beside today's NumPy and SciPy.
    for name in ("batchgenerators", "batchgenerators.augmentations", "batchgenerators.augmentations.utils"):
        sys.modules[name] = MagicMock()
    sys.modules.setdefault("scipy.ndimage.filters", importlib.import_module("scipy.ndimage"))
    made = importlib.import_module("nnunet.network_architecture.generic_UNetPlusPlus")
    conv, norm, drop = (
        getattr(nn, f"{kind}{dims}d") for kind in ("Conv", "InstanceNorm", "Dropout")
    )
    plan = {}
    if dims == 3:
        plan["pool_op_kernel_sizes"] = [(1, 2, 2), (2, 2, 2), (2, 2, 1), (1, 2, 2), (2, 2, 1)]
        plan["conv_kernel_sizes"] = [(1, 3, 3), *[(3, 3, 3)] * 5]
    network = made.Generic_UNetPlusPlus(
        2 if dims == 2 else 1, 3, 3, 5, conv_op=conv, norm_op=norm, dropout_op=drop,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, dropout_op_kwargs={"p": 0, "inplace": True},
        nonlin_kwargs={"negative_slope": 1e-2, "inplace": True}, final_nonlin=nn.Identity(),
        convolutional_pooling=True, convolutional_upsampling=True, max_num_features=8, **plan,
    )  # fmt: skip
    return network, 2 if dims == 2 else 1, 32, {"opset_version": 17}


TORCH: dict[str, Callable] = {
    "4uiiurz1": four,
    "bigmb": bigmb,
    "shawnbit": shawn,
    "official-2d": lambda checkout: official(checkout, 2),
    "official-3d": lambda checkout: official(checkout, 3),
}


def reflected(image: np.ndarray, divisor: int) -> np.ndarray:
    """(C, *size) padded at the ends to multiples of the divisor."""
    missing = [(0, 0), *((0, -side % divisor) for side in image.shape[1:])]
    return np.pad(image, missing, mode="reflect")


def write(name: str, image: np.ndarray, seen: np.ndarray, outputs: list[np.ndarray]) -> None:
    """Stores the image, the network's input and the answers of the heads, cut back to the image's size."""
    inside = tuple(slice(side) for side in image.shape[:-1])
    heads = {f"head{k}": one[(..., *inside)].astype(np.float32) for k, one in enumerate(outputs, 1)}
    np.savez_compressed(HERE / f"{name}.npz", image=image, input=seen, **heads)
