"""Writes the foreign networks of these tests and what they answer: `python make.py FAMILY [CHECKOUT]`, see README.md.

Each family is built from its own class, of a checkout or an installed package; nothing of it is copied here. Widths
are cut to a few channels, weights are random, and no norm is the identity, so that no mistake cancels another.
"""

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np

HERE = Path(__file__).parent

# One less than a multiple of 2, 4, ... and the divisor, so that every level pads an image to the same size.
SIZES = {(2, 16): (47, 31), (2, 32): (63, 31), (3, 8): (15, 31, 23), (3, 32): (31, 63, 31)}

# Of volumes every third voxel is kept along each axis.
STEPS = {2: 1, 3: 3}

IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])


@dataclass(frozen=True)
class Family:
    """How a network is built, and what its own pipeline feeds it.

    Attributes:
        build: makes the module from the checkout.
        channels, dims, divisor: of its input.
        normalise: makes what it sees of an image (*size, C).
        export: arguments of torch.onnx.export, or `heads` for export.importing.from_torch.
    """

    build: Callable[[Path], Any]
    channels: int
    dims: int
    divisor: int
    normalise: Callable[[np.ndarray], np.ndarray]
    export: dict[str, Any]


def source(file: Path, old: str, new: str) -> types.ModuleType:
    """The module of a file with other widths."""
    text = file.read_text()
    assert old in text, f"{file} has no {old}"
    module = types.ModuleType(file.stem)
    exec(compile(text.replace(old, new), str(file), "exec"), module.__dict__)  # noqa: S102 - a file the caller names
    return module


def four(checkout: Path) -> Any:
    made = source(checkout / "archs.py", "[32, 64, 128, 256, 512]", "[4, 5, 6, 7, 8]")
    return made.NestedUNet(2, input_channels=3, deep_supervision=True)


def bigmb(checkout: Path) -> Any:
    return source(checkout / "Models.py", "n1 = 64", "n1 = 3").NestedUNet(in_ch=3, out_ch=2)


def shawnbit(checkout: Path) -> Any:
    sys.path += [str(checkout), str(checkout / "networks")]
    return importlib.import_module("UNet_Nested").UNet_Nested(in_channels=1, n_classes=2, feature_scale=32)


def zju(checkout: Path) -> Any:
    sys.path += [str(checkout), str(checkout / "models")]
    made = source(checkout / "models" / "UNet_2Plus.py", "[64, 128, 256, 512, 1024]", "[2, 4, 8, 16, 32]")
    return made.UNet_2Plus(in_channels=3, n_classes=2)


def official(checkout: Path, dims: int) -> Any:
    """nnU-Net v1 as the authors of UNet++ published it; in 3D with anisotropic kernels and strides."""
    from torch import nn

    sys.path.append(str(checkout / "pytorch"))
    # Of use to its training alone, and not to be had beside today's NumPy and SciPy.
    for name in ("batchgenerators", "batchgenerators.augmentations", "batchgenerators.augmentations.utils"):
        sys.modules[name] = MagicMock()
    sys.modules.setdefault("scipy.ndimage.filters", importlib.import_module("scipy.ndimage"))
    made = importlib.import_module("nnunet.network_architecture.generic_UNetPlusPlus")
    conv, norm, drop = (getattr(nn, f"{kind}{dims}d") for kind in ("Conv", "InstanceNorm", "Dropout"))
    plan = {}
    if dims == 3:
        plan["pool_op_kernel_sizes"] = [(1, 2, 2), (2, 2, 2), (2, 2, 1), (1, 2, 2), (2, 2, 1)]
        plan["conv_kernel_sizes"] = [(1, 3, 3), *[(3, 3, 3)] * 5]
    return made.Generic_UNetPlusPlus(
        3 if dims == 2 else 1, 3, 3, 5, conv_op=conv, norm_op=norm, dropout_op=drop,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, dropout_op_kwargs={"p": 0, "inplace": True},
        nonlin_kwargs={"negative_slope": 1e-2, "inplace": True}, final_nonlin=nn.Identity(),
        convolutional_pooling=True, convolutional_upsampling=True, max_num_features=6, **plan,
    )  # fmt: skip


