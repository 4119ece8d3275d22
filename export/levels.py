"""Gives a network with one head the others by distillation, without labels; its own answer stays the same to the bit.

In the graph of level j the node X^{0,j} feeds its head alone. So a private copy of that node, with a head, costs no work
at this level, and the deepest level, which uses the original, does not change. The copies learn the deepest scores on
images of the user; everything else is frozen and runs on ONNX Runtime.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from export.block import Block, state
from export.card import ExportError
from export.cut import cut
from export.crops import Crops
from export.golden import activated, enlarged, preprocessed
from export.importing import open_session
from export.producer import Producer
from export.tail import Tail
from model.checkpoint import atomic
from model.losses import soft_dice
from server.arrays import Tiles
from server.segment.quality import overlap

# Pixels per axis of a crop, and crops per step, by dims.
CROP = {2: 128, 3: 32}
BATCH = {2: 8, 3: 4}

# Steps between two measurements on the images that are not trained on; training ends when `PATIENCE` of them bring no level more.
ROUND = 25
PATIENCE = 4
MAX_STEPS = 400
LEARNING_RATE = 1e-3

# Images that are not trained on: share, and how many at most.
HELD_OUT_SHARE, MAX_HELD_OUT = 0.2, 24
MIN_IMAGES = 4

PROGRESS = "progress.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Distilled:
    """A level that was added.

    Attributes:
        level: its number.
        agreement: IoU of its foreground with the deepest level's, mean over crops of images that were not trained on.
        steps: optimisation steps of the run.
    """

    level: int
    agreement: float
    steps: int


class Distillation:
    """Blocks and heads of all missing levels, which learn together: one run of the network feeds them all.

    Args:
        producer: network with one head.
        folder: where progress is kept; a run that is there goes on.
        run: name of the run, of bundle and images; progress of another run is refused.
        seed: of the crops.

    Raises:
        ExportError: the network has several heads, or no nodes X^{0,j} are found.
    """

    def __init__(self, producer: Producer, folder: Path, run: str, seed: int = 0) -> None:
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
                "no nodes X^{0,j} were found in the graph: it is no UNet++, or its blocks are not recognised"
            )
        self.producer = producer
        self.seed = seed
        self.steps = 0
        classes = network.shapes[self.output][1]
        self.blocks = {
            level: Block(network.model, one.start, one.name, one.channels, classes, network.dims)
            for level, one in sorted(found.items())
        }
        self.strides = {level: found[level].stride for level in self.blocks}
        self._outputs = [*dict.fromkeys(block.start for block in self.blocks.values()), self.output]
        self._session = open_session(cut(network.model, self._outputs))
        self._optimiser = torch.optim.Adam(state([*self.blocks.values()]), lr=LEARNING_RATE)
        self._folder, self._run = folder, run
        self._resume()

    def step(self, images: Crops, order: Sequence[int]) -> None:
        """Makes one optimisation step on a batch of crops."""
        random = np.random.default_rng((self.seed, self.steps))
        chosen = random.choice(order, BATCH[self.producer.network.dims])
        features, target = self._teach(Tiles.stack([images.cut(int(index), random) for index in chosen]))
        losses = [self._loss(self._logits(level, features), target) for level in self.blocks]
        self._optimiser.zero_grad()
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        self.steps += 1

    def measure(self, images: Crops, order: Sequence[int]) -> dict[int, float]:
        """Agreement of each level with the deepest, as IoU of the foreground, mean over one crop of each image."""
        agreed: dict[int, list[float]] = {level: [] for level in self.blocks}
        for index in order:
            features, target = self._teach(images.cut(index, np.random.default_rng((self.seed, index))))
            for level, values in agreed.items():
                with torch.no_grad():
                    scores = self._scores(self._logits(level, features))
                same = overlap(
                    _foreground(scores, softmax=self._softmax), _foreground(target, softmax=self._softmax)
                )
                values.append(same.iou)
        return {level: float(np.mean(values)) for level, values in agreed.items()}

    def _teach(self, tiles: Tiles) -> tuple[dict[str, Tensor], Tensor]:
        """Runs the frozen network: the tensors that enter the blocks, and the deepest scores (N, K, ...)."""
        producer = self.producer
        feed = {self._session.get_inputs()[0].name: preprocessed(tiles, producer.before)}
        *features, logits = self._session.run(self._outputs, feed)
        scores = activated(enlarged(logits, producer.network.stride(self.output)), self._per_class)
        named = zip(self._outputs, features, strict=False)
        return {name: torch.from_numpy(value) for name, value in named}, torch.from_numpy(scores)

    @property
    def _softmax(self) -> bool:
        return self.producer.after.activation == "softmax"

    @property
    def _per_class(self) -> Tail:
        """The activation without the background that is made of several sigmoid classes."""
        after = self.producer.after
        several = after.activation == "sigmoid-per-class"
        return dataclasses.replace(after, activation="sigmoid") if several else after

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

    def train(
        self, images: Crops, max_steps: int, on_progress: Callable[[int, int, dict[int, float]], None]
    ) -> list[Distilled]:
        """Trains until the held-out images bring no more, and keeps the best weights of each level.

        Args:
            images: all images; the last ones of a random order are not trained on.
            max_steps: steps at most.
            on_progress: callback with the steps done, the steps at most and the last agreement of each level.
        """
        order = np.random.default_rng(self.seed).permutation(len(images))
        count = min(math.ceil(len(images) * HELD_OUT_SHARE), MAX_HELD_OUT)
        train, held_out = order[count:], order[:count].tolist()
        best = dict.fromkeys(self.blocks, -1.0)
        kept: dict[int, dict[str, Tensor]] = {}
        waiting = 0
        while True:
            agreement = self.measure(images, held_out)
            on_progress(self.steps, max_steps, agreement)
            better = [level for level, value in agreement.items() if value > best[level]]
            waiting = 0 if better else waiting + 1
            for level in better:
                best[level] = agreement[level]
                kept[level] = {
                    name: one.detach().clone() for name, one in self.blocks[level].state_dict().items()
                }
            if waiting >= PATIENCE or self.steps >= max_steps:
                break
            for _ in range(min(ROUND, max_steps - self.steps)):
                self.step(images, train)
            self.save()
        for level, weights in kept.items():
            self.blocks[level].load_state_dict(weights)
        return [Distilled(level, best[level], self.steps) for level in self.blocks]

    def save(self) -> None:
        """Keeps the weights, the optimiser's moments and the number of steps, so that the run can go on."""
        parameters = state([*self.blocks.values()])
        tensors = {f"weight.{k}": one.detach().clone() for k, one in enumerate(parameters)}
        for k, one in enumerate(parameters):
            tensors |= {
                f"{name}.{k}": self._optimiser.state[one][name]
                for name in MOMENTS
                if one in self._optimiser.state
            }
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic(self._folder / PROGRESS) as temporary:
            save_file(tensors, temporary, metadata={"steps": str(self.steps), "run": self._run})

    def _resume(self) -> None:
        """Goes on from `save`.

        Raises:
            ExportError: the progress there is of another bundle or of other images.
        """
        path = self._folder / PROGRESS
        if not path.is_file():
            return
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("run") != self._run:
                raise ExportError(
                    f"{self._folder} holds the progress of another run; remove it, or choose another --out"
                )
            parameters = state([*self.blocks.values()])
            moments: dict[int, dict[str, Tensor]] = {}
            with torch.no_grad():
                for k, one in enumerate(parameters):
                    one.copy_(file.get_tensor(f"weight.{k}"))
                    moments[k] = {name: file.get_tensor(f"{name}.{k}") for name in MOMENTS}
        whole = self._optimiser.state_dict()
        self._optimiser.load_state_dict({**whole, "state": moments})
        self.steps = int(metadata["steps"])


def _foreground(scores: Tensor, *, softmax: bool) -> np.ndarray:
    """Pixels of any foreground class: (N, ...) bool."""
    values = scores.numpy()
    found: np.ndarray = values.argmax(1) > 0 if softmax else values.max(1) > 0.5
    return found
