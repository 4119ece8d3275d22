"""`mode=auto` on the graphs of the shipped bundles, to the bit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.runtime.bundle import Bundle, read_bundle
from server.runtime.curve import DepthCurve
from server.runtime.deployment import Deployment
from server.runtime.machine import read_machine
from server.service import open_service
from tests.conftest import ROOT
from tests.server.segment.test_same_answer import PAGES, SMALL, VOLUME, WIDE
from tests.support.curves import curve, point
from tests.support.files import picture_bytes
from tests.support.service import quiet_settings, segment

SAMPLES = ROOT / "server" / "web" / "samples"
CASES: dict[str, tuple[str, bytes]] = {
    "image": ("nuclei", SMALL),
    "windows": ("nuclei", WIDE),
    "stack": ("nuclei", PAGES),
    "noise": ("nuclei", picture_bytes(np.random.default_rng(3).integers(0, 256, (33, 47), dtype=np.uint8))),
    "volume": ("hippocampus", VOLUME),
    "sample volume": ("hippocampus", (SAMPLES / "hippocampus.nii.gz").read_bytes()),
}
# Thresholds that send every input on, and none, and the index of the level that then serves.
EXTREMES = [(-1.0, -1), (1.0, 0)]


@pytest.fixture(scope="module")
def open_with() -> Iterator[Any]:
    """Opens a service on a shipped bundle with another curve; all share the engines of the first one."""
    services: list[Any] = []
    engines: dict[tuple[str, str, str], Any] = {}

    def made(name: str, *points: dict[str, Any]) -> Any:
        settings = quiet_settings(default_model=name, runtime={"precision": "fp32"})
        bundle = read_bundle(ROOT / "bundles" / name)
        manifest = bundle.manifest.model_copy(
            update={"depth_curve": DepthCurve.model_validate(curve(*points))} if points else {}
        )
        deployment = Deployment(
            Bundle(bundle.folder, manifest, bundle.sha256),
            read_machine(settings.runtime.engine, settings.runtime.provider),
            settings.runtime,
            settings.batching,
        )
        for (graph, precision), instance in deployment.instances.items():
            instance.engine = engines.get((name, graph, precision))
        service = open_service(settings, {name: deployment})
        services.append((name, service))
        return service

    def keep() -> None:
        for name, service in services:
            for (graph, precision), instance in service.registry.get(name).instances.items():
                if instance.engine:
                    engines[name, graph, precision] = instance.engine

    made.keep = keep  # type: ignore[attr-defined]
    yield made
    for _, service in services:
        service.close()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chain", [(1, 2), (1, 2, 3)], ids=str)
@pytest.mark.parametrize(("threshold", "index"), EXTREMES, ids=["lowest", "highest"])
async def test_extreme_thresholds_are_the_ends_of_the_chain(
    open_with: Any, name: str, chain: tuple[int, ...], threshold: float, index: int
) -> None:
    model, data = CASES[name]
    service = open_with(model, point(chain, *[threshold] * (len(chain) - 1)))
    auto = await segment(service, data, mode="auto", format="scores")
    fixed = await segment(service, data, level=chain[index], format="scores")
    open_with.keep()
    assert (auto.target.mode, auto.target.level) == ("auto", chain[index])
    assert auto.body == fixed.body


@pytest.mark.parametrize("model", ["nuclei", "hippocampus"])
def test_shipped_bundles_have_a_curve_that_loses_little_and_saves_much(model: str) -> None:
    shipped = read_bundle(ROOT / "bundles" / model).manifest.depth_curve
    assert shipped
    assert shipped.choose().likely_loss <= 0.25
    # The standard error of 31 volumes alone is more than 0.25, and that of 80 images lets a short chain lose a little more.
    chosen = shipped.choose(0.5)
    assert chosen.likely_loss <= 0.5
    assert chosen.work <= 0.48


async def test_sample_of_the_page_is_served_by_the_shipped_curve(open_with: Any) -> None:
    service = open_with("nuclei")
    data = (SAMPLES / "cells.png").read_bytes()
    response = await segment(service, data, mode="auto")
    chosen = service.registry.get("nuclei").manifest.depth_curve.choose()
    assert response.target.level in chosen.chain
    assert response.body == (await segment(service, data, level=response.target.level)).body
    assert Path(response.filename).suffix == ".png"