def nnunet_v2(_: Path) -> Any:
    """A plan with anisotropic kernels and strides; its heads lie at three resolutions."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from torch import nn

    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
    return PlainConvUNet(
        1, 4, [3, 4, 5, 6], nn.Conv3d, [[1, 3, 3], *[[3, 3, 3]] * 3], strides, 2, 3, 2, True,
        nn.InstanceNorm3d, {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True},
        deep_supervision=True,
    )  # fmt: skip


def smp(_: Path) -> Any:
    """Squeeze-and-excitation and SiLU in the encoder; one head, levels are nodes at half resolution."""
    import segmentation_models_pytorch as made

    return made.UnetPlusPlus(
        "tu-test_efficientnet", encoder_weights=None, classes=2, decoder_channels=(8, 6, 6, 4, 4),
        channel_multiplier=0.5,
    )  # fmt: skip


def bgr_twice_scaled(image: np.ndarray) -> np.ndarray:
    """4uiiurz1: cv2 reads BGR, albumentations normalises it, and the loader divides by 255 once more."""
    return (image[..., ::-1] / 255 - IMAGENET[0]) / IMAGENET[1] / 255


def zscore(image: np.ndarray) -> np.ndarray:
    axes = tuple(range(image.ndim - 1))
    return (image - image.mean(axes)) / image.std(axes)


FAMILIES = {
    "4uiiurz1": Family(four, 3, 2, 16, bgr_twice_scaled, {"opset_version": 13}),
    "bigmb": Family(bigmb, 3, 2, 16, lambda image: (image / 255 - 0.5) / 0.5, {"opset_version": 20, "dynamo": True}),
    "shawnbit": Family(shawnbit, 1, 2, 16, lambda image: image / 255, {"heads": [f"final_{k}" for k in range(1, 5)]}),
    "zju": Family(zju, 3, 2, 16, lambda image: image / 255, {"heads": [f"final_{k}" for k in range(1, 5)]}),
    "official-2d": Family(lambda checkout: official(checkout, 2), 3, 2, 32, zscore, {"opset_version": 17}),
    "official-3d": Family(lambda checkout: official(checkout, 3), 1, 3, 32, zscore, {"opset_version": 16}),
    "nnunet-v2": Family(nnunet_v2, 1, 3, 8, zscore, {"opset_version": 21, "dynamo": True}),
    "smp": Family(smp, 3, 2, 32, lambda image: (image / 255 - IMAGENET[0]) / IMAGENET[1], {"opset_version": 18}),
}  # fmt: skip


def shuffle(network: Any) -> Any:
    """Random weights: no two tensors are alike and no norm is the identity."""
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
                # Logits of a size at which float32 is exact to 1e-5.
                tensor.mul_(0.2 if name.startswith(("decoder.seg_layers", "seg_outputs")) else 1)
    return network.eval()


def export(network: Any, family: Family, example: Any, file: Path) -> None:
    """The lines that the manual has a person write."""
    import torch

    if names := family.export.get("heads"):
        import onnx

        from export.importing import from_torch

        onnx.save(from_torch(network, example, names).model, file)
        return
    axes = dict(zip((0, *range(2, family.dims + 2)), "nhwd", strict=False))
    count = 1 if torch.is_tensor(answers := network(example)) else len(answers)
    heads = [f"head{k}" for k in range(count)]
    dynamic: dict[str, Any] = {"dynamic_axes": dict.fromkeys(["image", *heads], axes), "dynamo": False}
    if family.export.get("dynamo"):
        free = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
        dynamic = {"dynamic_shapes": (free,), "external_data": False}
    torch.onnx.export(
        network, (example,), str(file), input_names=["image"], output_names=heads, **(dynamic | family.export)
    )
    without_traces(file)


def without_traces(file: Path) -> None:
    """Removes the stack traces that the newer exporter writes: they name folders of this machine."""
    import onnx

    model = onnx.load(file)
    for part in [
        model,
        model.graph,
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.value_info,
    ]:
        del part.metadata_props[:]
    onnx.save(model, file)


def answers_of(network: Any, seen: Any, names: list[str]) -> list[Any]:
    """What every head answers, in the order of the network's own outputs."""
    if not names:
        answers = network(seen)
        return [answers] if not isinstance(answers, list | tuple) else [*answers]
    kept: list[Any] = []
    modules = dict(network.named_modules())
    hooks = [modules[name].register_forward_hook(lambda _, __, output: kept.append(output)) for name in names]
    network(seen)
    for hook in hooks:
        hook.remove()
    return kept


