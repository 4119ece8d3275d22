"""One training loop that reads from top to bottom: for UNet++ and for its baselines alike.

Killed at any moment, it goes on from the last finished epoch exactly as if nothing had happened:
`last.safetensors` holds weights, optimiser state and counters; every random draw depends on
(seed, epoch, item) alone.
"""

import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from model import checkpoint
from model.baselines import ARCHITECTURES, UNet
from model.config import UNetPlusPlusConfig
from model.cost import parameters
from model.data import Split, Tile, Tiles, pad_to
from model.losses import deep_supervision_loss
from model.reading import DataError, read_index
from model.recipe import OptimisationConfig, RecipeError, TrainConfig
from model.start import begin_from

LAST = "last.safetensors"

# Two dimensions or three: convolutions on CPUs and tensor cores are faster this way round.
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


@dataclass
class State:
    """Progress of a run after its last finished epoch; `start` is the SHA-256 of the weights that it began from."""

    epoch: int = 0
    best: float = -1.0
    best_epoch: int = 0
    start: str = ""
    rows: list[dict[str, float]] = field(default_factory=list)


def train(
    recipe: TrainConfig, data: Path, out: Path, console: Console | None = None, weights: Path | None = None
) -> Path:
    """Trains until the schedule ends or validation Dice stops rising; resumes a run found in `out`.

    Writes to `out`: best.safetensors (the checkpoint), last.safetensors (to resume), log.csv, curve.png.

    Args:
        recipe: network, data and optimisation.
        data: folder with images/, labels/ and index.csv whose splits include train and val.
        out: folder of the run, created if need be.
        console: console for progress; None prints nothing.
        weights: checkpoint, or weights file of a bundle, that a new run begins from; None begins at random.

    Returns:
        Path of best.safetensors.

    Raises:
        DataError: names the files that are wrong, before the first step.
        RecipeError: `out` holds a run of another recipe, or the recipe has tiles that do not fit, or
            diverges.
    """
    _check_tile(recipe)
    options, dims = recipe.optimisation, recipe.network.dims
    training, validation = _splits(recipe, data)
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiles = Tiles(training, recipe.data, options.seed, dims, recipe.network.objects)
    begin = None if (out / LAST).exists() else weights
    network, average = _networks(recipe, tiles, begin, device)
    kept = network if average is None else average.module
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
    )
    out.mkdir(parents=True, exist_ok=True)
    state = _resume(out, recipe, network, optimiser, average)
    start = "" if weights is None else hashlib.sha256(weights.read_bytes()).hexdigest()
    if state.epoch and start and start != state.start:
        raise RecipeError(
            f"{out} holds a run that did not begin from {weights}; choose another --out to start anew"
        )
    state.start = state.start or start
    (out / "recipe.json").write_text(recipe.model_dump_json(indent=2) + "\n")

    steps = len(training) * recipe.data.tiles_per_image // options.batch
    _say(console, f"{recipe.architecture}, {parameters(network):,} parameters, on {device.type}; {len(training)} training "
         f"and {len(validation)} validation images; {steps} steps per epoch" + (f"; resumed after epoch {state.epoch}" if state.epoch else ""))  # fmt: skip

    while state.epoch < options.epochs and state.epoch - state.best_epoch < options.patience:
        epoch = state.epoch + 1
        loader = _loader(tiles, tiles.set_epoch(epoch), options)
        network.train()
        total = 0.0
        with _progress(console, f"epoch {epoch}/{options.epochs}", len(loader)) as advance:
            for step, batch in enumerate(loader):
                done = (epoch - 1) * steps + min(step, steps - 1)
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(options, done, options.epochs * steps)
                loss = _loss(network, batch, recipe, device)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                if average is not None:
                    average.update_parameters(network)
                total += loss.item()
                advance()
        _check_finite(total, epoch)
        scores = evaluate(kept, validation, device, options.precision, recipe.data.padding)
        state.epoch = epoch
        state.rows.append({"epoch": epoch, "loss": total / len(loader), **scores})
        if scores["dice_accurate"] > state.best:
            state.best, state.best_epoch = scores["dice_accurate"], epoch
            checkpoint.save(kept, out / "best.safetensors", {"recipe": recipe.model_dump(mode="json"), "epoch": epoch, "validation": scores, "start": state.start})  # fmt: skip
        # Last: from here on the epoch counts as finished.
        _write_log(out, state.rows)
        _save_state(out, recipe, network, optimiser, average, state)
        _say(console, f"epoch {epoch}: loss {total / len(loader):.4f}, validation Dice {scores['dice_accurate']:.4f}"
             f" (best {state.best:.4f} in epoch {state.best_epoch})")  # fmt: skip
    return out / "best.safetensors"


