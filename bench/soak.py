"""A soak: a real server with tight limits, and clients that send it images, volumes, jobs, broken requests and broken connections.

    python -m bench.soak [--minutes 30] [--clients 6] [--seed 0]

All randomness of a step comes from (seed, client, step). Every answer is checked when it comes; at the end
the clients' count is compared with the server's metrics, and the process with itself before the load: memory,
threads, descriptors, files. The exit status is 1 if a check fails. A run of 30 minutes or more is written to
results/soak.{md,json}.
"""

import argparse
import contextlib
import re
import statistics
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from bench.serving import ROOT, Server, serving
from bench.soak_clients import LEFT, LOST, STEPS, TIMEOUT_S, Client, Ledger
from bench.table import write

# Tight, so that clients meet every limit within minutes.
ENVIRONMENT = {
    "UNETPP_HTTP__MAX_IN_FLIGHT": "4", "UNETPP_LIMITS__MAX_BODY_MB": "12",
    "UNETPP_HTTP__DRAIN_S": "1", "UNETPP_QUALITY__AGREEMENT_SHARE": "0.1",
}  # fmt: skip
# Memory is compared after a sixth of the run, because every size and precision must have been met once.
SETTLED, GROWTH = 1 / 6, 0.03
# Minutes from which a run is written to results/, and its growth of memory counts.
LONG = 30
# Threads that pools may still add, and seconds after which the worker threads of anyio end.
SPARE_THREADS, IDLE_S = 8, 12


@dataclass(frozen=True)
class Sample:
    """Resident memory in MB, threads and open descriptors of the server at one moment."""

    rss_mb: float
    threads: int
    descriptors: int


def sample(server: Server) -> Sample:
    """Reads the server's process."""
    process = Path(f"/proc/{server.pid}")
    threads = int((process / "status").read_text().split("Threads:")[1].split()[0])
    return Sample(server.memory("VmRSS"), threads, sum(1 for _ in (process / "fd").iterdir()))


def total(metrics: str, name: str, label: str) -> Counter[str]:
    """Sums of a metric per value of one of its labels."""
    sums: Counter[str] = Counter()
    for family in text_string_to_metric_families(metrics):
        for line in family.samples:
            if line.name == name:
                sums[line.labels.get(label, "")] += int(line.value)
    return sums


def idle(server: Server, idle_s: float) -> tuple[Sample, str]:
    """Waits until no request and no job is under way; returns the process and the metrics then."""
    for _ in range(TIMEOUT_S):
        metrics = server.client.get("/metrics").text
        if not any(
            total(metrics, name, "")[""]
            for name in ("unetpp_requests_in_flight", "unetpp_jobs_queued", "unetpp_jobs_running")
        ):
            break
        time.sleep(1)
    time.sleep(idle_s)
    return sample(server), server.client.get("/metrics").text


def run(
    minutes: float, clients: int = 6, seed: int = 0, idle_s: float = IDLE_S, warm_up: int = 60
) -> tuple[Ledger, list[float]]:
    """Starts a server, loads it, stops it; returns the record and the resident memory in MB of each second."""
    ledger = Ledger()
    with tempfile.TemporaryDirectory() as scratch:
        temporary, jobs, log = (Path(scratch) / name for name in ("tmp", "jobs", "log"))
        temporary.mkdir()
        own = {"TMPDIR": str(temporary), "UNETPP_JOBS__FOLDER": str(jobs)}
        with serving(ROOT / "bundles", ENVIRONMENT | own, log) as server:
            url = server.client.base_url
            with Client("warm-up", seed, url, ledger) as client:
                for number, kind in enumerate([*["segment"] * warm_up, "job"]):
                    client.step(number, kind)
            before, _ = idle(server, idle_s)
            memory, halfway = load(server, ledger, minutes, clients, seed)
            after, metrics = idle(server, idle_s)
            server.process.terminate()
            if code := server.process.wait(TIMEOUT_S):
                ledger.fault("exit", f"status {code} upon SIGTERM")
        for path in [*temporary.rglob("*"), *(path for path in jobs.iterdir() if path.is_dir())]:
            ledger.fault("leaks", f"file left: {path.relative_to(scratch)}")
        check_log(ledger, log.read_text(errors="replace"))
    check_counts(ledger, metrics)
    if after.descriptors > before.descriptors:
        ledger.fault("leaks", f"{after}, before the load {before}")
    # A short run still opens graphs, which bring threads and memory.
    if minutes >= LONG and after.threads > halfway.threads + SPARE_THREADS:
        ledger.fault("leaks", f"{after}, halfway {halfway}")
    if minutes >= LONG and (growth := grown(memory)) >= GROWTH:
        ledger.fault("memory", f"grew by {growth:.1%} once settled")
    return ledger, memory


