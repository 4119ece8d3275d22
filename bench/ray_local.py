"""Ray Serve with our application on this machine, in processes of its own, for tests and benchmarks.

    python -m bench.ray_local '{"bundles": "bundles/nuclei", "replicas": 2}'

prints a line of JSON with the port of Ray's proxy once all replicas serve. A line of JSON on its standard
input changes arguments, after which the line with the port comes again. Ray stops when standard input ends.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.serving import ROOT, free_port

# Nothing is reported, nothing is reached from elsewhere, and a slow machine may take its time to start.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deploy.ray_proxy:middlewares",
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_worker_register_timeout_seconds": "180",
    "RAY_gcs_server_request_timeout_seconds": "120",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}


@dataclass(frozen=True)
class Cluster:
    """A running cluster of one node.

    Attributes:
        url: address of Ray's proxy.
        targets: folder of the files in which replicas name the address of their metrics.
        process: process that started Ray.
    """

    url: str
    targets: Path
    process: "subprocess.Popen[str]"

    def change(self, **arguments: Any) -> None:
        """Deploys again with other arguments, and waits until all replicas are replaced.

        Raises:
            RuntimeError: they were not.
        """
        assert self.process.stdin is not None  # noqa: S101 - pipes
        assert self.process.stdout is not None  # noqa: S101
        print(json.dumps(arguments), file=self.process.stdin, flush=True)
        if not self.process.stdout.readline():
            raise RuntimeError("Ray did not deploy again")

    def ops(self) -> list[str]:
        """Addresses of the ops ports of all replicas, by port."""
        documents = [json.loads(path.read_text()) for path in self.targets.glob("*.json")]
        ports = sorted(int(one["targets"][0].rpartition(":")[2]) for (one,) in documents)
        return [f"http://127.0.0.1:{port}" for port in ports]


@contextlib.contextmanager
def cluster(
    arguments: Mapping[str, Any], log: Path = Path(os.devnull), environment: Mapping[str, str] | None = None
) -> Iterator[Cluster]:
    """Runs Ray with our application for as long as the block runs.

    Args:
        arguments: arguments of `deploy.ray_app.build`.
        log: gets what Ray and the replicas print.
        environment: added to `ENVIRONMENT`.

    Raises:
        RuntimeError: it did not start.
    """
    # A short path, because Ray puts sockets into it, whose names may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        given = {"targets": f"{folder}/targets"} | dict(arguments)
        own = {name: value for name, value in os.environ.items() if not name.startswith(("UNETPP_", "RAY_"))}  # noqa: TID251 - of a child
        command = [sys.executable, "-P", "-m", "bench.ray_local", json.dumps(given), folder]
        with (
            log.open("w") as out,
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
                cwd=ROOT,
                env=own | ENVIRONMENT | dict(environment or {}) | {"PYTHONPATH": str(ROOT)},
            ) as process,
        ):
            assert process.stdin is not None  # noqa: S101 - pipes
            assert process.stdout is not None  # noqa: S101
            try:
                if not (line := process.stdout.readline()):
                    raise RuntimeError(f"Ray did not start; see {log}")
                yield Cluster(f"http://127.0.0.1:{json.loads(line)['port']}", Path(given["targets"]), process)
            finally:
                process.stdin.close()
                process.wait(60)


def main(arguments: dict[str, Any], folder: str) -> None:
    """Starts Ray, serves until standard input ends, and stops Ray."""
    import ray
    from ray import serve

    from deploy.ray_app import build
    from deploy.ray_arguments import Arguments

    pipe = os.fdopen(os.dup(1), "w")
    # What Ray prints is for the log.
    os.dup2(2, 1)
    port = free_port()
    ray.init(num_cpus=8, include_dashboard=False, _temp_dir=folder, object_store_memory=100_000_000)
    try:
        serve.start(http_options={"port": port, "keep_alive_timeout_s": 65})
        for line in itertools.chain(["{}"], sys.stdin):
            arguments |= json.loads(line)
            serve.run(build(Arguments.model_validate(arguments)))
            print(json.dumps({"port": port}), file=pipe, flush=True)
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
