"""The operator's choices: read once, in the CLI; each room gets only its own group."""

import os
from pathlib import Path
from typing import Literal

from platformdirs import user_cache_path
from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HttpSettings(_Group):
    """Where the server listens."""

    host: str = Field("127.0.0.1", description="address to listen on; beyond loopback only with keys or `--insecure`")
    port: int = Field(8000, ge=1, le=65535, description="TCP port")
    ops_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="port of its own for /health/*, /metrics and POST /reload; unset: the first two share `port`",
    )
    ops_host: str = Field("127.0.0.1", description="address of that port; beyond loopback only with keys or `--insecure`, too")
    tls_cert: Path | None = Field(None, description="certificate chain (PEM); with `tls_key` both ports speak HTTPS only")
    tls_key: Path | None = Field(None, description="its private key (PEM), without a passphrase")
    max_connections: int = Field(
        800,
        ge=1,
        description="open connections, idle ones too; one more is closed at once. Below the usual 1024 open files of a process",
    )
    keep_alive_s: int = Field(65, ge=1, description="idle connections stay open this long (proxies expect over 60)")
    max_in_flight: int = Field(
        64,
        ge=1,
        description="segment requests worked on or waiting at once, and as many uploads to /jobs; one more gets 429 with Retry-After. Of each up to 4 MiB wait in memory and the rest on disk, so 64 take 256 MiB",
    )
    drain_s: float = Field(
        5,
        ge=0,
        le=3600,
        description="after SIGTERM the server is not ready and still answers for so long: balancers that ask every second or two have "
        "then noticed; Ctrl-C skips it",
    )
    stop_s: int = Field(
        15,
        ge=0,
        le=3600,
        description="then it listens no more, and requests may take so long until they get 503; with `drain_s` and "
        "what closing takes it fits into the 30 s after which Kubernetes kills. Where POST /segment shall finish long work, raise it, and "
        "that grace period (docker stop: -t) above the sum",
    )


class BatchingSettings(_Group):
    """How tiles of different requests share a run of a graph."""

    max_batch: int = Field(64, ge=1, description="tiles in one run at most; how many a graph really gets is measured at start")
    max_batch_pixels: int = Field(
        4_194_304,
        ge=4096,
        description="pixels in one run at most (16 tiles of 512²), which bounds the memory of activations; a larger tile runs "
        "alone. Start-up doubles a batch only while a tile becomes 5 % faster by it: on CPUs that is one to four tiles of 128²",
    )
    max_wait_ms: float = Field(
        2,
        ge=0,
        description="a batch with room waits so long for requests that are admitted and being decoded; nothing waits where nobody is on "
        "the way, other work waits, or start-up found that a run of one tile is as good",
    )


class RuntimeSettings(_Group):
    """What runs the graphs."""

    engine: Literal["auto", "onnxruntime", "openvino"] = Field(
        "auto", description="auto: the faster one by the stored tuning, else OpenVINO on CPUs where it is installed"
    )
    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = Field(
        "auto",
        description="ONNX Runtime provider; auto takes CUDA where it works, else the CPU; a named one must work (TensorRT "
        "builds an engine per tile size, which takes minutes, so it must be named)",
    )
    precision: Precision = Field(
        "auto", description="used where a request says auto: the fastest within 0.5 points of IoU of fp32, or this one"
    )
    threads: int = Field(0, ge=0, description="threads of one graph run; 0 = all cores this process may use")
    graph_memory_mb: int = Field(
        1024, ge=64, description="memory of open graphs, in MB; the least recently used is closed for one that needs the room"
    )
    tuning_folder: Path = Field(
        user_cache_path("unetpp") / "tuning", description="where `unetpp tune` stores its measurements, and every start looks"
    )


class LimitsSettings(_Group):
    """What a request may bring."""

    max_body_mb: int = Field(256, ge=1, description="bytes of a request body, in MiB; checked while it streams in")
    max_pixels: int = Field(100_000_000, ge=1, description="height × width of an image, checked before it is decoded")
    max_voxels: int = Field(250_000_000, ge=1, description="voxels of a volume or stack, checked before it is decoded")
    max_memory_mb: int = Field(
        4096, ge=64, description="working memory of one request, estimated from the header; more is refused with the numbers"
    )
    max_zip_images: int = Field(
        1000, ge=1, description="files of a zip of images; each is a request, and a few run at once. A folder sent at once fits"
    )
    max_zip_mb: int = Field(
        2048,
        ge=1,
        description="all files of a zip together, in MiB when unpacked, and all their answers together; counted while unpacking. Of the "
        "files four at a time lie on disk, each of `max_body_mb` at most, of the answers all",
    )
    max_wait_s: float = Field(
        120.0,
        gt=0,
        description="POST /segment refuses what would take longer, waiting included: 413 if it would alone, else 429 with the time to "
        "wait in Retry-After. So this bounds the queue, in seconds of work; above it clients and proxies have given up",
    )
    pixels_in_flight: int = Field(
        100_000_000,
        ge=1,
        description="pixels of images decoded at once, as many voxels of volumes, and as much again for jobs, which bounds memory; further ones wait in order, but inputs below a hundredth of it",
    )
    idle_upload_s: float = Field(
        30,
        gt=0,
        description="an upload that sends nothing for so long, or less than `min_pace_kb_s` over it, gets 408 and frees its place; an answer "
        "that is read no faster is cut off. A phone that changes networks is back sooner",
    )
    min_pace_kb_s: float = Field(16, gt=0, description="KiB per second, see `idle_upload_s`; the slowest mobile networks reach it")
    head_s: float = Field(
        10,
        gt=0,
        description="a connection whose request line and headers are not there by then is closed; they are sent at once, and lost packets again within seconds",
    )


