"""The curve of `mode=auto`: chains of levels, what each costs, and what it loses on held-out inputs."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Scores between which a pixel is uncertain.
UNCERTAIN = (0.2, 0.8)

# Points of IoU that `mode=auto` may lose on held-out inputs unless the request says otherwise.
MAX_LOSS = 0.25


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CurvePoint(_Part):
    """One place on the curve.

    Attributes:
        chain: levels that are run one after another, shallowest first.
        thresholds: by level of the chain but the last: an input goes on to the next level where the share of its
            uncertain pixels is above it; 1 lets none go on, -1 all.
        work: mean multiply-accumulates of an input, as a share of those of the deepest level.
        loss: points of IoU that are lost against the deepest level, mean over inputs that thresholds were not chosen on.
        error: standard error of that mean, in points.
        going_on: by level of the chain but the first: share of the inputs for which it is run.
    """

    chain: tuple[int, ...] = Field(min_length=1)
    thresholds: tuple[float, ...]
    work: float = Field(gt=0)
    loss: float
    error: float = Field(ge=0)
    going_on: tuple[float, ...]

    @model_validator(mode="after")
    def _check(self) -> "CurvePoint":
        if list(self.chain) != sorted(set(self.chain)):
            raise ValueError(f"levels of a chain go from shallow to deep: {self.chain}")
        if not len(self.chain) - 1 == len(self.thresholds) == len(self.going_on):
            raise ValueError("thresholds and going_on have one number for each step of the chain")
        if any(not -1 <= threshold <= 1 for threshold in self.thresholds):
            raise ValueError(f"thresholds are shares, or -1: {self.thresholds}")
        return self

    @property
    def likely_loss(self) -> float:
        """Points of IoU that should not be exceeded: one standard error above the mean."""
        return self.loss + self.error

    def limited(self, steps: slice) -> "CurvePoint":
        """The place with a part of its chain; its work and loss are those of the whole."""
        start, stop, _ = steps.indices(len(self.chain))
        inner = slice(start, stop - 1)
        return self.model_copy(
            update={
                "chain": self.chain[steps],
                "thresholds": self.thresholds[inner],
                "going_on": self.going_on[inner],
            }
        )


class DepthCurve(_Part):
    """Places between speed and quality, least work first, with the data that they were measured on.

    Attributes:
        reference: masks that were compared with; those of the deepest level where there were no labels, so that
            `loss` says how much masks differ from them.
        method: text on the choice of thresholds, and on the inputs that the loss was measured on.
        points: places on the curve; the last one loses nothing.
    """

    data: str
    images: int
    reference: Literal["labels", "deepest level"]
    method: str
    points: tuple[CurvePoint, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> "DepthCurve":
        if self.points[-1].likely_loss > 0:
            raise ValueError("the last point of the curve must lose nothing, as the deepest level does")
        if [point.work for point in self.points] != sorted(point.work for point in self.points):
            raise ValueError("points of the curve are sorted by work")
        return self

    @property
    def levels(self) -> set[int]:
        """Levels that are in a chain."""
        return {level for point in self.points for level in point.chain}

    def choose(self, max_loss: float = MAX_LOSS) -> CurvePoint:
        """The place with the least work whose likely loss is at most so many points of IoU."""
        return next(point for point in self.points if point.likely_loss <= max_loss)