def _splits(recipe: TrainConfig, data: Path) -> tuple[Split, Split]:
    """Reads the training and the validation split."""
    network, spacing = recipe.network, recipe.data.spacing
    found = read_index(data, network.dims)
    training, validation = (
        Split(
            name,
            found.get(name, []),
            network.in_channels,
            network.classes,
            dims=network.dims,
            spacing=spacing,
            numbered=name == "train" and _numbered(recipe),
        )
        for name in ("train", "val")
    )
    tiles = Tiles(training, recipe.data, 0, network.dims, network.objects)
    for epoch in (1, 2):
        batch = max(recipe.optimisation.batch // tiles.set_epoch(epoch), 1)
        if batch > len(tiles):
            raise DataError(
                f"a batch of {batch} tiles is more than one epoch holds; lower optimisation.batch, or raise data.tiles_per_image"
            )
    if training.numbers is not None and all(len(np.unique(one[one > 0])) < 2 for one in training.numbers):
        raise DataError(
            "no label map of the split 'train' numbers more than one object, which network.objects, data.small_object_weight and data.touching_weight need: "
            "are these maps of object numbers?"
        )
    return training, validation


def _numbered(recipe: TrainConfig) -> bool:
    """Whether labels are read as maps of object numbers."""
    return bool(recipe.network.objects) or recipe.data.weighs_objects


def _networks(
    recipe: TrainConfig, tiles: Tiles, weights: Path | None, device: torch.device
) -> tuple[nn.Module, AveragedModel | None]:
    """The network, and the moving average of its weights and statistics where the recipe has one."""
    network: nn.Module = ARCHITECTURES[recipe.architecture](recipe.network)
    if weights is not None:
        images = torch.stack([tiles[n].image for n in range(recipe.optimisation.batch)])
        begin_from(weights, network, images)
    network.to(device).to(memory_format=CHANNELS_LAST[recipe.network.dims])  # type: ignore[call-overload]
    average = None
    if recipe.optimisation.ema_decay:
        update = get_ema_multi_avg_fn(recipe.optimisation.ema_decay)  # type: ignore[no-untyped-call]
        average = AveragedModel(network, multi_avg_fn=update, use_buffers=True)
    if recipe.network.dims == 3 and device.type == "cpu":
        # Each for itself and after the copy, because it takes a node's own `forward`.
        for one in [network] if average is None else [network, average.module]:
            _deepest_in_fp32(one, recipe.network.depth)
    return network, average


def _loss(network: nn.Module, batch: Tile, recipe: TrainConfig, device: torch.device) -> Tensor:
    with _autocast(device, recipe.optimisation.precision):
        heads = network(batch.image.to(device, memory_format=CHANNELS_LAST[recipe.network.dims]))
    return deep_supervision_loss(
        heads,
        batch.label.to(device),
        batch.objects.to(device) if recipe.network.objects else None,
        batch.weight.to(device) if _numbered(recipe) else None,
    )


def _loader(tiles: Tiles, shrink: int, options: OptimisationConfig) -> DataLoader[Tile]:
    return DataLoader(
        tiles, max(options.batch // shrink, 1), shuffle=False, num_workers=options.workers, drop_last=True,
        multiprocessing_context="fork" if options.workers else None,
    )  # fmt: skip


def _deepest_in_fp32(network: nn.Module, depth: int) -> None:
    """Takes the node of the deepest row out of autocast; a few voxels, so it costs next to nothing.

    oneDNN's bfloat16 backward pass of 3D convolutions now and then writes gradients of 1e30 where an axis is
    only two voxels long.
    """
    node = network.encoder[-1] if isinstance(network, UNet) else network.get_submodule(f"nodes.{depth}_0")
    forward = node.forward

    def in_fp32(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            result: Tensor = forward(x.float())
        return result

    node.forward = in_fp32


def _check_tile(recipe: TrainConfig) -> None:
    network, tile = recipe.network, recipe.data.tile_shape(recipe.network.dims)
    divisor = network.divisor(network.depth)
    large = recipe.data.large_tile
    if large is not None and (large % divisor or large < max(tile)):
        raise RecipeError(
            f"data.large_tile: {large} is smaller than data.tile, or no multiple of {divisor}, which a network of depth {network.depth} needs"
        )
    if recipe.data.weighs_objects and network.classes > 1:
        name = "touching_weight" if recipe.data.touching_weight > 1 else "small_object_weight"
        raise RecipeError(f"data.{name} needs a network of one class, this one has {network.classes}")
    if len(tile) != network.dims:
        raise RecipeError(f"data.tile: {list(tile)} has {len(tile)} axes, the network {network.dims}")
    if network.dims == 3 and network.in_channels != 1:
        raise RecipeError(f"network.in_channels: volumes have one channel, the network {network.in_channels}")
    if wrong := [side for side in tile if side < divisor or side % divisor]:
        raise RecipeError(
            f"data.tile: {wrong[0]} is not a multiple of {divisor}, which a network of depth {network.depth} needs"
        )
    if recipe.data.rotate90 and tile[0] != tile[1]:
        raise RecipeError(
            f"data.rotate90: no quarter turns where the first two sides of data.tile differ, {tile[0]} and {tile[1]}"
        )
    if wrong := [axis for axis in recipe.data.flip if not 0 <= axis < network.dims]:
        raise RecipeError(
            f"data.flip: there is no axis {wrong[0]} in {network.dims} dimensions; axes count from 0"
        )


def learning_rate(options: OptimisationConfig, step: int, steps: int) -> float:
    """Learning rate of a step: constant, or linear warm-up over the first tenth and cosine to 0."""
    if options.schedule == "constant":
        return options.learning_rate
    warm_up = max(steps // 10, 1)
    if step < warm_up:
        return options.learning_rate * (step + 1) / warm_up
    return (
        options.learning_rate * 0.5 * (1 + float(np.cos(np.pi * (step - warm_up) / max(steps - warm_up, 1))))
    )


@torch.no_grad()
def evaluate(
    network: nn.Module, split: Split, device: torch.device, precision: str, padding: str = "reflect"
) -> dict[str, float]:
    """Foreground Dice per image, averaged over the images, of each head and of the mean of the heads.

    Whole images, padded as tiles are. An image whose label and mask are both empty counts 1.
    Several classes are averaged over the foreground classes.
    """
    network.eval()
    config = network.config
    assert isinstance(config, UNetPlusPlusConfig)  # noqa: S101 - narrows the type
    names = [f"dice_L{level}" for level in config.heads] + ["dice_accurate"]
    dice: dict[str, list[float]] = {name: [] for name in names}
    for image, label in zip(split.images, split.labels, strict=True):
        inside = tuple(slice(side) for side in label.shape)
        padded = pad_to(torch.from_numpy(image)[None].to(device), config.divisor(config.depth), padding)
        with _autocast(device, precision):
            logits = network(padded.to(memory_format=CHANNELS_LAST[config.dims]))
        scores = [probabilities(head[:, : config.classes, *inside].float()) for head in logits]
        scores.append(torch.stack(scores).mean(0))
        truth = torch.from_numpy(label).to(device)
        for name, score in zip(names, scores, strict=True):
            mask = (score[0, 0] > 0.5).long() if config.classes == 1 else score[0].argmax(0)
            dice[name].append(_dice(mask, truth, max(config.classes - 1, 1)))
    return {name: float(np.mean(values)) for name, values in dice.items()}


def probabilities(logits: Tensor) -> Tensor:
    """Sigmoid for one class, softmax over classes for several; (N, K, ...) in [0, 1]."""
    return torch.sigmoid(logits) if logits.shape[1] == 1 else torch.softmax(logits, dim=1)


def _dice(mask: Tensor, truth: Tensor, foreground_classes: int) -> float:
    values = []
    for index in range(1, foreground_classes + 1):
        a, b = mask == index, truth == index
        size = int(a.sum() + b.sum())
        values.append(2 * int((a & b).sum()) / size if size else 1.0)
    return float(np.mean(values))


def _check_finite(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise RecipeError(
            f"the loss is no longer finite in epoch {epoch}; lower optimisation.learning_rate and start anew"
        )


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def _save_state(
    out: Path,
    recipe: TrainConfig,
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    average: AveragedModel | None,
    state: State,
) -> None:
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in average.state_dict().items()}
    for index, moments in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": tensor for name, tensor in moments.items()}
    metadata = {"recipe": recipe.model_dump_json(), "state": json.dumps(vars(state))}
    with checkpoint.atomic(out / LAST) as temporary:
        save_file(
            {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()},
            temporary,
            metadata,
        )


def _resume(
    out: Path,
    recipe: TrainConfig,
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    average: AveragedModel | None,
) -> State:
    path = out / LAST
    if not path.exists():
        return State()
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found, state = (
            TrainConfig.model_validate_json(metadata["recipe"]),
            State(**json.loads(metadata["state"])),
        )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise RecipeError(
            f"{path}: no run can be resumed from it ({error!r}); choose another --out to start anew"
        ) from error
    if _without_length(found) != _without_length(recipe):
        raise RecipeError(
            f"{out} holds a run of another recipe (see recipe.json there); choose another --out to start anew"
        )
    for prefix, one in (("network.", network), ("average.", average)):
        if one is not None:
            one.load_state_dict(
                {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            )
    weights = list(network.parameters())
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, index, moment = name.split(".")
            # In the parameter's memory format: the fused optimiser walks both by address, and would mix up
            # the elements.
            like = torch.empty_like(weights[int(index)]) if tensor.ndim else tensor
            moments.setdefault(int(index), {})[moment] = like.copy_(tensor)
    optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
    return state


def _without_length(recipe: TrainConfig) -> TrainConfig:
    """A run may be resumed with another number of epochs; the schedule then follows the new length from there on."""
    return recipe.model_copy(update={"optimisation": recipe.optimisation.model_copy(update={"epochs": 1})})


def _write_log(out: Path, rows: list[dict[str, float]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with checkpoint.atomic(out / "log.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    epochs = [row["epoch"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.plot(epochs, [row["loss"] for row in rows])
    left.set(xlabel="epoch", ylabel="training loss")
    for name in rows[0]:
        if name.startswith("dice_"):
            right.plot(epochs, [row[name] for row in rows], label=name.removeprefix("dice_"))
    right.set(xlabel="epoch", ylabel="validation Dice")
    right.legend()
    figure.tight_layout()
    figure.savefig(out / "curve.png", dpi=110)
    plt.close(figure)


def _say(console: Console | None, text: str) -> None:
    if console:
        console.print(text, highlight=False)


@contextmanager
def _progress(console: Console | None, description: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal, nothing elsewhere; yields a function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = console is None or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)
