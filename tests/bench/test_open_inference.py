"""The benchmark of batches over the Open Inference Protocol: its arithmetic, and that its requests are what servers get."""

import numpy as np

from bench.open_inference import BATCH, SIDE, Rates, best, contenders, goal_rows, tiles
from server.api.open_inference.messages import HEADER, parse_request

ROUND = {
    "bare": {1: Rates(100, 50), 7: Rates(80, 40), 64: Rates(90, 60)},
    "ours": Rates(90, 48),
    "LitServe": Rates(30, 10),
    "MLServer": Rates(20, 16),
}


def test_best_compares_with_the_best_batch_and_the_best_peer() -> None:
    assert [best(ROUND, "bare", measure) for measure in (0, 1)] == [100, 60]
    assert [best(ROUND, "bare, same batches", measure) for measure in (0, 1)] == [80, 40]
    assert [best(ROUND, "best peer", measure) for measure in (0, 1)] == [30, 16]


def test_goal_rows_of_what_was_measured() -> None:
    rows = goal_rows([ROUND, ROUND])
    assert [(row[0], row[1][:4], row[2], row[4]) for row in rows] == [
        ("ours / bare ≥ 0.85", "0.90", "met", "missed"),
        ("ours / bare, same batches ≥ 0.85", "1.12", "met", "met"),
        ("ours / best peer ≥ 1.5", "3.00", "met", "met"),
    ]


def test_requests_carry_the_tiles() -> None:
    pixels = tiles()
    assert pixels.shape == (BATCH, SIDE, SIDE, 3)
    ours = contenders(pixels)["ours"]
    parsed = parse_request(memoryview(ours.body), int(ours.headers[HEADER]))
    assert (parsed.inputs["image"].values == pixels).all()
    for name in ("LitServe", "MLServer"):
        assert len(contenders(pixels)[name].body) >= pixels.size
    assert np.ptp(pixels) > 100
