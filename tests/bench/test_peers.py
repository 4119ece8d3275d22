"""The benchmark against peers: its arithmetic, its load generator, its checks, and a short run of our server alone."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from aiohttp import test_utils, web

from bench.inputs import bodies
from bench.peers import common, report
from bench.peers.__main__ import main
from bench.peers.contenders import CASES, Contender, contenders, inference_protocol, protocol_mask
from bench.peers.load import Outcome, Summary, Target, closed_loop, open_loop, poisson, summarise
from bench.peers.servers import Server, UnfitError, check


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([Outcome(0, 1, "ok"), Outcome(1, 2, "ok"), Outcome(2, 4, "ok")], Summary(3 / 4, 1000, 2000)),
        (
            [Outcome(0, 1, "ok"), Outcome(0, 2, "ok"), Outcome(0, 4, "429")],
            Summary(2 / 4, 2000, 60_000, {"429": 1}),
        ),
        ([Outcome(0, 2, "timeout")], Summary(0, 60_000, 60_000, {"timeout": 1})),
    ],
    ids=["good answers", "failures are infinite", "only failures"],
)
def test_summarise_outcomes_returns_figures(outcomes: list[Outcome], expected: Summary) -> None:
    assert summarise(outcomes) == expected


def test_poisson_is_seeded_sorted_and_exponential() -> None:
    arrivals = poisson(10, 1000, seed="1")
    assert arrivals == poisson(10, 1000, seed="1") == sorted(arrivals) != poisson(10, 1000, seed="2")
    assert len(arrivals) == 10_000
    gaps = np.diff(arrivals)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)


@contextlib.asynccontextmanager
async def server(answers: Sequence[int | bytes | None], first: int = 1) -> AsyncIterator[SimpleNamespace]:
    """Answers in turn by a status, a body or never (None), and not before `first` requests have come."""
    seen = SimpleNamespace(bodies=[], in_flight=0, most=0)
    enough, end = asyncio.Event(), asyncio.Event()

    async def handle(request: web.Request) -> web.Response:
        body = await request.read()
        answer = answers[len(seen.bodies) % len(answers)]
        seen.bodies.append(body)
        seen.in_flight += 1
        seen.most = max(seen.most, seen.in_flight)
        if len(seen.bodies) >= first:
            enough.set()
        await (end if answer is None else enough).wait()
        seen.in_flight -= 1
        return web.Response(body=answer) if isinstance(answer, bytes) else web.Response(status=answer or 200)

    app = web.Application()
    app.router.add_post("/{path:.*}", handle)
    async with test_utils.TestServer(app) as listening:
        seen.port = listening.port
        seen.target = Target(str(listening.make_url("/")), [b"a", b"b", b"c"], "image/png", timeout_s=1)
        yield seen
        end.set()


async def test_closed_loop_keeps_its_connections_busy_and_counts_every_status() -> None:
    async with server([200, 429, 503, 500], first=4) as seen:
        outcomes = await asyncio.to_thread(closed_loop, seen.target, 4, 0.2)
    assert seen.most == 4
    assert len(outcomes) == len(seen.bodies) >= 4
    assert set(seen.bodies) == {b"a", b"b", b"c"}
    assert {outcome.kind for outcome in outcomes} == {"ok", "429", "503", "500"}


async def test_open_loop_sends_before_earlier_answers_and_counts_from_the_due_time() -> None:
    # The first is due before the loop begins. Nothing is answered before all has been sent.
    arrivals = [-5.0, *(0.01 * index for index in range(9))]
    async with server([200], first=10) as seen:
        outcomes = await asyncio.to_thread(open_loop, seen.target, arrivals)
    assert seen.most == 10
    assert [outcome.due for outcome in outcomes] == arrivals
    assert {outcome.kind for outcome in outcomes} == {"ok"}
    assert outcomes[0].ended - outcomes[0].due >= 5


async def test_open_loop_without_answers_counts_timeouts_and_refused_connections() -> None:
    async with server([None]) as seen:
        unanswered = await asyncio.to_thread(open_loop, seen.target, [0.0])
    refused = await asyncio.to_thread(open_loop, Target("http://127.0.0.1:9", [b""], ""), [0.0])
    assert [outcome.kind for outcome in unanswered + refused] == ["timeout", "connection"]


REFERENCE = np.array([[0, 1], [1, 1]], np.uint8)
RIGHT, WRONG = common.encode(REFERENCE), common.encode(np.array([[0, 1], [1, 0]], np.uint8))


async def checked(contender: Contender, *answers: int | bytes) -> float:
    """Agreement of a contender with these answers to concurrent requests, of which each should show REFERENCE."""
    async with server(answers, first=len(answers)) as seen:
        fake = Server(contender, CASES["L1"], seen.port, SimpleNamespace(pid=0))
        return await asyncio.to_thread(check, fake, [b"file"] * len(answers), [REFERENCE] * len(answers))


async def test_check_masks_within_the_tolerance_returns_the_worst() -> None:
    assert await checked(Contender("x", list), RIGHT) == 1
    assert await checked(Contender("x", list, tolerance=0.25), RIGHT, WRONG) == 0.75


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("ours", [RIGHT] * 7 + [WRONG]),
        ("ours", [common.encode(REFERENCE[:1])]),
        ("ours", [503]),
        ("litserve", [b"not PNG"]),
        *(("mlserver", [text]) for text in (b"", b"[]", b"null", b'{"outputs": []}', RIGHT)),
    ],
    ids=["one of a batch", "size", "status", "no PNG", "empty", "list", "null", "no outputs", "no JSON"],
)
async def test_check_wrong_answer_raises(name: str, answers: list[int | bytes]) -> None:
    with pytest.raises(UnfitError):
        await checked(contenders(2)[name], *answers)


def test_model_batch_returns_the_masks_of_its_images(shipped_bundle: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    image[..., 1] = 7
    feed, deviation = common.feed([image]), image.std((0, 1))
    assert np.allclose(feed["mean"].ravel(), image.mean((0, 1)))
    assert np.allclose(feed["inverse_std"].ravel(), 1 / np.where(deviation > 0, deviation, 1))
    model = common.Model(shipped_bundle / "L1.onnx", threads=1)
    files = bodies(96, count=3)
    assert len(set(files)) == 3
    for file, answer in zip(files, model.answer(files), strict=True):
        assert np.mean(common.decode(answer) == common.decode(model.answer([file])[0])) > 0.999


def test_inference_protocol_carries_the_file() -> None:
    body, _ = inference_protocol(RIGHT)
    assert base64.b64decode(json.loads(body)["inputs"][0]["data"][0]) == RIGHT
    assert np.array_equal(protocol_mask(body.replace(b"inputs", b"outputs")), REFERENCE)


def test_goal_rows_relate_measurements_of_one_round_to_its_best_peer() -> None:
    rounds = {
        "ours": [Summary(3, 1, 20), Summary(30, 1, 2), Summary(6, 1, 60_000)],
        "litserve": [Summary(2, 1, 10), Summary(1, 1, 4), Summary(4, 1, 60_000)],
        "mlserver": [Summary(1, 1, 40), Summary(20, 1, 8), Summary(3, 1, 60_000)],
    }
    measurements = [
        report.Measurement(case, 0, load, name, summary)
        for case, load in (("L1", "0.8x"), ("L3", "16"))
        for name, summaries in rounds.items()
        for summary in summaries
    ]
    rows = report.goal_rows(measurements, ["L1", "L3"])
    measured = [row[3:] for row in rows if row[4] != "not measured"]
    assert measured == [["1.00 (0.50 to 2.00)", "met"], ["1.50 (1.50 to 1.50)", "met"]]
    assert len(rows) == len(report.GOALS)


def test_main_of_ours_alone_writes_the_table_and_the_facts(tmp_path: Path) -> None:
    main(
        [
            "--contenders",
            "ours",
            "--cases",
            "L1",
            "--rounds",
            "1",
            "--seconds",
            "0.2",
            "--out",
            str(tmp_path / "x"),
        ]
    )
    facts = json.loads((tmp_path / "x" / "peers.json").read_text())
    assert [(m["contender"], m["load"], m["errors"]) for m in facts["measurements"]] == [
        ("bare", "1", {}),
        ("ours", "1", {}),
        ("ours", "16", {}),
        ("ours", "0.8x", {}),
    ]
    assert facts["agreement"] == {"ours": 1}
    text = (tmp_path / "x" / "peers.md").read_text()
    assert text.startswith("ours; L1 96²; rounds: 1, 0.2 s per load; ")
