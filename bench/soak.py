"""A soak: a real server, and several clients that send it everything that clients send, for half an hour.

    python -m bench.soak [--minutes 30] [--clients 6] [--seed 0] [--write | --no-write]
    python -m bench.soak --seed 0 --replay 3/127

Each client is an endless row of steps: an image or a volume with any choice of mode, level, precision, format and reference, a
job that is watched, polled, cancelled or left, a broken file or request, a connection that breaks off, a look at health and
metrics. All of a step's randomness comes from (seed, client, step), so that a step which failed is sent again with --replay.

A ledger keeps what was sent and what came of it. At the end it is held against the server's own count, and the process against
what it was before: memory, threads, descriptors, files. Exit code 1 if a goal is missed.
"""

import argparse
import contextlib
import itertools
import json
import random
import re
import statistics
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from sqlite3 import connect

from bench.serving import ROOT, Server, serving
from bench.soak_clients import (
    ENVIRONMENT,
    IMAGES,
    KEEP_S,
    LEAVES,
    LOST,
    PATIENCE_S,
    PLACES,
    Client,
    Ledger,
    bad_files,
    crop,
    encoded,
    fixed_inputs,
    photographs,
    total,
)  # fmt: skip
from bench.table import markdown, write

BUNDLES = ROOT / "bundles"

SETTLE = 1 / 6  # of the run, before memory is compared
WINDOW = 1 / 30  # of the run, whose median is compared; at least so many seconds:
WINDOW_S = 10
GROWTH = 0.03
LONG = 30  # minutes after which results are written, and all that can happen must have happened
GOOD = ("image", "volume", "fixed")  # steps with which nothing is wrong, but for deadlines that may be short
SERVED = 0.5  # the least share of them to be answered with a mask
SWEEP_S = 60 + 30  # between the server's looks for expired jobs, and what one may take on a busy machine
# What became of requests and jobs whose clients did not wait: they were good, or cut off, or one too many, and had no deadline.
MAY_BE = {"metrics": ("ok", "client_error", "refused", "cancelled"), "jobs": ("done", "refused")}
TRACEBACK = 40  # lines of the log that tell of one alarm
REST_S = 12  # threads that anyio lends out go home after ten
FILLING = 4  # threads that pools may still lack half-way through a short run


@dataclass(frozen=True)
class Sample:
    """The server's process at one moment."""

    second: float
    rss_mb: float
    threads: int
    descriptors: int


