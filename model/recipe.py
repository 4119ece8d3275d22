"""Recipes: what is trained, on what and how, as read from a TOML file."""

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.config import UNetPlusPlusConfig
from model.data import DataConfig


class OptimisationConfig(BaseModel):
    """Optimisation of the network: Adam, with learning rate 3e-4 as in the paper.

    Attributes:
        batch: tiles per step.
        epochs: maximum number of epochs; an epoch is `tiles_per_image` tiles per training image.
        learning_rate: learning rate of Adam.
        weight_decay: decoupled (AdamW) where above 0.
        schedule: constant as in the paper, or one cycle: linear warm-up over the first tenth, then cosine to
            0.
        ema_decay: decay per step of the moving average of the weights, which is what is measured and kept (e.g. 0.998); 0 keeps the
            last weights.
        patience: epochs without a better validation Dice before the run stops.
        precision: bf16 (autocast) or fp32.
        seed: seed of the initial weights and of every draw.
        workers: loader processes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: int = Field(default=12, ge=1)
    epochs: int = Field(default=60, ge=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "one-cycle"] = "constant"
    ema_decay: float = Field(default=0, ge=0, lt=1)
    patience: int = Field(default=15, ge=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = Field(default=0, ge=0)
    workers: int = Field(default=1, ge=0)


class TrainConfig(BaseModel):
    """A training recipe: architecture, network, data and optimisation (a TOML file)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Literal["unetpp", "unet"] = "unetpp"
    network: UNetPlusPlusConfig = UNetPlusPlusConfig()
    data: DataConfig = DataConfig()
    optimisation: OptimisationConfig = OptimisationConfig()


class RecipeError(ValueError):
    """The recipe or an override is wrong, or does not belong to the run being resumed."""


def read_recipe(path: Path, overrides: list[str]) -> TrainConfig:
    """Reads a TOML recipe and applies `section.key=value` overrides (values in TOML syntax, or plain text).

    Raises:
        RecipeError: says which key is wrong and why.
    """
    try:
        recipe: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path}: {error}") from error
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator:
            raise RecipeError(
                f"override {override!r}: expected section.key=value, e.g. optimisation.epochs=10"
            )
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text
        *sections, key = name.split(".")
        table = recipe
        for depth, section in enumerate(sections, start=1):
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise RecipeError(f"override {override!r}: {'.'.join(sections[:depth])} is no section")
        table[key] = value
    try:
        return TrainConfig.model_validate(recipe)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise RecipeError(f"{path}: the recipe is not valid\n" + "\n".join(lines)) from error
