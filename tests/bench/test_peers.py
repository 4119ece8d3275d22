"""The benchmark against peers: its arithmetic, its load generator, its checks; no peer is needed."""

import asyncio
import contextlib
import io
import math
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bench.inputs import bodies
from bench.peers import __main__ as peers
from bench.peers import common, report
from bench.peers.contenders import CASES, Contender, contenders, form, inference_protocol, protocol_mask
from bench.peers.load import Shot, Summary, Target, closed_loop, median, open_loop, poisson, summarise


def shots(*latencies: float, kind: str = "ok") -> list[Shot]:
    """One request per second, from 0 s."""
    return [Shot(due, due + latency, kind) for due, latency in enumerate(latencies)]


@pytest.mark.parametrize(
    ("sent", "options", "expected"),
    [
        ([Shot(0, 1, "ok"), Shot(1, 2, "ok"), Shot(2, 4, "ok")], {}, {"throughput": 3 / 4, "p50": 1000}),
        (shots(0.1, 0.2, 0.3), {}, {"p50": pytest.approx(200)}),
        # Due at 0..4, answered at 2.5..6.5: two of them within 2..4.
        (shots(2.5, 2.5, 2.5, 2.5, 2.5), {"window": (2, 4)}, {"throughput": 1, "offered": 3}),
        (shots(0.1, 0.5, 0.1, 0.5), {"window": (0, 4), "deadline": 0.2}, {"throughput": 1, "goodput": 0.5}),
        (
            [*shots(0.1, 0.1), *shots(0.01, 0.03, kind="429"), *shots(9, kind="timeout")],
            {"deadline": 1},
            {"errors": {"429": 2, "timeout": 1}, "refusal_p50": pytest.approx(30), "offered": 5},
        ),
        (shots(0.1, kind="500"), {"deadline": 1}, {"throughput": 0, "goodput": 0, "p50": math.inf}),
        ([*shots(*[0.1] * 20), *shots(0.001, kind="429")], {}, {"p50": pytest.approx(100), "p99": math.inf}),
        (
            [*shots(0.1, 2), *shots(0.01, 0.2, kind="429"), *shots(1, kind="504"), *shots(0.001, kind="500")],
            {"deadline": 1},
            {"missed": 5, "prompt": 1},
        ),
    ],
    ids=["closed", "due", "window", "goodput", "errors", "only errors", "failures are infinite", "missed"],
)
def test_summarise_counts(sent: list[Shot], options: dict[str, object], expected: dict[str, object]) -> None:
    summary = summarise(sent, **options)  # type: ignore[arg-type]
    assert {name: getattr(summary, name) for name in expected} == expected


def test_median_pools_latencies_and_sums_counts() -> None:
    nan = math.nan
    summary = median(
        [
            Summary(2, 1, 5, nan, nan, {"429": 1}, missed=3, prompt=1, share=0.5),
            Summary(3, 3, 7, 9, nan, {"429": 1, "timeout": 2}, missed=2, prompt=2, share=1),
        ]
    )
    assert (summary.offered, summary.throughput, summary.p50, summary.p99) == (5, 2, 6, 9)
    assert (summary.errors, summary.missed, summary.prompt, summary.share) == (
        {"429": 2, "timeout": 2},
        5,
        3,
        0.75,
    )
    pooled = median([summarise(shots(*[0.1] * 9)), summarise(shots(*[0.2] * 10, 5))])
    assert (pooled.p50, pooled.p99) == (pytest.approx(200), pytest.approx(5000))


def test_poisson_is_seeded_sorted_and_exponential() -> None:
    arrivals = poisson(10, 1000, seed="1")
    assert arrivals == poisson(10, 1000, seed="1") == sorted(arrivals) != poisson(10, 1000, seed="2")
    assert len(arrivals) == 10_000
    gaps = np.diff(arrivals)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)


class Behaviour:
    """A server with known answers: per request, in order, a status, or None for no answer; none before `first` requests have come."""

    def __init__(self, statuses: Sequence[int | None], first: int = 1) -> None:
        self.statuses = statuses
        self.first, self.open = first, asyncio.Event()
        self.seen: list[bytes] = []
        self.in_flight = self.most = 0

    async def answer(self, request: Request) -> Response:
        index = len(self.seen)
        self.seen.append(b"")
        self.seen[index] = await request.body()
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        status = self.statuses[index % len(self.statuses)]
        if len(self.seen) >= self.first:
            self.open.set()
        with contextlib.suppress(asyncio.CancelledError):
            await (self.open if status else asyncio.Event()).wait()
        self.in_flight -= 1
        return Response(b"", status or 200)


