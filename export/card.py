"""The card: what a person says of a network, in TOML; the fields are those of the manifest, and what an ONNX file cannot tell."""

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from export.tail import Activation, Aggregation
from server.runtime.bundle import Class, ObjectChannel, Preprocessing, Window


class ExportError(ValueError):
    """The network or the card cannot become a bundle."""


class Input(Preprocessing):
    """Preprocessing that the network was trained with: statistics of the whole image are removed first, then constants.

    Attributes:
        normalization: one of `Manifest.normalization`.
        percentiles: those of "percentile".
    """

    normalization: Literal["zscore", "percentile", "unit", "none"]
    percentiles: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Input":
        if (self.normalization == "percentile") != (self.percentiles is not None):
            raise ValueError('percentiles belongs to normalization = "percentile", and is needed there')
        if self.percentiles and not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError("percentiles are two numbers between 0 and 100, the lower one first")
        if self.clip and self.clip[0] >= self.clip[1]:
            raise ValueError("clip is the lowest and then the highest value")
        if any(one <= 0 for one in self.std):
            raise ValueError("std must be positive")
        return self

    def preprocessing(self) -> Preprocessing:
        """The constant part, which becomes nodes of the graph."""
        return Preprocessing(**self.model_dump(include=set(Preprocessing.model_fields)))


class Card(BaseModel):
    """Description of a network by a person.

    Attributes:
        dims: 2 for images, 3 for volumes. It and the following are needed to import a network; a checkpoint of
            `unetpp train` tells them itself.
        input: preprocessing.
        activation: function that makes scores of a head's output: "softmax" (the first channel is background), "sigmoid" (one
            class), "sigmoid-per-class" (several classes, no background channel).
        activation_included: whether the network's graph ends in the activation.
        aggregation: way in which the heads of `accurate` become one.
        orientation: directions of the axes of a network for volumes, in nibabel's letters, e.g. "RAS".
        spacing: mm per voxel that a network for volumes was trained at; None takes any.
        mirror_axes: axes along which the network was trained on mirrored inputs, from 0; without them there is no `tta`.
        padding: that of the manifest; "reflect" where neither the card nor a checkpoint's recipe tells.
        threshold: foreground is a score above it, for one class.
        objects: meaning of a head's second channel, which tells touching objects apart; for one class with the activation "sigmoid".
        min_object_px: with `instances=true`, objects of fewer pixels (voxels) are removed where the request names no size.
        min_object_score: with `instances=true`, objects of a lower mean score are removed where the request names no `min_score`; 0 keeps all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    description: str
    intended_use: str
    channels: tuple[str, ...] = Field(min_length=1)
    classes: tuple[Class, ...] = Field(min_length=1)
    window: Window
    license: dict[str, str]
    provenance: dict[str, str]
    dims: Literal[2, 3] | None = None
    input: Input | None = None
    activation: Activation | None = None
    activation_included: bool = False
    aggregation: Aggregation = "mean-probability"
    orientation: str | None = None
    spacing: tuple[float, float, float] | None = None
    mirror_axes: tuple[int, ...] | None = None
    padding: Literal["reflect", "constant"] | None = None
    threshold: float = Field(0.5, gt=0, lt=1)
    objects: ObjectChannel | None = None
    min_object_px: int = Field(0, ge=0, le=1_000_000)
    min_object_score: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> "Card":
        if [one.value for one in self.classes] != list(range(1, len(self.classes) + 1)):
            raise ValueError(
                f"the values of the classes must be 1, 2, ...: {[one.value for one in self.classes]}"
            )
        if self.input:
            count = len(self.channels)
            for name in ("mean", "std", "channel_order"):
                if (values := getattr(self.input, name)) and len(values) != count:
                    raise ValueError(f"input.{name} has {len(values)} values, and there are {count} channels")
            if self.input.channel_order and sorted(self.input.channel_order) != list(range(count)):
                raise ValueError(f"input.channel_order names each of the channels 0 to {count - 1} once")
        if self.activation_included and self.aggregation == "mean-logit":
            raise ValueError("aggregation mean-logit needs logits: export the network without its activation")
        return self


def read_card(path: Path) -> Card:
    """Reads a card.

    Raises:
        ExportError: names the wrong field.
    """
    try:
        return Card.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise ExportError(f"{path}: not a valid card: {in_words(error)}") from error


def in_words(error: Exception) -> str:
    """The text of an error; of pydantic's a sentence per field."""
    if not isinstance(error, ValidationError):
        return str(error)
    wrong = [
        (".".join(map(str, one["loc"])), one["msg"].removeprefix("Value error, ")) for one in error.errors()
    ]
    return "; ".join(f"{field}: {message}".removeprefix(": ") for field, message in wrong)
