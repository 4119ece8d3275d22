"""Segments many inputs, several at a time; a failure affects its own input only."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from client.display import SKIPPED, Display
from client.errors import InputError, TransportError
from client.files import byte_size, printable, replacing, sha256
from client.inputs import Input
from client.report import Report
from client.result import Result
from server.errors import Unauthorized, UnetppError
from server.segment.request import OnProgress

# After these no other input would succeed.
FATAL = (TransportError, Unauthorized)


class Segmenter(Protocol):
    """`AsyncLocal` and `Remote`."""

    async def models(self) -> list[dict[str, Any]]:
        """Lists the models."""

    async def model(self, name: str) -> dict[str, Any]:
        """Returns the card of a model."""

    async def segment(self, source: Path, *, progress: OnProgress = ..., **parameters: Any) -> Result:
        """Segments one input."""


async def model_card(segmenter: Segmenter, name: str | None) -> dict[str, Any]:
    """Returns the card of a model, the default one if no name is given."""
    return await segmenter.model(
        name or next(model["name"] for model in await segmenter.models() if model["default"])
    )


@dataclass(frozen=True)
class Batch:
    """A run over many inputs.

    Attributes:
        segmenter: server, or this process.
        card: card of the model.
        parameters: arguments of `segment`, `formats` among them.
        report: lists the inputs and takes their outcome.
        display: shows the progress.
        out: folder of the answers; beside the inputs if None.
        output: file of the only answer instead.
        references: references by input.
        jobs: number of inputs at a time.
        resume: whether inputs that the report calls complete are skipped.
    """

    segmenter: Segmenter
    card: dict[str, Any]
    parameters: dict[str, Any]
    report: Report
    display: Display
    out: Path | None = None
    output: Path | None = None
    references: dict[Input, Path] = field(default_factory=dict)
    jobs: int = 1
    resume: bool = False

    async def run(self) -> None:
        """Processes all inputs of the report, and writes the report also when it is interrupted.

        Raises:
            TransportError, Unauthorized: no other input would succeed; those that were not started stay
                "pending".
        """
        waiting = iter(self.report.entries)
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(self.jobs, len(self.report.entries))):
                    workers.create_task(self._work(waiting))
        except ExceptionGroup as group:
            raise group.exceptions[0] from group
        finally:
            self.report.write(force=True)

    async def _work(self, waiting: Iterator[Input]) -> None:
        for one in waiting:
            progress = self.display.started(one)
            try:
                self.display.finished(one, await self._process(one, progress), failed=False)
            except (UnetppError, OSError) as error:
                self._fail(one, error)
                if isinstance(error, FATAL):
                    raise
                self.display.finished(one, str(error), failed=True)

    def _fail(self, one: Input, error: Exception) -> None:
        entry = {key: self.report.entries[one].get(key) for key in ("sha256", "bytes", "outputs")}
        problem: dict[str, Any] = {"detail": str(error)}
        if isinstance(error, UnetppError):
            problem |= {"code": error.code} | error.fields
        self.report.update(one, **entry, status="failed", error=problem)

    async def _process(self, one: Input, progress: OnProgress) -> str:
        reference = self.references.get(one)
        digest = await asyncio.to_thread(sha256, one.path)
        reference_digest = None if reference is None else await asyncio.to_thread(sha256, reference)
        if self.resume and await asyncio.to_thread(self.report.is_complete, one, digest, reference_digest):
            return SKIPPED
        facts = {
            "sha256": digest,
            "bytes": await asyncio.to_thread(byte_size, one.path),
            "reference_sha256": reference_digest,
        }
        # Whatever happens now, the answer of an earlier run is not the one to this.
        self.report.update(one, status="pending", **facts)
        result = await self.segmenter.segment(
            one.path, reference=reference, progress=progress, **self.parameters
        )
        paths = await asyncio.to_thread(self._write, one, result)
        facts["outputs"] = [{"path": self.report.relative(path), "sha256": sha256(path)} for path in paths]
        if failed := [row for row in result.images if row["status"] != "ok"]:
            self.report.update(one, status="failed", **facts)
            reasons = "".join(
                f"\n    {row['name']}: {row.get('detail', 'no reason given')}" for row in failed
            )
            raise InputError(f"{len(failed)} of {len(result.images)} images of the zip failed:{reasons}")
        self.report.update(one, status="done", **facts, **self._served(result))
        return _summary(result, paths)

    def _served(self, result: Result) -> dict[str, Any]:
        graph = ("accurate" if result.mode == "accurate" else f"L{result.level}", result.precision)
        rows = (row for row in self.card.get("serving", ()) if (row["graph"], row["precision"]) == graph)
        engine = {key: value for key, value in next(rows, {}).items() if key in ("engine", "provider")}
        names = ("mode", "level", "precision", "timings_ms", "iou", "dice")
        optional = {name: getattr(result, name) or None for name in ("degraded", "note", "request_id")}
        return engine | {name: getattr(result, name) for name in names} | optional

    def _write(self, one: Input, result: Result) -> list[Path]:
        paths = [self.output or one.output(self.out, name) for name in result.files]
        for path, data in zip(paths, result.files.values(), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(data)
        return paths


def _summary(result: Result, paths: list[Path]) -> str:
    """Describes an answer in a few lines."""
    files = ", ".join(map(printable, paths))
    if result.images:
        files = f"{len(paths)} files in {printable(paths[-1].parent)}"
    served = f"{result.model} {result.mode} L{result.level} {result.precision}"
    lines = [f"{files}  {served}, {result.total_ms:.0f} ms"]
    if result.iou is not None:
        lines.append(f"IoU {result.iou:.4f}  Dice {result.dice:.4f}")
    return "\n".join(lines + ([f"note: {result.note}"] if result.note else []))
