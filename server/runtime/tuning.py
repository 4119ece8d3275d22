"""Measurements of one bundle on one class of machine: made by `unetpp tune`, stored in a small file, used by every start."""

import hashlib
import json
import logging
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.runtime.bundle import Bundle
from server.runtime.machine import Machine

log = logging.getLogger(__name__)

# Folder of a bundle that may hold tunings for classes of machines. Its files are not listed in the manifest.
BUNDLE_FOLDER = "tuning"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TuningKey(_Part):
    """Conditions under which a tuning is valid.

    Attributes:
        bundle: SHA-256 of the manifest.
        processor: model name.
        features: instruction sets, sorted.
        cores: cores of the process.
        engines: version per engine.
        providers: execution providers, sorted.
        gpus: names and driver of the GPUs; empty on a CPU.
        threads: threads of one graph run.
    """

    bundle: str
    processor: str
    features: tuple[str, ...]
    cores: int
    engines: dict[str, str]
    providers: tuple[str, ...]
    gpus: tuple[str, ...]
    threads: int

    @classmethod
    def of(cls, bundle: Bundle, machine: Machine, threads: int = 0) -> "TuningKey":
        """The key of a bundle on a machine."""
        providers = sorted({provider for row in machine.engines.values() for provider in row})
        return cls(
            bundle=bundle.sha256,
            processor=machine.processor,
            features=tuple(sorted(machine.features)),
            cores=machine.cores,
            engines=dict(sorted(machine.versions.items())),
            providers=tuple(providers),
            gpus=machine.gpus,
            threads=threads or machine.cores,
        )

    @property
    def digest(self) -> str:
        """16 digits of the key's SHA-256."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def file_name(self) -> str:
        """Name of the file that holds the tuning."""
        return f"{self.digest}.json"


class TuningRow(_Part):
    """One measured point.

    Attributes:
        graph: name in the manifest.
        precision: fp32, bf16, fp16 or int8.
        engine: key of `ENGINES`.
        provider: execution provider.
        milliseconds: minimum time of one tile.
        batch_pixels: pixels of the largest batch that was worth its delay.
    """

    graph: str
    precision: str
    engine: str
    provider: str
    milliseconds: float = Field(gt=0)
    batch_pixels: int = Field(ge=1)


class Tuning(_Part):
    """A stored tuning.

    Attributes:
        key: bundle, machine and settings that it is valid for.
        created: time of the measurement, in seconds since 1970.
        rows: measured points.
    """

    key: TuningKey
    created: float = Field(default_factory=time.time)
    rows: tuple[TuningRow, ...]

    def row(self, graph: str, precision: str, engine: str, provider: str) -> TuningRow | None:
        """The point measured for a graph at a precision on an engine and provider."""
        point = (graph, precision, engine, provider)
        rows = (row for row in self.rows if (row.graph, row.precision, row.engine, row.provider) == point)
        return next(rows, None)


def find_tuning(bundle: Bundle, machine: Machine, folder: Path, threads: int = 0) -> Tuning | None:
    """Reads the tuning that fits, from the cache folder or else from the bundle's own folder; None where there is none.

    A file that cannot be read, or whose key differs, is ignored with a warning: a start never fails because
    of a tuning.
    """
    key = TuningKey.of(bundle, machine, threads)
    name = key.file_name
    for path in (folder / name, bundle.folder / BUNDLE_FOLDER / name):
        try:
            tuning = Tuning.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValidationError) as error:
            log.warning("the tuning %s is ignored, because it cannot be read: %s", path, type(error).__name__)
            continue
        if tuning.key == key:
            return tuning
        log.warning("the tuning %s is ignored, because it was made for another bundle or machine", path)
    return None


def store_tuning(tuning: Tuning, folder: Path) -> Path:
    """Writes a tuning, whole or not at all, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / tuning.key.file_name
    part = path.with_suffix(".part")
    part.write_text(tuning.model_dump_json(indent=1) + "\n")
    part.replace(path)
    return path
