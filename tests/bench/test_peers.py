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
from server.segment.plan import statistics
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bench.peers import __main__ as peers
from bench.peers import common, report
from bench.peers.contenders import CASES, Contender, bodies, contenders, form, inference_protocol, protocol_mask
from bench.peers.load import Shot, Summary, Target, closed_loop, median, open_loop, percentile, poisson, summarise
from server.imaging.encode import png


def shots(*latencies: float, kind: str = "ok") -> list[Shot]:
    """One request per second, from 0 s."""
    return [Shot(due, due + latency, kind) for due, latency in enumerate(latencies)]


class TestSummarise:
    def test_closed_loop_from_the_first_request_to_the_last_answer(self) -> None:
        summary = summarise([Shot(0, 1, "ok"), Shot(1, 2, "ok"), Shot(2, 4, "ok")])
        assert summary.throughput == 3 / 4
        assert summary.p50 == 1000
        assert math.isnan(summary.goodput)

    def test_latency_is_from_when_a_request_was_due(self) -> None:
        assert summarise(shots(0.1, 0.2, 0.3)).p50 == pytest.approx(200)

    def test_answers_outside_the_window_are_no_throughput(self) -> None:
        # Due at 0..4; answered at 2.5..6.5: two of them within 2..4.
        summary = summarise(shots(2.5, 2.5, 2.5, 2.5, 2.5), window=(2, 4))
        assert summary.throughput == 1
        assert summary.offered == 3

    def test_goodput_counts_what_came_in_time(self) -> None:
        summary = summarise(shots(0.1, 0.5, 0.1, 0.5), window=(0, 4), deadline=0.2)
        assert summary.throughput == 1
        assert summary.goodput == 0.5

    def test_errors_by_kind(self) -> None:
        summary = summarise([*shots(0.1, 0.1), *shots(0.01, 0.03, kind="429"), *shots(9, kind="timeout")], deadline=1)
        assert summary.errors == {"429": 2, "timeout": 1}
        assert summary.refusal_p50 == pytest.approx(30)
        assert summary.offered == 5

    def test_nothing_but_errors(self) -> None:
        summary = summarise(shots(0.1, kind="500"), deadline=1)
        assert summary.throughput == summary.goodput == 0
        assert math.isinf(summary.p50)
        assert math.isnan(summary.refusal_p50)

    def test_failures_do_not_improve_percentiles(self) -> None:
        summary = summarise([*shots(*[0.1] * 20), *shots(0.001, kind="429")])
        assert summary.p50 == pytest.approx(100)
        assert math.isinf(summary.p99)

    def test_who_is_not_answered_in_time(self) -> None:
        found = [*shots(0.1, 2), *shots(0.01, 0.2, kind="429"), *shots(1, kind="504"), *shots(0.001, kind="500")]
        summary = summarise(found, deadline=1)
        assert (summary.missed, summary.prompt) == (5, 1)

    def test_rounds_as_one(self) -> None:
        nan = math.nan
        rounds = [
            Summary(2, 1, 5, nan, nan, {"429": 1}, missed=3, prompt=1, share=0.5),
            Summary(3, 3, 7, 9, nan, {"429": 1, "timeout": 2}, missed=2, prompt=2, share=1),
        ]
        summary = median(rounds)
        assert (summary.offered, summary.throughput, summary.p50, summary.p99) == (5, 2, 6, 9)
        assert summary.errors == {"429": 2, "timeout": 2}
        assert (summary.missed, summary.prompt, summary.share) == (5, 3, 0.75)
        assert math.isnan(summary.goodput)

    def test_rounds_pool_their_latencies(self) -> None:
        one, two = summarise(shots(*[0.1] * 9)), summarise(shots(*[0.2] * 10, 5))
        assert median([one, two]).p50 == pytest.approx(200)
        assert median([one, two]).p99 == pytest.approx(5000)

    @pytest.mark.parametrize(("q", "value"), [(50, 51), (99, 100)])
    def test_percentile(self, q: float, value: float) -> None:
        assert percentile(list(range(1, 101)), q) == pytest.approx(value)

    def test_no_percentile_of_nothing(self) -> None:
        assert math.isnan(percentile([], 50))


