"""The operator's settings: read once from the environment, in the CLI; each room is given only its own group.

A value that no operator has needed to change is a constant. Constants that belong to a group are fields too,
made by `_constant`, so that a test can make one small; the environment does not set them.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from platformdirs import user_cache_path
from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]

PREFIX = "UNETPP_"

# Variables that Kubernetes puts into each container for a Service named `unetpp` or `unetpp-...`.
SERVICE_LINK = re.compile(r"UNETPP_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")

_CONSTANT = {"constant": True}


def _constant(value: float, reason: str) -> Any:
    """A positive number that constructors take and the environment does not."""
    return Field(value, gt=0, description=reason, json_schema_extra=dict(_CONSTANT))


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HttpSettings(_Group):
    """Addresses, ports and connections of the server, and its shutdown."""

    host: str = Field(
        "127.0.0.1", description="address to listen on; beyond loopback only with keys or `--insecure`"
    )
    port: int = Field(8000, ge=1, le=65535, description="TCP port")
    ops_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="port of its own for /health/*, /metrics and POST /reload; unset: the first two share `port`",
    )
    ops_host: str = Field(
        "127.0.0.1",
        description="address of the ops port; beyond loopback only with keys or `--insecure`, too",
    )
    grpc_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="port on which the Open Inference Protocol is also served over gRPC, at `host`; needs the extra `cluster`. Each "
        "request there holds its message in memory",
    )
    tls_cert: Path | None = Field(
        None, description="certificate chain (PEM); with `tls_key` both ports speak HTTPS only"
    )
    tls_key: Path | None = Field(
        None, description="private key of the certificate (PEM), without a passphrase"
    )
    max_in_flight: int = Field(
        64,
        ge=1,
        description="segment requests that run or wait at once, and as many uploads to /jobs; one more gets 429 with "
        "Retry-After. Each takes up to 4 MiB of memory for its body, the rest of which lies on disk: 64 take 256 MiB",
    )
    drain_s: float = Field(
        5,
        ge=0,
        le=3600,
        description="seconds after SIGTERM in which the server is not ready and still answers, so that load balancers which ask "
        "every second or two notice; Ctrl-C skips them",
    )
    stop_s: int = Field(
        15,
        ge=0,
        le=3600,
        description="seconds after that in which open requests may finish; then they get 503. `drain_s`, this and up to 10 s "
        "for closing are 30 s: give the server a grace period of 35 s (Kubernetes: terminationGracePeriodSeconds; docker stop: -t). For "
        "long work over POST /segment raise both",
    )

    max_connections: int = _constant(
        800,
        "Open connections of a port, idle ones too; one more is closed at once. Below the usual 1024 open files of a process.",
    )


class BatchingSettings(_Group):
    """Batches: tiles of different requests that share one run of a graph."""

    max_batch_pixels: int = Field(
        4_194_304,
        ge=4096,
        description="pixels in one run at most (16 tiles of 512²), which bounds the memory of activations; a larger tile runs "
        "alone. On CPUs without a stored tuning a run has at most 65,536",
    )
    max_wait_ms: float = Field(
        2,
        ge=0,
        description="milliseconds that a batch with room waits for requests that are being decoded; it does not wait where none "
        "is, or where other work is ready",
    )

    max_batch: int = _constant(
        64, "Tiles in one run at most: more than that no engine has made faster, whatever their size."
    )


class RuntimeSettings(_Group):
    """Engine, precision, threads and memory of the graphs."""

    engine: Literal["auto", "onnxruntime", "openvino"] = Field(
        "auto",
        description="auto: the faster one by the stored tuning, else OpenVINO on CPUs where it is installed",
    )
    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = Field(
        "auto",
        description="ONNX Runtime's execution provider; auto takes CUDA where it works, else the CPU; a named one must work "
        "(TensorRT builds an engine per tile size, which takes minutes, so auto never takes it)",
    )
    precision: Precision = Field(
        "auto",
        description="what precision=auto means; auto: the fastest within 0.5 points of IoU of fp32, by the stored tuning or else by a "
        "fixed rule",
    )
    threads: int = Field(0, ge=0, description="threads of one graph run; 0 = all cores this process may use")
    graph_memory_mb: int = Field(
        1024,
        ge=64,
        description="memory of open graphs, in MB; the least recently used is closed for one that needs the room",
    )
    tuning_folder: Path = Field(
        user_cache_path("unetpp") / "tuning",
        description="where `unetpp tune` stores its measurements and every start looks for them",
    )


class LimitsSettings(_Group):
    """Limits of the size and the duration of a request."""

    max_body_mb: int = Field(
        256,
        ge=1,
        description="size of a request body, in MiB; checked while it streams in, and for each file of a zip",
    )
    max_pixels: int = Field(
        100_000_000, ge=1, description="height × width of an image, checked before it is decoded"
    )
    max_voxels: int = Field(
        250_000_000, ge=1, description="voxels of a volume or stack, checked before it is decoded"
    )
    max_memory_mb: int = Field(
        4096,
        ge=64,
        description="working memory of one request in MiB, estimated from the header; more gets 413",
    )
    max_wait_s: float = Field(
        120.0,
        gt=0,
        description="predicted seconds of one request over POST /segment, waiting included; more gets 413 if it would take that "
        "long alone, else 429 with the time to wait in Retry-After. It bounds the queue",
    )

    max_zip_images: int = _constant(
        1000,
        "Files of a zip; each is a request, and a few run at once. A folder of images sent at once fits.",
    )
    max_zip_mb: int = _constant(
        2048,
        "MiB of all files of a zip together, unpacked, and of all answers together. At most four of the files lie on disk at "
        "once, and all of the answers.",
    )
    pixels_in_flight: int = _constant(
        100_000_000,
        "Pixels of images that are decoded at once, as many voxels of volumes, and as much again for jobs, which bounds memory. "
        "Others wait in order, except inputs below a hundredth of it. It is `max_pixels`, so that the largest image fits.",
    )
    idle_upload_s: float = _constant(
        30,
        "Seconds after which an upload that sends nothing gets 408, and an answer that is not read is cut off. A phone that "
        "changes networks is back sooner.",
    )
    min_pace_kb_s: float = _constant(
        16,
        "KiB per second that an upload or download must reach over `idle_upload_s`; the slowest mobile networks do.",
    )
    head_s: float = _constant(
        10,
        "Seconds in which the request line and headers must come. They are sent at once, and lost packets again within seconds.",
    )


class AuthSettings(_Group):
    """Access to the server."""

    keys_file: Path | None = Field(
        None,
        description="lines of `unetpp key NAME`; read again when it changes. All paths then need a key, except health, metrics, "
        "the page, the documentation of the API and that of errors",
    )
    insecure: bool = Field(
        False,
        description="listen beyond loopback without keys: everyone who reaches the port may use the server",
    )


class LogSettings(_Group):
    """Log on stderr, and spans."""

    format: Literal["text", "json"] = Field(
        "text",
        description="text for terminals; json for collectors: one object per line, with the request's id where there is one",
    )
    trace_parent: Literal["caller", "root"] = Field(
        "caller",
        description="parent of a request's span: the caller's `traceparent`, whose sampling flag then counts, or none (root), with a "
        "link to the caller's span",
    )


class QualitySettings(_Group):
    """Shadow evaluation: fast answers are compared with accurate ones to the same inputs, while serving, in memory only."""

    agreement_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of the answers of the modes fast and auto that is computed again in accurate mode and compared (`unetpp_agreement_*`), one at "
        "a time, when the device is free. Accurate costs up to nine times as much, so that 0.01 is at most a tenth more work; 0 "
        "compares none",
    )


class JobsSettings(_Group):
    """Work that outlives its request."""

    folder: Path = Field(
        Path("var/jobs"), description="where jobs and results are kept; one server per folder"
    )
    store: str = Field(
        "sqlite",
        description="where the queue and the state of jobs are: `sqlite`, in the folder, or `postgresql://USER@HOST/DATABASE`, which "
        "several servers share; the manual's page 'Job stores' describes it",
    )
    files: str | None = Field(
        None,
        description="where the servers that share a PostgreSQL keep inputs and results: a folder that all of them mount, or "
        "`s3://BUCKET/PREFIX`, whose endpoint and keys are in the usual `AWS_*` variables",
    )
    keep_results_h: float = Field(
        24, gt=0, description="hours until a finished job and its result are removed"
    )
    max_disk_mb: int = Field(
        10_240,
        ge=1,
        description="size of inputs and results on disk, in MiB, with the images of MONAI Label's clients; over it a new job or upload gets 507. 10 GiB are 40 of the largest bodies",
    )
    concurrency: int = Field(1, ge=1, description="jobs that run at once; their memory adds up")

    max_queued: int = _constant(
        1000,
        "Jobs that wait; one more gets 429. A folder of images sent at once fits, and `max_disk_mb` bounds the same in bytes.",
    )
    max_attempts: int = _constant(
        5,
        "Starts of a job that a crash of the server ended. One or two crashes may have another cause; five are the job's own.",
    )


class MonaiLabelSettings(_Group):
    """Routes for clients of MONAI Label, such as the extension of 3D Slicer."""

    enabled: bool = Field(
        True,
        description="answer clients of MONAI Label under /info/, /session/, /datastore/, /infer/ and /auth/",
    )
    keep_uploads_h: float = Field(
        8,
        gt=0,
        description="hours after its last use until an image that such a client has uploaded is removed. Images count against "
        "`UNETPP_JOBS__MAX_DISK_MB`, and none outlives the server",
    )

    max_uploads: int = _constant(
        1000,
        "Images of such clients that are kept; one more gets 507. `max_disk_mb` bounds the same in bytes.",
    )


class DicomSettings(_Group):
    """PACS: servers with DICOMweb, and the DICOM node."""

    config: Path | None = Field(
        None,
        description="TOML file that names the DICOMweb servers of `POST /jobs?source=` and configures the DICOM node; "
        "the manual's page 'PACS' describes it",
    )
    retry_h: float = Field(
        72,
        gt=0,
        description="hours for which a job tries a PACS that does not answer again, from its acceptance; then it fails",
    )

    connect_s: float = _constant(
        10, "Seconds in which a PACS must accept a connection; the job tries again later."
    )
    idle_s: float = _constant(
        60,
        "Seconds after which a PACS that sends nothing counts as away; archives on tape take that long to begin.",
    )
    exchange_s: float = _constant(
        3600, "Seconds that one series or segmentation may take on its way; a slow line has as long as a job."
    )
    min_retry_s: float = _constant(
        2, "Seconds until the first further try; the next ones wait twice as long each."
    )
    max_retry_s: float = _constant(
        300, "Seconds between two tries at most, so that a PACS that is back is noticed."
    )


class Settings(BaseSettings):
    """All settings; environment variables `UNETPP_...`, group and name joined with two underscores."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        nested_model_default_partial_update=True,
    )

    bundles: Path = Field(
        Path("bundles"), description="a bundle, or a folder of bundles, all of which are served"
    )
    default_model: str = Field(
        "nuclei",
        description="bundle that answers requests without `model`; one that is set must be there, or the start fails. Not set: "
        "nuclei if it is there, else the first folder by name",
    )
    http: HttpSettings = HttpSettings()
    batching: BatchingSettings = BatchingSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    limits: LimitsSettings = LimitsSettings()
    auth: AuthSettings = AuthSettings()
    jobs: JobsSettings = JobsSettings()
    monai_label: MonaiLabelSettings = MonaiLabelSettings()
    dicom: DicomSettings = DicomSettings()
    quality: QualitySettings = QualitySettings()
    log: LogSettings = LogSettings()