class AuthSettings(_Group):
    """Who may ask."""

    keys_file: Path | None = Field(
        None,
        description="lines of `unetpp key NAME`; read again when it changes. All but health, metrics, page and docs then needs a key",
    )
    insecure: bool = Field(False, description="listen beyond loopback without keys: whoever reaches the port may use it")


class LogSettings(_Group):
    """What is said on stderr."""

    format: Literal["text", "json"] = Field(
        "text", description="text for terminals; json for collectors: one object per line, with the request's id where there is one"
    )
    trace_parent: Literal["caller", "root"] = Field(
        "caller",
        description="parent of a request's span: the caller's `traceparent`, whose sampling flag then counts, or none (root), with a "
        "link to the caller's span",
    )


class QualitySettings(_Group):
    """Comparing fast answers with accurate ones to the same inputs, while serving; neither leaves the memory."""

    agreement_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of the fast answers, those of jobs too, that is computed again in accurate mode and compared "
        "(`unetpp_agreement_*`), in what requests leave of the device; accurate costs up to nine times as much, so that this is at most "
        "a tenth more work",
    )
    agreement_fewest_per_hour: float = Field(
        12,
        ge=0,
        le=3600,
        description="so many at least, if there are so many, also under load, which is when answers are degraded: one that has waited for "
        "its part of the hour takes turns like a request. 12 are 288 a day, whose mean is known to a point of IoU where single ones scatter by 0.15. With this and the share at 0 nothing is computed again",
    )
    agreement_max_pixels: int = Field(
        16_777_216,
        ge=1,
        description="pixels or voxels of an answer that is compared; one at a time is kept for it, which together with this bounds memory. 4096² take at most 220 MB, as three channels of float32 and a mask",
    )


class JobsSettings(_Group):
    """Work that outlives its request."""

    folder: Path = Field(Path("var/jobs"), description="where jobs and results are kept; one server per folder")
    keep_results_h: float = Field(24, gt=0, description="hours until a finished job and its result are removed")
    max_disk_mb: int = Field(
        10_240,
        ge=1,
        description="inputs and results on disk, in MiB; over it a new job gets 507. 10 GiB are forty of the largest bodies",
    )
    max_queued: int = Field(
        1000,
        ge=1,
        description="jobs that wait; one more gets 429 with Retry-After. A folder of images sent at once fits; `max_disk_mb` bounds the same in bytes",
    )
    max_attempts: int = Field(
        5,
        ge=1,
        description="starts of a job that a crash of the server ended, until it is given up: a crash or two may be another's doing, five are its own",
    )
    concurrency: int = Field(1, ge=1, description="jobs that run at once; their memory adds up")


class Settings(BaseSettings):
    """All settings; environment variables `UNETPP_...`, groups joined with two underscores."""

    model_config = SettingsConfigDict(
        env_prefix="UNETPP_", env_nested_delimiter="__", frozen=True, extra="forbid", nested_model_default_partial_update=True
    )

    bundles: Path = Field(Path("bundles"), description="a bundle, or a folder of bundles; all are opened")
    default_model: str = Field("nuclei", description="bundle that answers requests without `model`; else the only or first")
    http: HttpSettings = HttpSettings()
    batching: BatchingSettings = BatchingSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    limits: LimitsSettings = LimitsSettings()
    auth: AuthSettings = AuthSettings()
    jobs: JobsSettings = JobsSettings()
    quality: QualitySettings = QualitySettings()
    log: LogSettings = LogSettings()


def _variables() -> dict[str, tuple[object, str | None]]:
    """(default, description) of every environment variable."""
    found: dict[str, tuple[object, str | None]] = {}
    for name, field in Settings.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, _Group):
            for key, inner in group.model_fields.items():
                found[f"UNETPP_{name}__{key}".upper()] = (inner.default, inner.description)
        else:
            found[f"UNETPP_{name}".upper()] = (field.default, field.description)
    return found


def unknown_variables() -> list[str]:
    """Variables with our prefix that are no setting: most likely misspelt."""
    # A group as a whole, in JSON, is a setting too.
    known = _variables().keys() | {f"UNETPP_{name}".upper() for name in Settings.model_fields}
    return sorted(name for name in os.environ if name.upper().startswith("UNETPP_") and name.upper() not in known)  # noqa: TID251


def otlp_endpoint_is_set() -> bool:
    """Whether OpenTelemetry's own variables say where traces go; what else they say is read by its packages."""
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return any(os.environ.get(name) for name in names)  # noqa: TID251


def markdown_table() -> str:
    """The README's table of settings: variable, default, meaning."""
    shown = ((name, "unset" if default is None else default, description) for name, (default, description) in _variables().items())
    rows = [f"| `{name}` | `{default}` | {description} |" for name, default, description in shown]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows]) + "\n"