class TestPoisson:
    def test_seeded(self) -> None:
        assert poisson(50, 10, seed="1") == poisson(50, 10, seed="1")
        assert poisson(50, 10, seed="1") != poisson(50, 10, seed="2")

    def test_rate_and_order(self) -> None:
        arrivals = poisson(99.996, 100, seed="")
        assert len(arrivals) == 10_000
        assert arrivals == sorted(arrivals)
        assert 0 < arrivals[0] < arrivals[-1] < 100

    def test_gaps_are_exponential(self) -> None:
        gaps = np.diff(poisson(10, 1000, seed=""))
        assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)

    def test_same_pattern_at_every_rate(self) -> None:
        slow, fast = poisson(1, 100, seed=""), poisson(2, 50, seed="")
        assert np.allclose(np.array(slow), 2 * np.array(fast))


class Behaviour:
    """A server whose answers are known: per request, in order, a status, or None for never.

    None is answered before `first` requests have come.
    """

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


class TestLoops:
    def test_closed_loop_keeps_its_concurrency(self) -> None:
        behaviour = Behaviour([200], first=4)
        with running(behaviour) as url:
            found = closed_loop(target(url), 4, 1)
        assert behaviour.most == 4
        assert len(found) == len(behaviour.seen) >= 4
        assert {shot.kind for shot in found} == {"ok"}
        assert set(behaviour.seen) == {b"a", b"b", b"c"}

    def test_open_loop_sends_whatever_has_been_answered(self) -> None:
        # Nothing is answered before all has been sent, and still all is sent.
        behaviour = Behaviour([200], first=20)
        arrivals = [0.01 * index for index in range(20)]
        with running(behaviour) as url:
            found = open_loop(target(url), arrivals)
        assert behaviour.most == 20
        assert [shot.due for shot in found] == arrivals
        assert {shot.kind for shot in found} == {"ok"}

    def test_open_loop_counts_from_when_it_was_due(self) -> None:
        # Due before the loop began: the wait for the client itself is latency too.
        with running(Behaviour([200])) as url:
            (shot,) = open_loop(target(url), [-5])
        assert shot.latency >= 5

    @pytest.mark.parametrize("opened", [True, False])
    def test_every_request_is_accounted_for_by_kind(self, opened: bool) -> None:
        behaviour = Behaviour([200, 429, 503, 500])
        with running(behaviour) as url:
            found = open_loop(target(url), [0.005 * k for k in range(40)]) if opened else closed_loop(target(url), 3, 1)
        summary = summarise(found)
        assert summary.offered == len(found) == len(behaviour.seen)
        good = round(summary.throughput * (max(s.ended for s in found) - min(s.due for s in found)))
        assert good + sum(summary.errors.values()) == len(found)
        assert set(summary.errors) == {"429", "500", "503"}

    def test_timeouts(self) -> None:
        with running(Behaviour([200, None])) as url:
            found = open_loop(target(url, timeout_s=2), [0.0, 0.1, 0.2, 0.3])
        assert sorted(shot.kind for shot in found) == ["ok", "ok", "timeout", "timeout"]

    def test_nobody_listens(self) -> None:
        found = open_loop(target("http://127.0.0.1:9/segment"), [0.0, 0.01])
        assert [shot.kind for shot in found] == ["connection", "connection"]


class TestCheck:
    reference = np.array([[0, 1], [1, 1]], np.uint8)

    def trial(self) -> peers.Trial:
        return peers.Trial(CASES["L1"], [b""], [self.reference], 1)

    def check(self, monkeypatch: pytest.MonkeyPatch, status: int, mask: np.ndarray, tolerance: float = 0.001) -> float:
        answer = httpx.Response(status, content=common.encode(mask))
        monkeypatch.setattr(peers, "post", lambda *_: answer)
        return peers.check(Contender("x", lambda *_: [], tolerance=tolerance), self.trial(), 0)

    def test_right_mask(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.check(monkeypatch, 200, self.reference) == 1

    def test_wrong_mask_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(peers.Unfit, match=r"75\.00%"):
            self.check(monkeypatch, 200, np.array([[0, 1], [1, 0]], np.uint8))

    def test_within_its_tolerance(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.check(monkeypatch, 200, np.array([[0, 1], [1, 0]], np.uint8), tolerance=0.25) == 0.75

    def test_another_size_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(peers.Unfit, match=r" 0\.00%"):
            self.check(monkeypatch, 200, self.reference[:1])

    def test_an_error_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(peers.Unfit, match="answered 503"):
            self.check(monkeypatch, 503, self.reference)

    @pytest.mark.parametrize("name", ["ours", "bentoml", "mlserver"])
    @pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'["!"]', b"null", b'{"outputs": []}'])
    def test_what_is_no_mask_is_refused(self, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes) -> None:
        monkeypatch.setattr(peers, "post", lambda *_: httpx.Response(200, content=content))
        with pytest.raises(peers.Unfit, match="no mask"):
            peers.check(contenders(2)[name], self.trial(), 0)

    def test_batches_that_mix_masks_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        masks = [np.full((2, 2), index % 2, np.uint8) for index in range(8)]
        everybody = threading.Barrier(8, timeout=60)

        def post(_: Contender, __: peers.Trial, ___: int, index: int) -> httpx.Response:
            everybody.wait()
            return httpx.Response(200, content=common.encode(masks[index ^ 1]))

        monkeypatch.setattr(peers, "post", post)
        with pytest.raises(peers.Unfit, match=r" 0\.00%"):
            peers.check(Contender("x", lambda *_: []), peers.Trial(CASES["L1"], [b""] * 8, masks, 1), 0, at_once=8)


