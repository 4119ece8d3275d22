"""Arguments of `serve run deploy.ray_app:build NAME=VALUE ...`, and of `args:` in a configuration of Ray Serve."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from server.errors import Misconfigured
from server.settings import SETTINGS, Settings

# Seconds after which a request that Ray's queue had no room for may be sent again: a place is free as soon as
# any request has ended.
RETRY_S = 1


def _read_texts(value: Any) -> Any:
    """Reads an object of JSON, as it comes from the command line, and takes numbers as text, as YAML has them."""
    values = json.loads(value) if isinstance(value, str) else value
    return {name: f"{one}" for name, one in values.items()} if isinstance(values, dict) else values


class Arguments(BaseModel):
    """Arguments of the builder; on the command line each value is text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundles: Path | None = Field(
        None, description="a bundle or a folder of bundles, at the same path on every node"
    )
    replicas: int = Field(1, ge=1, description="replicas; the fewest of them where `max_replicas` is more")
    max_replicas: int | None = Field(None, ge=1, description="the most replicas; unset: no autoscaling")
    num_gpus: float = Field(0, ge=0, description="GPUs of a replica")
    num_cpus: float = Field(1, gt=0, description="cores of a replica, and its threads where it has no GPU")
    settings: Annotated[dict[str, str], BeforeValidator(_read_texts)] = Field(
        {},
        description="settings by the names of their variables; they take precedence over those of the nodes",
    )
    targets: Path | None = Field(
        None, description="folder in which each replica leaves the address of its metrics for Prometheus"
    )
    target_wait_s: float = Field(
        1.0, gt=0, description="predicted wait of a small request above which replicas are added"
    )
    target_deficit: float = Field(
        0.1, gt=0, description="levels that an answer lacks on average above which replicas are added"
    )
    max_ongoing_requests: int | None = Field(
        None, ge=1, description="requests that a replica holds; unset: 4 × UNETPP_HTTP__MAX_IN_FLIGHT"
    )
    max_queued_requests: int | None = Field(
        None, ge=1, description="requests that wait in each proxy; unset: UNETPP_HTTP__MAX_IN_FLIGHT"
    )

    version: str = Field(
        "",
        description="any text; a change of it replaces all replicas in turn, e.g. after the bundles have changed",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Checks names and values here, because a replica's mistake is reported only in its log."""
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is below replicas={self.replicas}")
        read_settings(self)
        return self


def read_settings(arguments: Arguments) -> Settings:
    """Reads the settings: those of the arguments, then those of this process's environment.

    Raises:
        Misconfigured: the settings of the arguments or of the environment are not valid.
    """
    from server.cli_utils import parse_settings

    if unknown := sorted(arguments.settings.keys() - SETTINGS.keys()):
        raise Misconfigured(
            f"{', '.join(unknown)}: no such setting; the manual's page 'All settings' lists the names"
        )
    # Into the environment, because that is where settings are read, and the process is the replica's own.
    before = {name: os.environ.get(name) for name in arguments.settings}  # noqa: TID251
    os.environ.update(arguments.settings)  # noqa: TID251
    try:
        settings: Settings = parse_settings()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]  # noqa: TID251
            else:
                os.environ[name] = value  # noqa: TID251
    return settings.model_copy(update={"bundles": arguments.bundles} if arguments.bundles else {})