def padded(image: np.ndarray, divisor: int) -> np.ndarray:
    """(*size, C) reflected at the end of each axis up to multiples of the divisor, as (1, C, *size) float32."""
    missing = [*((0, -side % divisor) for side in image.shape[:-1]), (0, 0)]
    turned = np.moveaxis(np.pad(image, missing, mode="reflect"), -1, 0)
    return np.ascontiguousarray(turned[None], dtype=np.float32)


def picture(dims: int, channels: int, divisor: int) -> np.ndarray:
    """A smooth image of odd size: uint8 (H, W, C), or int16 (*size, C) of a volume."""
    random = np.random.default_rng(0)
    size = SIZES[dims, divisor]
    grid = np.stack(np.meshgrid(*(np.linspace(0, 1, side) for side in size), indexing="ij"), -1)
    waves = [np.sin(grid @ random.normal(0, 9, dims) + k) for k in range(channels)]
    values = 120 + 70 * np.stack(waves, -1) + random.normal(0, 15, (*size, channels))
    return np.clip(values, 0, 255).astype(np.uint8) if dims == 2 else (values * 3).astype(np.int16)


def make(name: str, checkout: Path) -> None:
    import torch

    family = FAMILIES[name]
    network = shuffle(family.build(checkout))
    image = picture(family.dims, family.channels, family.divisor)
    seen = torch.from_numpy(padded(family.normalise(image), family.divisor))
    with torch.no_grad():
        export(network, family, torch.cat([seen, seen]), HERE / f"{name}.onnx")
        answers = answers_of(network, seen, family.export.get("heads", []))
    write(name, image, [one.numpy() for one in answers])


def make_keras(checkout: Path) -> None:
    """The authors' Keras network; in an environment of its own (TensorFlow 2.15, tf2onnx), with names of Keras 2.2."""
    import keras
    import tensorflow as tf
    import tf2onnx

    for name in ("core", "advanced_activations", "noise", "pooling"):
        sys.modules[f"keras.layers.{name}"] = keras.layers
    keras.layers.merge = keras.layers.concatenate
    keras.backend.image_dim_ordering = lambda: "tf"
    made = source(checkout / "keras" / "helper_functions.py", "[32,64,128,256,512]", "[3,4,5,6,7]")
    made.Model = lambda **both: keras.Model(both["input"], both["output"])
    network = made.UNetPlusPlus(None, None, color_type=1, num_class=2, deep_supervision=True)
    random = np.random.default_rng(0)
    network.set_weights([value + random.normal(0, 0.1, value.shape) for value in network.get_weights()])
    image = picture(2, 1, 16)
    seen = padded(image / 255, 16)
    answers = [np.moveaxis(one, -1, 1) for one in network.predict(np.moveaxis(seen, 1, -1))]
    tf2onnx.convert.from_keras(
        network, [tf.TensorSpec((None, None, None, 1), tf.float32, "main_input")], opset=15,
        inputs_as_nchw=["main_input"], outputs_as_nchw=network.output_names,
        output_path=str(HERE / "keras.onnx"),
    )  # fmt: skip
    write("keras", image, answers)


def write(name: str, image: np.ndarray, answers: list[np.ndarray]) -> None:
    """Stores the image and the answers; those at the image's resolution are cut back to its size."""
    inside = tuple(slice(0, side, STEPS[image.ndim - 1]) for side in image.shape[:-1])
    full = max(one.shape[2:] for one in answers)
    cut = [one[(..., *inside)] if one.shape[2:] == full else one for one in answers]
    heads = {f"head{k}": one.astype(np.float32) for k, one in enumerate(cut)}
    np.savez_compressed(HERE / f"{name}.npz", image=image, **heads)


if __name__ == "__main__":
    where = Path(sys.argv[2]) if len(sys.argv) > 2 else Path()
    if sys.argv[1] == "keras":
        make_keras(where)
    else:
        make(sys.argv[1], where)
