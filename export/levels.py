"""Gives a network with one head the others by distillation, without labels; its own answer stays the same to the bit.

In the graph of level j the node X^{0,j} feeds its head alone. So a private copy of that node, with a head, costs no work
at this level, and the deepest level, which uses the original, does not change. The copies learn the deepest scores on
images of the user; everything else is frozen and runs on ONNX Runtime.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from export.block import Block, state
from export.card import ExportError
from export.class_overlap import iou_with, mean_agreement
from export.crops import Crops
from export.cut import cut
from export.golden import activated, enlarged, preprocessed
from export.importing import open_session
from export.producer import Producer
from export.tail import Tail
from model.checkpoint import atomic
from model.losses import soft_dice
from server.arrays import Scores, Tiles

# Pixels per axis of a crop, and crops per step, by dims.
CROP = {2: 128, 3: 32}
BATCH = {2: 8, 3: 4}

# Steps between two measurements on the held-out images; training ends when `PATIENCE` of them improve no level.
ROUND = 25
PATIENCE = 4
LEARNING_RATE = 1e-3

# Images that are not trained on: share, and how many at most.
HELD_OUT_SHARE, MAX_HELD_OUT = 0.2, 24

MOMENTS = ("step", "exp_avg", "exp_avg_sq")

Weights = dict[str, Tensor]
# Callback with the steps done and the last agreement of each level.
OnProgress = Callable[[int, dict[int, float]], None]


@dataclass
class Best:
    """The best weights of each level so far.

    Attributes:
        agreement: agreement by level.
        weights: state of the block by level.
        waiting: measurements since any level improved.
    """

    agreement: dict[int, float] = field(default_factory=dict)
    weights: dict[int, Weights] = field(default_factory=dict)
    waiting: int = 0

    def update(self, agreement: dict[int, float], blocks: dict[int, Block]) -> None:
        """Takes the levels over that have improved."""
        better = [level for level, value in agreement.items() if value > self.agreement.get(level, -1)]
        self.waiting = 0 if better else self.waiting + 1
        for level in better:
            self.agreement[level] = agreement[level]
            self.weights[level] = {
                name: one.detach().clone() for name, one in blocks[level].state_dict().items()
            }


class Distillation:
    """Blocks and heads of all missing levels, which learn together: one run of the network feeds them all.

    Args:
        producer: network with one head.
        threshold: foreground is a score above it, for one class.
        progress: file where progress is kept; a run that is there goes on.
        run: name of the run, of bundle and images; progress of another run is refused.
        seed: seed of the first weights of the heads, and of the crops.

    Raises:
        ExportError: the network has several heads, no nodes X^{0,j} are found, or the progress is of another run.
        ImportRefused: a block has an operator that is not rebuilt.
    """

    def __init__(
        self, producer: Producer, progress: Path, run: str, *, threshold: float = 0.5, seed: int = 0
    ) -> None:
        network = producer.network
        if len(producer.levels) != 1:
            levels = ", ".join(map(str, producer.levels))
            raise ExportError(
                f"the bundle has the levels {levels} already; only a network of one head gets others"
            )
        [(self.deepest, self.output)] = producer.levels.items()
        found = {one.column: one for one in network.candidates() if 0 < one.column < self.deepest}
        if not found:
            raise ExportError(
                "no nodes X^{0,j} were found in the graph: it is not a UNet++, or its blocks are not recognised"
            )
        self.producer = producer
        self.steps = 0
        classes = network.shapes[self.output][1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.blocks = {
                level: Block(network.model, one.start, one.name, one.channels, classes, network.dims)
                for level, one in sorted(found.items())
            }
        self.strides = {level: found[level].stride for level in self.blocks}
        self._seed, self._threshold = seed, threshold
        self._outputs = [*dict.fromkeys([*(block.start for block in self.blocks.values()), self.output])]
        self._session = open_session(cut(network.model, self._outputs))
        self._optimiser = torch.optim.Adam(state([*self.blocks.values()]), lr=LEARNING_RATE)
        self._best = Best()
        self._progress, self._run = progress, run
        self._resume()

    @property
    def stalled(self) -> bool:
        """Whether training has ended because no level improved any more."""
        return self._best.waiting >= PATIENCE

    @property
    def crop_side(self) -> int:
        """Pixels per axis of a crop: the smallest feature map has two, because instance normalisation needs them."""
        divisor = self.producer.network.cost([self.output]).divisor
        return max(CROP[self.producer.network.dims], 2 * divisor)

    def train(self, images: Crops, max_steps: int, on_progress: OnProgress) -> dict[int, float]:
        """Trains until the held-out images improve no more, and leaves the best weights of each level in the blocks.

        Args:
            images: all images; the first ones of a random order are not trained on.
            max_steps: steps at most.
            on_progress: callback at the start, after each step and after each measurement.

        Returns:
            Agreement of each level with the deepest on the held-out images.

        Raises:
            ExportError: the network finds nothing in these images.
        """
        held_out, train = split(len(images), self._seed)
        if not self._best.agreement:
            self._best.update(self.measure(images, held_out), self.blocks)
        on_progress(self.steps, dict(self._best.agreement))
        while not self.stalled and self.steps < max_steps:
            for _ in range(min(ROUND, max_steps - self.steps)):
                self.step(images, train)
                on_progress(self.steps, dict(self._best.agreement))
            self._best.update(self.measure(images, held_out), self.blocks)
            self.save()
            on_progress(self.steps, dict(self._best.agreement))
        for level, weights in self._best.weights.items():
            self.blocks[level].load_state_dict(weights)
        return dict(self._best.agreement)

    def round_to_float16(self, images: Crops) -> dict[int, float]:
        """Rounds the weights of the blocks to what a weights file in float16 holds, and measures again."""
        with torch.no_grad():
            for one in state([*self.blocks.values()]):
                largest = torch.finfo(torch.float16).max
                one.copy_(one.clamp(-largest, largest).half().float())
        return self.measure(images, split(len(images), self._seed)[0])

    def step(self, images: Crops, order: Sequence[int]) -> None:
        """Makes one optimisation step on a batch of crops."""
        random = np.random.default_rng((self._seed, self.steps))
        chosen = random.choice(order, BATCH[self.producer.network.dims])
        crops = [images.cut(int(index), random) for index in chosen]
        features, scores = self._teach(Tiles.stack([crop.tiles for crop in crops]))
        labels = [crop.label for crop in crops if crop.label is not None]
        target = torch.from_numpy(
            self._of_labels(np.concatenate(labels), scores.shape[1]) if labels else scores
        )
        losses = [self._loss(self._logits(level, features), target) for level in self.blocks]
        self._optimiser.zero_grad()
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        self.steps += 1

    def measure(self, images: Crops, order: Sequence[int]) -> dict[int, float]:
        """Agreement of each level with the deepest: IoU per class, mean over one crop of each image that has foreground.

        Raises:
            ExportError: no crop has any, so that nothing can be compared.
        """
        agreed: dict[int, list[float | None]] = {level: [] for level in self.blocks}
        found = False
        for index in order:
            features, target = self._teach(
                images.cut(index, np.random.default_rng((self._seed, index))).tiles
            )
            deepest = self._served(target)
            found |= iou_with(deepest, deepest, self._threshold) is not None
            for level, values in agreed.items():
                with torch.no_grad():
                    scores = self._scores(self._logits(level, features)).numpy()
                values.append(iou_with(deepest, self._served(scores), self._threshold))
        if not found:
            raise ExportError(
                f"the network finds nothing in {len(order)} of the images, so that levels cannot be compared; "
                "use images that hold what it segments, and check the preprocessing with unetpp calibrate"
            )
        return {level: mean_agreement(values) or 0.0 for level, values in agreed.items()}

    def _teach(self, tiles: Tiles) -> tuple[dict[str, Tensor], Scores]:
        """Runs the frozen network: the tensors that enter the blocks, and the deepest scores (N, K, ...)."""
        producer = self.producer
        feed = {self._session.get_inputs()[0].name: preprocessed(tiles, producer.before)}
        *features, logits = self._session.run(self._outputs, feed)
        # Several sigmoid classes are learned without the background that is made of them.
        several = producer.after.activation == "sigmoid-per-class"
        after: Tail = dataclasses.replace(producer.after, activation="sigmoid") if several else producer.after
        scores = activated(enlarged(logits, producer.network.strides(self.output)), after)
        named = zip(self._outputs, features, strict=False)
        return {name: torch.from_numpy(value) for name, value in named}, scores

    def _served(self, scores: Scores) -> Scores:
        """Scores of the classes, with the background that the server has."""
        activation = self.producer.after.activation
        if activation == "sigmoid":
            # What follows is a channel of objects.
            return scores[:, :1]
        several = activation == "sigmoid-per-class"
        return activated(scores, Tail("sigmoid-per-class", applied=True)) if several else scores

    def _of_labels(self, labels: UInt8[ndarray, "N *tile"], channels: int) -> Scores:
        """The scores that would be right: 1 in the channel of the class, which is the first one without a background."""
        first = 0 if self._softmax else 1
        right = np.stack([labels == value for value in range(first, first + channels)], axis=1)
        return right.astype(np.float32)

    @property
    def _softmax(self) -> bool:
        return self.producer.after.activation == "softmax"

    def _logits(self, level: int, features: dict[str, Tensor]) -> Tensor:
        block = self.blocks[level]
        logits: Tensor = block(features[block.start])
        factor = self.strides[level]
        mode = "bilinear" if self.producer.network.dims == 2 else "trilinear"
        return logits if factor == 1 else functional.interpolate(logits, scale_factor=factor, mode=mode)

    def _scores(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits, dim=1) if self._softmax else torch.sigmoid(logits)

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """½ · cross-entropy + 1 − Dice against the deepest scores: the loss of the paper with soft targets."""
        if self._softmax:
            entropy, first = functional.cross_entropy(logits, target), 1
        else:
            entropy, first = functional.binary_cross_entropy_with_logits(logits, target), 0
        dice = soft_dice(self._scores(logits)[:, first:], target[:, first:])
        return 0.5 * entropy + (1 - dice).mean()

    def save(self) -> None:
        """Keeps weights, moments, steps and the best of each level, so that the run can go on as if it had not stopped."""
        parameters = state([*self.blocks.values()])
        tensors = {f"weight.{k}": one.detach().clone() for k, one in enumerate(parameters)}
        for k, one in enumerate(parameters):
            tensors |= {f"{name}.{k}": self._optimiser.state[one][name] for name in MOMENTS}
        for level, weights in self._best.weights.items():
            tensors |= {f"best.{level}.{name}": one for name, one in weights.items()}
        metadata = {
            "run": self._run,
            "steps": str(self.steps),
            "waiting": str(self._best.waiting),
            "agreement": json.dumps(self._best.agreement),
        }
        self._progress.parent.mkdir(parents=True, exist_ok=True)
        with atomic(self._progress) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    def _resume(self) -> None:
        """Goes on from `save`.

        Raises:
            ExportError: the progress there cannot be read, or is of another bundle or of other images.
        """
        if not self._progress.is_file():
            return
        try:
            with safe_open(self._progress, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors: Weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ExportError(f"{self._progress}: damaged ({error}); remove it to start anew") from error
        if metadata.get("run") != self._run:
            raise ExportError(
                f"{self._progress} holds the progress of a run on another bundle, other images or another seed; "
                "give those again to go on, or remove the file to start anew"
            )
        parameters = state([*self.blocks.values()])
        with torch.no_grad():
            for k, one in enumerate(parameters):
                one.copy_(tensors[f"weight.{k}"])
        moments = {k: {name: tensors[f"{name}.{k}"] for name in MOMENTS} for k in range(len(parameters))}
        self._optimiser.load_state_dict({**self._optimiser.state_dict(), "state": moments})
        self.steps = int(metadata["steps"])
        agreement = {int(level): value for level, value in json.loads(metadata["agreement"]).items()}
        weights = {level: _below(tensors, f"best.{level}.") for level in agreement}
        self._best = Best(agreement, weights, int(metadata["waiting"]))


def split(images: int, seed: int) -> tuple[list[int], list[int]]:
    """Returns the images that are held out and those that are trained on."""
    order = [int(index) for index in np.random.default_rng(seed).permutation(images)]
    count = min(math.ceil(images * HELD_OUT_SHARE), MAX_HELD_OUT)
    return order[:count], order[count:]


def _below(tensors: Weights, prefix: str) -> Weights:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