@contextlib.contextmanager
def running(behaviour: Behaviour) -> Iterator[str]:
    """The URL of a server with a behaviour."""
    app = Starlette(routes=[Route("/segment", behaviour.answer, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    until = time.monotonic() + 60
    while not server.started and thread.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    assert server.started
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/segment"
    finally:
        server.should_exit = True
        thread.join()


def target(url: str, timeout_s: float = 20) -> Target:
    return Target(url, [b"a", b"b", b"c"], "image/png", timeout_s)


def test_closed_loop_keeps_its_concurrency_and_counts_every_status() -> None:
    behaviour = Behaviour([200, 429, 503, 500], first=4)
    with running(behaviour) as url:
        sent = closed_loop(target(url), 4, 0.5)
    assert behaviour.most == 4
    assert len(sent) == len(behaviour.seen) >= 4
    assert set(behaviour.seen) >= {b"a", b"b", b"c"}
    assert {shot.kind for shot in sent} == {"ok", "429", "503", "500"}


def test_open_loop_sends_before_earlier_answers_and_counts_from_the_due_time() -> None:
    # The first is due before the loop begins. Nothing is answered before all has been sent.
    behaviour = Behaviour([200], first=20)
    arrivals = [-5.0, *(0.01 * index for index in range(19))]
    with running(behaviour) as url:
        sent = open_loop(target(url), arrivals)
    assert behaviour.most == 20
    assert [shot.due for shot in sent] == arrivals
    assert {shot.kind for shot in sent} == {"ok"}
    assert sent[0].latency >= 5


def test_open_loop_counts_timeouts_and_refused_connections() -> None:
    with running(Behaviour([200, None])) as url:
        sent = open_loop(target(url, timeout_s=1), [0.0, 0.1])
    assert sorted(shot.kind for shot in sent) == ["ok", "timeout"]
    assert [shot.kind for shot in open_loop(target("http://127.0.0.1:9/segment"), [0.0])] == ["connection"]


REFERENCE = np.array([[0, 1], [1, 1]], np.uint8)
WRONG = np.array([[0, 1], [1, 0]], np.uint8)


def check(
    monkeypatch: pytest.MonkeyPatch, contender: Contender, *answers: httpx.Response, at_once: int = 1
) -> float:
    """The agreement of a contender that gives these answers, of which each should show REFERENCE."""
    everybody = threading.Barrier(len(answers), timeout=60)

    def post(_: Contender, __: peers.Trial, ___: int, index: int) -> httpx.Response:
        everybody.wait()
        return answers[index]

    monkeypatch.setattr(peers, "post", post)
    trial = peers.Trial(CASES["L1"], [b""] * len(answers), [REFERENCE] * len(answers), 1)
    return peers.check(contender, trial, 0, at_once)


def png(mask: np.ndarray, status: int = 200) -> httpx.Response:
    return httpx.Response(status, content=common.encode(mask))


def test_check_accepts_masks_within_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(monkeypatch, Contender("x", lambda *_: []), png(REFERENCE)) == 1
    assert check(monkeypatch, Contender("x", lambda *_: [], tolerance=0.25), png(WRONG)) == 0.75


@pytest.mark.parametrize(
    "answers",
    [[png(WRONG)], [png(REFERENCE[:1])], [png(REFERENCE, 503)], [png(REFERENCE)] * 7 + [png(WRONG)]],
    ids=["wrong", "size", "status", "one of a batch"],
)
def test_check_refuses_wrong_answers(monkeypatch: pytest.MonkeyPatch, answers: list[httpx.Response]) -> None:
    with pytest.raises(peers.Unfit):
        check(monkeypatch, Contender("x", lambda *_: []), *answers, at_once=len(answers))


@pytest.mark.parametrize("name", ["ours", "bentoml", "mlserver"])
@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'["!"]', b"null", b'{"outputs": []}'], ids=bytes.decode
)
def test_check_refuses_bodies_without_a_mask(
    monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    with pytest.raises(peers.Unfit):
        check(monkeypatch, contenders(2)[name], httpx.Response(200, content=content))


def test_shared_work_is_the_servers(shipped_bundle: Path) -> None:
    """A constant channel is left as it is, and a batch gives the masks of its images."""
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    image[..., 1] = 7
    feed = common.feed([image])
    deviation = image.std((0, 1))
    assert np.allclose(feed["mean"].ravel(), image.mean((0, 1)))
    assert np.allclose(feed["inverse_std"].ravel(), 1 / np.where(deviation > 0, deviation, 1))
    model = common.Model(shipped_bundle / "L1.onnx", threads=1)
    files = bodies(96, count=3)
    together = [common.decode(answer) for answer in model.answer(files)]
    alone = [common.decode(model.answer([file])[0]) for file in files]
    assert all(np.mean(a == b) > 0.999 for a, b in zip(together, alone, strict=True))


def test_requests_carry_the_file() -> None:
    files = bodies(96)
    assert len(set(files)) == 8
    assert {Image.open(io.BytesIO(file)).size for file in files} == {(96, 96)}
    body, content_type = form("image")(b"PNG")
    assert b'name="image"' in body
    assert content_type.endswith(f"boundary={body[2:6].decode()}")
    body, _ = inference_protocol(common.encode(REFERENCE))
    assert np.array_equal(protocol_mask(body.replace(b"inputs", b"outputs")), REFERENCE)


def test_options_open_loops_need_a_capacity() -> None:
    with pytest.raises(SystemExit):
        peers.parse(["--loads", "0.8x"])
    assert peers.parse(["--loads", "0.8x", "--rate", "5"]).rate == [5]


@pytest.mark.parametrize(
    ("name", "more"), [("litserve", []), ("ours", [f"1.3x{report.DEADLINE}", f"1.5x{report.MIN_LEVEL}"])]
)
def test_measure_sends_deadlines_to_our_server_only(name: str, more: list[str]) -> None:
    urls = []

    class Fire(peers.Elsewhere):
        def __call__(self, function: object, target: Target, *_: object) -> list[Shot]:  # type: ignore[override]
            urls.append(target.url)
            return [Shot(0, 1, "ok")]

    options = peers.parse(["--loads", "1", "1.3x", "--seconds", "1"])
    with Fire() as fire:
        trial = peers.Trial(CASES["L3"], [b""], [], 0.5)
        assert list(peers.measure(contenders(2)[name], trial, 0, 0, options, fire)) == ["1", "1.3x", *more]
    flags = [("deadline_ms=500" in url, "min_level=1" in url) for url in urls[3:]]
    assert flags == [(True, False), (True, True)][: len(more)]


def rows() -> report.Rows:
    return {
        ("bare", "L4", "1"): Summary(0, 2, 1, 1),
        ("ours", "L4", "1"): Summary(9, 1.96, 1, 1),
        ("auto", "L4", "1"): Summary(9, 3, 1, 1),
        ("litserve", "L4", "1"): Summary(9, 1.8, 1, 1),
        ("torch", "L4", "1"): Summary(9, 0.5, 1, 1),
        ("ours", "L4", "0.8x"): Summary(9, 1.5, 1, 50),
        ("litserve", "L4", "0.8x"): Summary(9, 1.5, 1, 40),
        ("torch", "L4", "0.8x"): Summary(9, math.nan, math.nan, math.nan),
        ("ours", "L4", f"1.3x{report.DEADLINE}"): Summary(
            9, 1.9, 1, 1, 1.9, {"429": 3, "504": 1}, 4, missed=4, prompt=3, share=0.97
        ),
        ("ours", "L4", f"1.5x{report.MIN_LEVEL}"): Summary(9, 1.9, 1, 1, 2.9, share=1.48),
    }


def test_goals_are_met_missed_or_not_measured() -> None:
    assert [row[3] for row in report.goals(rows(), ["L4"])] == [
        "met", *["not measured"] * 3, "met", "missed", "met", "missed", "met", "missed", "met",
    ]  # fmt: skip
    assert {row[3] for row in report.goals({("ours", "L1", "1"): Summary(1, 1, 1, 1)}, ["L1"])} == {
        "not measured"
    }
    failing = Summary(9, 1, 1, math.inf)
    both = report.goals({("ours", "L1", "0.8x"): failing, ("ray", "L1", "0.8x"): failing}, ["L1"])
    assert [row[3] for row in both if row[1].startswith("p99")] == ["missed"]


def test_gather_relates_goodput_to_the_capacity_of_its_own_turn() -> None:
    turns = [
        {
            "contender": "ours",
            "case": "L4",
            "levels": {"1": Summary(1, best, 1, 1), "1.3x": Summary(1, 1, 1, 1, good)},
        }
        for best, good in ((1, 1), (4, 2), (10, 6))
    ]
    assert report.gather(turns)["ours", "L4", "1.3x"].share == pytest.approx(0.6)


def test_publish_writes_table_facts_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    levels = {load: summary for (name, _, load), summary in rows().items() if name == "ours"}
    turn = {
        "contender": "ours",
        "case": "L4",
        "round": 0,
        "start_up_s": 1.0,
        "peak_rss_mb": 300.0,
        "agreement": 1.0,
        "levels": levels,
    }
    run = {
        "turns": [turn, {"contender": "ray", "case": "L4", "round": 0, "levels": {}, "unfit": "did not start"}],
        "deadlines_ms": {"L4": 2000.0}, "not_installed": ["bentoml"], "versions": {"ray": "ray==1"},
        "options": {"threads": 2, "rounds": 1, "seconds": 4},
    }  # fmt: skip
    report.publish(run, tmp_path)
    text = (tmp_path / "peers.md").read_text()
    assert all(part in text for part in ("not measured: did not start", "not installed", "3 × 429"))
    assert "NaN" not in (tmp_path / "peers.json").read_text()
    assert (tmp_path / "peers.png").stat().st_size > 0
    assert "--install" in capsys.readouterr().out