def sample(server: Server, begun: float) -> Sample:
    """Now."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    threads = int(status.split("Threads:")[1].split()[0])
    return Sample(
        time.monotonic() - begun, server.memory("VmRSS"), threads, sum(1 for _ in Path(f"/proc/{server.pid}/fd").iterdir())
    )


@contextlib.contextmanager
def sampling(server: Server, begun: float) -> Iterator[list[Sample]]:
    """One sample a second, as long as the block lasts."""
    stop, samples = threading.Event(), list[Sample]()

    def work() -> None:
        while not stop.wait(1):
            samples.append(sample(server, begun))

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            yield samples
        finally:
            stop.set()
            future.result()


def idle(server: Server, ledger: Ledger, rest_s: float) -> tuple[Sample, str]:
    """Waits until nothing is under way, and for the last connections and threads to go; the metrics and the process then."""
    gauges = ("unetpp_requests_in_flight", "unetpp_jobs_queued", "unetpp_jobs_running")
    for _ in range(PATIENCE_S):
        text = server.client.get("/metrics").text
        if not any(total(text, gauge, "")[""] for gauge in gauges):
            time.sleep(rest_s)
            return sample(server, time.monotonic()), server.client.get("/metrics").text
        time.sleep(1)
    ledger.fault("metrics", f"after {PATIENCE_S} s without load: {[(gauge, total(text, gauge, '')['']) for gauge in gauges]}")
    return sample(server, time.monotonic()), text


@dataclass(frozen=True)
class Check:
    """A goal and what was found."""

    name: str
    goal: str
    found: str
    met: bool
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """What a soak found.

    Attributes:
        bad_files: crash and fuzz files of other readers that were there to be sent.
        statuses: how often by kind of step and status.
        rss_mb: median of each minute, in MB.
        quartiles_mb: of memory after it has settled.
        growth: of memory, from after it has settled to the end, as a share.
    """

    minutes: float
    clients: int
    seed: int
    bad_files: int
    checks: list[Check]
    statuses: dict[str, dict[str, int]]
    rss_mb: list[float]
    quartiles_mb: list[float]
    growth: float

    @property
    def missed(self) -> list[str]:
        """Names of the goals that were not met."""
        return [check.name for check in self.checks if not check.met]


def run(minutes: float, clients: int = 6, seed: int = 0) -> Report:
    """Starts a server, loads it, stops it, and looks at all that is left."""
    with tempfile.TemporaryDirectory() as scratch:
        temporary, jobs, log = (Path(scratch) / name for name in ("tmp", "jobs", "log"))
        temporary.mkdir()
        own = {"TMPDIR": str(temporary), "UNETPP_JOBS__FOLDER": str(jobs)}
        ledger = Ledger()
        with serving(BUNDLES, ENVIRONMENT | own, log) as server:
            warm_up(server, ledger, seed)
            before, _ = idle(server, ledger, 2)
            begun = time.monotonic()
            with sampling(server, begun) as samples:
                load(server, ledger, clients, seed, begun + minutes * 60)
            after, metrics = idle(server, ledger, REST_S)
            left = [f"temporary file {path.name}" for path in temporary.rglob("*")]
            expired = time.time() - KEEP_S - SWEEP_S
            server.process.terminate()
            code = server.process.wait(PATIENCE_S)
        left += [f"temporary file {path.name}" for path in temporary.rglob("*")] + orphans(jobs, ledger, expired)
        lines = log.read_text(errors="replace").splitlines()
    samples = [one for one in samples if one.second <= minutes * 60]
    growth = grown(samples, minutes * 60)
    checks = [
        *_checks(ledger, metrics),
        _met(ledger, metrics, minutes),
        Check("memory", f"grows < {GROWTH:.0%} once settled", f"{growth:+.1%}", growth < GROWTH),
        _leaks(before, after, samples, left),
        Check("exit", "0 upon SIGTERM", str(code), code == 0),
        _log(lines),
    ]
    statuses: dict[str, dict[str, int]] = defaultdict(dict)
    for (kind, status), count in sorted(ledger.statuses.items()):
        statuses[kind][{LEAVES: "left", LOST: "lost"}.get(status, str(status))] = count
    minute = [
        float(round(statistics.median(s.rss_mb for s in one))) for _, one in itertools.groupby(samples, lambda s: s.second // 60)
    ]
    settled = [s.rss_mb for s in samples if s.second >= minutes * 60 * SETTLE]
    return Report(
        minutes,
        clients,
        seed,
        len(bad_files()),
        checks,
        dict(statuses),
        minute,
        [float(round(q)) for q in statistics.quantiles(settled)],
        growth,
    )


def warm_up(server: Server, ledger: Ledger, seed: int) -> None:
    """Every graph at every precision, the smallest and the largest inputs, jobs: all that takes memory when it is first met."""
    picture = photographs()[0]
    draw = random.Random(0)  # noqa: S311
    sizes = [(1, 1), (130, 97), (512, 512), (700, 513)]
    inputs = [*fixed_inputs(), *((IMAGES, encoded(draw, crop(picture, *size))) for size in sizes)]
    modes = [{"mode": "accurate"}, *({"level": str(level)} for level in range(1, 5))]
    cards = {card["name"]: card for card in server.client.get("/models").json()}
    asked = [
        (sent, {"model": model, "precision": precision} | mode)
        for model, sent in inputs for precision in cards[model]["precisions"] for mode in modes
    ]  # fmt: skip
    asked += [(encoded(draw, crop(picture, 1400, 1400)), {"level": str(level)}) for level in (1, 1, 1, 4)]

    def part(number: int) -> None:
        with Client(f"warm-up {number}".replace(" ", "-"), seed, server.client.base_url, ledger) as client:
            for sent, query in asked[number::PLACES]:
                client.segment(sent, query)
            for _ in range(3):
                client.job()

    with ThreadPoolExecutor(PLACES) as pool:
        list(pool.map(part, range(PLACES)))


def load(server: Server, ledger: Ledger, clients: int, seed: int, until: float) -> None:
    """All clients, until a time of `time.monotonic`."""

    def one(number: int) -> None:
        with Client(str(number), seed, server.client.base_url, ledger) as client:
            client.run(until)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(clients)))


def replay(seed: int, client: str, step: int) -> None:
    """One step of a soak, alone."""
    with tempfile.TemporaryDirectory() as jobs, serving(BUNDLES, ENVIRONMENT | {"UNETPP_JOBS__FOLDER": jobs}) as server:
        ledger = Ledger()
        with Client(client, seed, server.client.base_url, ledger) as one:
            one.step(step)
        print(dict(ledger.statuses), dict(ledger.faults) or "no fault")


def grown(samples: list[Sample], seconds: float) -> float:
    """By which share memory grew, from the first window after it has settled to the last of all."""
    window, settled = max(seconds * WINDOW, WINDOW_S), seconds * SETTLE
    first = statistics.median(s.rss_mb for s in samples if settled <= s.second < settled + window)
    last = statistics.median(s.rss_mb for s in samples if s.second >= seconds - window)
    return last / first - 1


def orphans(jobs: Path, ledger: Ledger, expired: float) -> list[str]:
    """Files without a row, rows without a file, rows that finished before `expired`, and more rows than clients left behind."""
    with closing(connect(jobs / "jobs.sqlite")) as db:
        rows = dict(db.execute("SELECT id, state FROM jobs").fetchall())
        old = [id_ for (id_,) in db.execute("SELECT id FROM jobs WHERE finished < ?", (expired,))]
    folders = {path.name for path in jobs.iterdir() if path.is_dir()}
    found = [f"folder of job {id_}, of which no row speaks" for id_ in folders - rows.keys()]
    found += [f"half-written {path.name}" for path in jobs.rglob("*.part")]
    found += [f"job {id_} is {state} and has no files" for id_, state in rows.items() if state == "done" and id_ not in folders]
    found += [f"job {id_} has expired and is still there" for id_ in old]
    if len(rows) > ledger.unsure_jobs:
        found.append(f"{len(rows)} jobs, of which at most {ledger.unsure_jobs} were left behind by clients")
    return found


def _checks(ledger: Ledger, metrics: str) -> list[Check]:
    """What the ledger tells, alone and against the metrics."""
    settled, left = sum(ledger.statuses.values()), sum(n for (_, status), n in ledger.statuses.items() if status == LEAVES)
    answered = settled - left - sum(n for (_, status), n in ledger.statuses.items() if status == LOST)
    model_info, jobs = total(metrics, "unetpp_requests_total", "outcome"), total(metrics, "unetpp_jobs_total", "outcome")
    timed = sum(total(metrics, "unetpp_request_duration_seconds_count", "level").values())
    if timed != model_info["ok"]:
        ledger.fault("metrics", f"{timed} durations of {model_info['ok']} good answers")
    _within(ledger, "metrics", model_info, ledger.outcomes, ledger.unsure)
    _within(ledger, "jobs", jobs, ledger.jobs, ledger.unsure_jobs)
    if settled != ledger.sent:
        ledger.fault("answers", f"{ledger.sent} requests were sent, and {settled} came to an end")
    server_faults = sum(n for (_, status), n in ledger.statuses.items() if status >= 500)
    rows = [
        ("5xx", "none but 503, 504 and 507 by design", f"{server_faults} by design"),
        ("problems", "every refusal explains itself", f"{sum(n for (_, status), n in ledger.statuses.items() if status >= 400):,} refusals"),
        ("answers", "every request is answered once, as it should be", f"{ledger.sent:,} sent = {answered:,} answered + {left:,} left"),
        ("masks", "have the input's size and the level asked for", f"{ledger.masks:,} masks"),
        ("same bytes", "the same question, the same answer", f"{ledger.repeated:,} answers"),
        ("metrics", "answers in = answers out", f"{_listed(model_info)}; ledger {_listed(ledger.outcomes)}, {ledger.unsure} unsure"),
        ("jobs", "jobs in = jobs out", f"{_listed(jobs)}; ledger {_listed(ledger.jobs)}, {ledger.unsure_jobs} unsure"),
    ]  # fmt: skip
    return [Check(name, goal, found, not ledger.faults[name], ledger.faults[name]) for name, goal, found in rows]


def _within(ledger: Ledger, goal: str, model_info: Counter[str], ours: Counter[str], unsure: int) -> None:
    """What the server counted is what we did, and at most the unsure more, where such a request may have ended so."""
    for name in model_info.keys() | ours.keys():
        more = unsure if name in MAY_BE[goal] else 0
        if not ours[name] <= model_info[name] <= ours[name] + more:
            ledger.fault(goal, f"{name}: the server counted {model_info[name]}, we {ours[name]}, with {more} unsure")
    if sum(model_info.values()) > sum(ours.values()) + unsure:
        ledger.fault(goal, f"the server counted {sum(model_info.values())}, we {sum(ours.values())}, with {unsure} unsure")


def _met(ledger: Ledger, metrics: str, minutes: float) -> Check:
    """That each way a request can take was taken, of which the other checks then speak; a short run may miss the rare ones."""
    model_info, dropped, again = (
        total(metrics, name, label)
        for name, label in (
            ("unetpp_requests_total", "outcome"),
            ("unetpp_windows_dropped_total", "reason"),
            ("unetpp_agreement_samples_total", "outcome"),
        )
    )
    answers = [(status, n) for (kind, status), n in ledger.statuses.items() if kind in GOOD]
    good, masks = sum(n for _, n in answers), sum(n for status, n in answers if status == 200)
    share = masks / max(1, good)
    often = {
        "ok": model_info["ok"], "refused": model_info["refused"], "cancelled": model_info["cancelled"],
        "late or too short": model_info["late"] + ledger.too_short,
        "degraded": sum(total(metrics, "unetpp_degraded_total", "reason").values()), "windows dropped": dropped["cancelled"] + dropped["late"],  # "error" are those of broken files
        "compared": again["compared"],
    }  # fmt: skip
    needed = [*often] if minutes >= LONG else ["ok", "refused", "cancelled"]
    faults = [f"never met: {name}" for name in needed if not often[name]]
    if again["failed"]:
        faults.append(f"{again['failed']} fast answers could not be computed again")
    if share < SERVED:
        faults.append(f"{masks} of {good} good requests got a mask, less than {SERVED:.0%}")
    found = f"{_listed(Counter(often))}; {share:.0%} of good requests got a mask"
    return Check("paths", f"{', '.join(needed)}: each met; >= {SERVED:.0%} served", found, not faults, faults)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()) if count)


def _leaks(before: Sample, after: Sample, samples: list[Sample], left: list[str]) -> Check:
    """Threads are made when first needed, so that the pools may still be filling in a short run; one a request would be many."""
    plateau = max([before.threads, *(s.threads for s in samples if s.second <= samples[-1].second / 2)]) + FILLING
    faults = list(left)
    if after.descriptors > before.descriptors:
        faults.append(f"{after.descriptors} descriptors, {before.descriptors} before the load")
    if after.threads > plateau:
        faults.append(f"{after.threads} threads, when a plateau of {plateau} should have been reached")
    found = f"descriptors {before.descriptors} → {after.descriptors}, threads {before.threads} → {after.threads}, files {len(left)}"
    return Check("leaks", "no descriptors, threads or files", found, not faults, faults)


def _log(lines: list[str]) -> Check:
    """What the server itself thought worth an alarm, with the lines that follow."""
    numbers = [number for number, line in enumerate(lines) if re.search(r"ERROR|CRITICAL|Traceback|never retrieved", line)]
    told = sorted({line for number in numbers[:20] for line in range(number, min(number + TRACEBACK, len(lines)))})
    return Check("log", "no errors", f"{len(lines)} lines, {len(numbers)} alarms", not numbers, [lines[number] for number in told])


def show(report: Report) -> None:
    """Prints the report and writes it to results/soak.{md,json}."""
    statuses = sorted({status for row in report.statuses.values() for status in row})
    rows = [[kind, *(row.get(status, "") for status in statuses)] for kind, row in report.statuses.items()]
    minutes = [str(number + 1) for number in range(len(report.rss_mb))]
    quartiles = ", ".join(map(str, report.quartiles_mb))
    caption = (
        f"{report.minutes:g} minutes, {report.clients} clients, seed {report.seed}, {report.bad_files} bad files of other readers; "
        "`unetpp serve` with both bundles, and limits so tight that each is met. "
        "Answers by step and status (left: the client did not wait):\n\n"
        f"{markdown(['step', *statuses], rows)}\nRSS in MB, median of each minute; quartiles once settled: {quartiles}\n\n"
        f"{markdown(['minute', *minutes], [['MB', *report.rss_mb]])}"
    )
    table = [[check.name, check.goal, check.found, "yes" if check.met else "**no**"] for check in report.checks]
    write("soak", caption, ["goal", "wanted", "found", "met"], table, asdict(report))


def main() -> None:
    """Runs, prints, and writes results/soak.{md,json} of a long run, or if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", metavar="CLIENT/STEP", help="send this one step and no other")
    parser.add_argument(
        "--write", action=argparse.BooleanOptionalAction, help=f"write results/soak.{{md,json}}; default: from {LONG} minutes on"
    )
    arguments = parser.parse_args()
    if arguments.replay:
        client, step = arguments.replay.split("/")
        replay(arguments.seed, client, int(step))
        return
    report = run(arguments.minutes, arguments.clients, arguments.seed)
    if arguments.write or (arguments.write is None and arguments.minutes >= LONG):
        show(report)
    else:
        print(json.dumps(asdict(report), indent=1))
    for check in (check for check in report.checks if not check.met):
        print("\n  ".join([f"missed: {check.name}: wanted {check.goal}, found {check.found}", *check.faults]))
    raise SystemExit(1 if report.missed else 0)


if __name__ == "__main__":
    main()