class TestSharedWork:
    def test_statistics_are_the_servers(self) -> None:
        image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
        image[..., 1] = 7
        feed = common.feed([image])
        mean, inverse_std = statistics(image)
        assert np.allclose(feed["mean"].ravel(), mean)
        assert np.allclose(feed["inverse_std"].ravel(), inverse_std)
        assert np.array_equal(feed["image"][0], image.transpose(2, 0, 1))

    def test_the_answer_is_the_servers(self, shipped_bundle: Path) -> None:
        from server.arrays import Mask

        body = bodies(96)[0]
        model = common.Model(shipped_bundle / "L1.onnx", threads=1)
        (mask,) = model.run([common.decode(body)])
        # Theirs is written by Pillow, as they would; what it shows is the same.
        ours = png.encode(Mask(mask), {1: common.COLOR})
        shown = [Image.open(io.BytesIO(data)) for data in (model.answer([body])[0], ours)]
        assert np.array_equal(*map(np.asarray, shown))
        assert np.array_equal(*(np.asarray(picture.convert("RGB")) for picture in shown))

    def test_a_batch_is_its_images(self, shipped_bundle: Path) -> None:
        model = common.Model(shipped_bundle / "L1.onnx", threads=1)
        files = bodies(96, count=3)
        together = [common.decode(answer) for answer in model.answer(files)]
        alone = [common.decode(model.answer([file])[0]) for file in files]
        assert all(np.mean(a == b) > 0.999 for a, b in zip(together, alone, strict=True))


class TestRequests:
    def test_bodies_differ_and_have_the_size(self) -> None:
        files = bodies(512)
        assert len(set(files)) == 8
        assert {Image.open(io.BytesIO(file)).size for file in files} == {(512, 512)}

    def test_form(self) -> None:
        body, content_type = form("image")(b"PNG")
        request = httpx.Request("POST", "http://x", content=body, headers={"Content-Type": content_type})
        assert b'name="image"' in body
        assert request.headers["Content-Type"].endswith(f"boundary={body[2:6].decode()}")

    def test_inference_protocol_both_ways(self) -> None:
        mask = np.array([[0, 1]], np.uint8)
        body, _ = inference_protocol(common.encode(mask))
        assert np.array_equal(protocol_mask(body.replace(b"inputs", b"outputs")), mask)


