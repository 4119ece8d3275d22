"""Many inputs, some at a time: each is segmented, written and reported by itself, and none harms another."""

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from client import errors
from client.documents import ModelCard, ModelSummary, Progress
from client.inputs import Input, shown
from client.journal import Journal, sha256, write
from client.result import Result


class Segmenting(Protocol):
    """`AsyncLocal` and `Remote`."""

    async def models(self) -> list[ModelSummary]:
        """What is open."""

    async def model(self, name: str) -> ModelCard:
        """The card of a model."""

    async def segment(self, source: Path, *, progress: Progress = ..., **asked: Any) -> Result:
        """One answer."""


@dataclass(frozen=True)
class Plan:
    """What is to be done with all inputs.

    Attributes:
        asked: parameters of the server; `formats` among them.
        out: folder of the answers; beside the inputs, if None.
        output: the one file of the one answer, instead.
        references: the reference of each input that has one.
        jobs: inputs at a time.
        resume: leaves out what the journal says is done.
    """

    asked: dict[str, Any]
    out: Path | None = None
    output: Path | None = None
    references: dict[Input, Path] = field(default_factory=dict)
    jobs: int = 1
    resume: bool = False


class Watcher(Protocol):
    """Who shows how far it is."""

    def began(self, one: Input) -> Progress:
        """An input is begun; told of its windows."""

    def ended(self, one: Input, text: str, *, failed: bool) -> None:
        """It is done, or not; says how."""


async def card_of(params: Segmenting, name: str | None) -> ModelCard:
    """The card of the model that will be served."""
    return await params.model(name or next(model["name"] for model in await params.models() if model["default"]))


async def run(params: Segmenting, card: ModelCard, plan: Plan, journal: Journal, watcher: Watcher) -> None:
    """Works through the journal's inputs.

    Args:
        params: who segments.
        card: of the model, for what serves.
        plan: what is asked.
        journal: told of each input; written also where this is interrupted.
        watcher: shown each input.

    Raises:
        Unreachable, KeyNeeded: nothing more can come of it; what was not begun is still "pending".
    """
    waiting = iter(journal.entries)
    work = _Work(params, card, plan, journal, watcher)
    try:
        tasks = [asyncio.create_task(work.through(waiting)) for _ in range(min(plan.jobs, len(journal.entries)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        journal.write(force=True)


@dataclass(frozen=True)
class _Work:
    params: Segmenting
    card: ModelCard
    plan: Plan
    journal: Journal
    watcher: Watcher

    async def through(self, waiting: Iterator[Input]) -> None:
        """One input after the other, of those that several take from."""
        for one in waiting:
            progress = self.watcher.began(one)
            try:
                text, failed = await self._one(one, progress), False
            except (errors.Unreachable, errors.APIKeyMiddleware) as error:
                self._failed(one, error)
                raise
            except (errors.SegmentError, OSError) as error:
                text, failed = self._failed(one, error), True
            self.watcher.ended(one, text, failed=failed)

    def _failed(self, one: Input, error: Exception) -> str:
        known = {key: value for key in ("sha256", "bytes", "outputs") if (value := self.journal.entries[one].get(key)) is not None}
        told = {"detail": str(error)}
        if isinstance(error, errors.SegmentError):
            told |= {key: value for key in ("type", "request_id") if (value := getattr(error, key))}
        self.journal.set(one, **known, status="failed", error=told)
        return str(error)

    async def _one(self, one: Input, progress: Progress) -> str:
        reference = self.plan.references.get(one)
        digest = await asyncio.to_thread(sha256, one.path)
        reference_digest = None if reference is None else await asyncio.to_thread(sha256, reference)
        if self.plan.resume and await asyncio.to_thread(self.journal.is_complete, one, digest, reference_digest):
            return "as before"
        # Whatever happens now, the answer of before is not the one to this.
        facts = {"sha256": digest, "bytes": one.path.stat().st_size, "reference_sha256": reference_digest}
        self.journal.set(one, status="pending", **facts)
        result = await self.params.segment(one.path, reference=reference, progress=progress, **self.plan.asked)
        paths = await asyncio.to_thread(self._write, one, result)
        outputs = [
            {"path": self.journal.name(path), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for path, data in zip(paths, result.files.values(), strict=True)
        ]
        lost = [row for row in result.images if row["status"] != "ok"]
        if lost:
            # A later run tries the whole again.
            self.journal.set(one, status="failed", **facts, outputs=outputs)
            raise errors.Refused(
                f"{len(lost)} of {len(result.images)} images of the zip could not be segmented; the others are in {shown(paths[-1].parent)}"
                + "".join(f"\n    {row['name']}: {row.get('detail', 'says no more')}" for row in lost)
            )
        served = {"mode": result.mode, "level": result.level, "precision": result.precision, **self._engine(result)}
        self.journal.set(
            one, status="done", **facts, outputs=outputs, **served, degraded=result.degraded or None, timings_ms=dict(result.timings_ms),
            iou=result.iou, dice=result.dice, note=result.note or None, request_id=result.request_id or None,
        )  # fmt: skip
        return told(result, paths)

    def _engine(self, result: Result) -> dict[str, str]:
        graph = "accurate" if result.mode == "accurate" else f"L{result.level}"
        rows = [row for row in self.card["serving"] if (row["graph"], row["precision"]) == (graph, result.precision)]
        return {"engine": rows[0]["engine"], "provider": rows[0]["provider"]} if rows else {}

    def _write(self, one: Input, result: Result) -> list[Path]:
        paths = []
        for name, data in result.files.items():
            path = self.plan.output or one.answer(self.plan.out, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, data)
            paths.append(path)
        return paths


def told(result: Result, paths: list[Path]) -> str:
    """An answer in a line or a few."""
    spent_ms = sum(result.timings_ms.values())
    places = f"{len(paths)} files in {shown(paths[-1].parent)}" if result.images else ", ".join(map(shown, paths))
    lines = [f"{places}  {result.model} {result.mode} L{result.level} {result.precision}, {spent_ms:.0f} ms"]
    if result.iou is not None:
        lines.append(f"IoU {result.iou:.4f}  Dice {result.dice:.4f}")
    if result.note:
        lines.append(f"note: {result.note}")
    return "\n".join(lines)