def load(
    server: Server, ledger: Ledger, minutes: float, clients: int, seed: int
) -> tuple[list[float], Sample]:
    """Runs all clients; returns the resident memory in MB of each second, and the process halfway."""
    memory, halfway = list[float](), sample(server)
    until = time.monotonic() + minutes * 60
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(clients))
        loads = [
            stack.enter_context(Client(str(number), seed, server.client.base_url, ledger))
            for number in range(clients)
        ]
        futures = [pool.submit(client.run, until) for client in loads]
        while time.monotonic() < until:
            memory.append(server.memory("VmRSS"))
            if len(memory) <= minutes * 30:
                halfway = sample(server)
            time.sleep(1)
        for future in futures:
            future.result()
    return memory, halfway


def grown(memory: list[float]) -> float:
    """Share by which memory grew, from the first thirtieth after settling to the last."""
    window = max(1, len(memory) // 30)
    settled = memory[int(len(memory) * SETTLED) :]
    return statistics.median(settled[-window:]) / statistics.median(settled[:window]) - 1


def check_counts(ledger: Ledger, metrics: str) -> None:
    """Compares the clients' count with the server's, which may also have counted requests whose clients left."""
    counted = total(metrics, "unetpp_requests_total", "outcome")
    left = sum(count for (_, status), count in ledger.statuses.items() if status in (LEFT, LOST))
    expected = {"ok": ledger.answered[200], "late": ledger.answered[504], "error": ledger.answered[500]}
    for name, count in expected.items():
        if not count <= counted[name] <= count + left:
            ledger.fault(
                "metrics",
                f"{name}: the server counted {counted[name]}, the clients {count}, with {left} that left",
            )


def check_log(ledger: Ledger, log: str) -> None:
    """Finds errors that the server logged."""
    for line in log.splitlines():
        if re.search(r"ERROR|CRITICAL|Traceback|never retrieved", line):
            ledger.fault("log", line)


def main() -> None:
    """Runs, prints, and writes results/soak.{md,json} of a long run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=LONG)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ledger, memory = run(options.minutes, options.clients, options.seed)
    statuses = sorted({status for _, status in ledger.statuses})
    rows = [[kind, *(ledger.statuses[kind, status] or "" for status in statuses)] for kind in STEPS]
    minutes = [round(statistics.median(memory[second : second + 60])) for second in range(0, len(memory), 60)]
    caption = (
        f"{options.minutes:g} minutes, {options.clients} clients, seed {options.seed}; answers by step and status (left: the client did not "
        f"wait). RSS in MB, median of each minute: {', '.join(map(str, minutes))}. Failed checks: {', '.join(ledger.faults) or 'none'}."
    )
    facts = {
        "statuses": {" ".join(key): count for key, count in ledger.statuses.items()},
        "rss_mb": minutes,
        "faults": ledger.faults,
    }
    if options.minutes >= LONG:
        write("soak", caption, ["step", *statuses], rows, facts)
    else:
        print(caption, facts)
    raise SystemExit(1 if ledger.faults else 0)


if __name__ == "__main__":
    main()