class TestOptions:
    def test_open_loops_need_a_capacity(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            peers.parse(["--loads", "0.8x"])
        assert "closed" in capsys.readouterr().err
        assert peers.parse(["--loads", "0.8x", "--rate", "5"]).rate == [5]

    @pytest.mark.parametrize(("name", "more"), [("litserve", []), ("ours", [f"1.3x{report.DEADLINE}", f"1.5x{report.MIN_LEVEL}"])])
    def test_deadlines_are_asked_of_ours_only(self, name: str, more: list[str]) -> None:
        urls = []

        class Fire(peers.Elsewhere):
            def __call__(self, function: object, target: Target, *_: object) -> list[Shot]:  # type: ignore[override]
                urls.append(target.url)
                return [Shot(0, 1, "ok")]

        options = peers.parse(["--loads", "1", "1.3x", "--seconds", "1"])
        trial = peers.Trial(CASES["L3"], [b""], [], 0.5)
        with Fire() as fire:
            assert list(peers.measure(contenders(2)[name], trial, 0, 0, options, fire)) == ["1", "1.3x", *more]
        assert [("deadline_ms=500" in url, "min_level=1" in url) for url in urls[3:]] == [(True, False), (True, True)][: len(more)]


class TestReport:
    def rows(self) -> report.Rows:
        nan = math.nan
        return {
            ("bare", "L4", "1"): Summary(0, 2, 1, 1),
            ("ours", "L4", "1"): Summary(9, 1.96, 1, 1),
            ("auto", "L4", "1"): Summary(9, 3, 1, 1),
            ("litserve", "L4", "1"): Summary(9, 1.8, 1, 1),
            ("torch", "L4", "1"): Summary(9, 0.5, 1, 1),
            ("ours", "L4", "0.8x"): Summary(9, 1.5, 1, 50),
            ("litserve", "L4", "0.8x"): Summary(9, 1.5, 1, 40),
            ("torch", "L4", "0.8x"): Summary(9, nan, nan, nan),
            ("ours", "L4", f"1.3x{report.DEADLINE}"): Summary(9, 1.9, 1, 1, 1.9, {"429": 3}, 4, missed=3, prompt=3, share=0.97),
            ("ours", "L4", f"1.5x{report.MIN_LEVEL}"): Summary(9, 1.9, 1, 1, 2.9, share=1.48),
        }

    def test_goals(self) -> None:
        verdicts = {row[1]: row[3] for row in report.goals(self.rows(), ["L4"])}
        assert verdicts == {
            "throughput at concurrency 1, of LitServe ≥ 1": "met",
            **{f"throughput at concurrency {load}, of no peer ≥ 1": "not measured" for load in (4, 16, 64)},
            "best throughput, of LitServe ≥ 1": "met",
            "auto: best throughput, of LitServe ≥ 2": "missed",
            "best throughput, of the bare loop ≥ 0.95": "met",
            "p99 at 0.8 × no worse than that of LitServe": "missed",
            "in time at 1.3 × with deadline_ms, of capacity ≥ 0.95": "met",
            "refused within 50 ms, of those not answered in time at 1.3 × with deadline_ms ≥ 0.99": "met",
            "in time at 1.5 × with min_level=1, of capacity ≥ 1.3": "met",
        }

    def test_goals_that_could_not_be_measured_are_said(self) -> None:
        verdicts = [row[3] for row in report.goals({("ours", "L1", "1"): Summary(1, 1, 1, 1)}, ["L1"])]
        assert set(verdicts) == {"not measured"}
        assert len(verdicts) == 9

    def test_late_answers_are_no_refusals(self) -> None:
        strict = Summary(9, 1, 1, 1, 1, {"429": 3, "504": 1}, 4, missed=5, prompt=3)
        row = report.refusal_goal("L4", strict)
        assert row[2:] == ["0.600 of 5; median refusal 4 ms; 2 late, 504 or other", "missed"]

    def test_who_fails_misses_the_latency_goal(self) -> None:
        failing = Summary(9, 1, 1, math.inf)
        rows = {("ours", "L4", "0.8x"): failing, ("ray", "L4", "0.8x"): failing}
        (row,) = report.latency_goal(rows, "L4")
        assert row[2:] == ["> deadline, > deadline ms", "missed"]

    def test_shares_are_of_the_turns_own_capacity(self) -> None:
        turns = [
            {"contender": "ours", "case": "L4", "levels": {"1": Summary(1, best, 1, 1), "1.3x": Summary(1, 1, 1, 1, good)}}
            for best, good in ((1, 1), (4, 2), (10, 6))
        ]
        assert report.gather(turns)["ours", "L4", "1.3x"].share == pytest.approx(0.6)

    def test_published(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        turns = [
            {"contender": "ours", "case": "L4", "round": 0, "start_up_s": 1.0, "peak_rss_mb": 300.0, "agreement": 1.0,
             "levels": {load: summary for (name, _, load), summary in self.rows().items() if name == "ours"}},
            {"contender": "ray", "case": "L4", "round": 0, "levels": {}, "unfit": "did not start"},
        ]  # fmt: skip
        run = {
            "turns": turns, "deadlines_ms": {"L4": 2000.0}, "not_installed": ["bentoml"], "versions": {"ray": "ray==1"},
            "options": {"threads": 2, "rounds": 1, "seconds": 4},
        }  # fmt: skip
        report.publish(run, tmp_path)
        text = (tmp_path / "peers.md").read_text()
        assert "not measured: did not start" in text
        assert "not installed" in text
        assert "3 × 429" in text
        assert "NaN" not in (tmp_path / "peers.json").read_text()
        assert (tmp_path / "peers.png").stat().st_size > 0
        assert "--install" in capsys.readouterr().out