def _fields() -> Iterator[tuple[str, FieldInfo]]:
    """Yields the environment name and the field of every setting and constant."""
    for name, field in Settings.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, _Group):
            for key, inner in group.model_fields.items():
                yield f"{PREFIX}{name}__{key}".upper(), inner
        else:
            yield f"{PREFIX}{name}".upper(), field


SETTINGS = {name: field for name, field in _fields() if field.json_schema_extra != _CONSTANT}

# Names of earlier versions, and what to do about them.
OLD_SETTINGS = {
    f"{PREFIX}HTTP__KEEP_ALIVE_S": "is a constant now (65)",
    f"{PREFIX}QUALITY__AGREEMENT_FEWEST_PER_HOUR": f"is gone; {PREFIX}QUALITY__AGREEMENT_SHARE alone decides",
    f"{PREFIX}QUALITY__AGREEMENT_MAX_PIXELS": "is a constant now (16777216)",
} | {
    name: f"is a constant now ({field.default})"
    for name, field in _fields()
    if field.json_schema_extra == _CONSTANT
}


def unknown_variables() -> list[str]:
    """Lists variables with the prefix that are not settings, most likely misspelt, each with its remedy.

    A whole group as JSON (`UNETPP_HTTP={...}`) is also listed, because one way to write a setting is enough.
    """
    variables = {name.upper(): value for name, value in os.environ.items()}  # noqa: TID251 - read once, here
    unknown = sorted(name for name in variables if name.startswith(PREFIX) and name not in SETTINGS)
    return [
        f"{name} {OLD_SETTINGS.get(name, 'does not exist')}"
        for name in unknown
        # `UNETPP_HTTP_PORT=8001` is a misspelt setting, `UNETPP_HTTP_PORT=tcp://...` a service's.
        if not SERVICE_LINK.fullmatch(name) and not variables[name].startswith(("tcp://", "udp://"))
    ]


def otlp_endpoint_is_set() -> bool:
    """Whether OpenTelemetry's own variables name a collector for traces; its packages read the others."""
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return any(os.environ.get(name) for name in names)  # noqa: TID251 - not ours, and needed before any package of theirs


def markdown_table() -> str:
    """The manual's table of settings: variable, default, meaning."""
    rows = [
        f"| `{name}` | `{shown_default(field.default)}` | {field.description} |"
        for name, field in SETTINGS.items()
    ]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows]) + "\n"


def shown_default(default: object) -> str:
    """A default as the manual shows it."""
    if default is None:
        return "unset"
    # The manual must not differ from user to user.
    home = Path.home()
    return (
        f"~/{default.relative_to(home)}"
        if isinstance(default, Path) and default.is_relative_to(home)
        else f"{default}"
    )
