"""Checks of the bundles: files, what serves each graph and why, golden pairs and one timed run."""

import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from server.doctor.context import Context
from server.doctor.report import Check
from server.errors import BundleDamaged, EngineUnavailable, UnetppError
from server.runtime import golden
from server.runtime.bundle import read_bundle
from server.runtime.deployment import Deployment, ModelInstance, find_bundles, read_deployment
from server.runtime.device import DeviceThread
from server.runtime.engines import Engine
from server.runtime.loader import Loader
from server.runtime.tuning import BUNDLE_FOLDER, Tuning
from server.service import find_default

# Side of the tile of the timed run by dims, as in `unetpp calibrate`.
TIMED_SIDE = {2: 256, 3: 64}


def check_bundles(context: Context) -> Iterator[Check]:
    """Verifies the files of each bundle, and selects what serves it, as a start does."""
    settings = context.known_settings
    try:
        folders = find_bundles(settings.bundles)
    except (UnetppError, OSError) as error:
        yield Check(
            "bundles", "failed", str(error), "set UNETPP_BUNDLES to a bundle or to a folder of bundles"
        )
        return
    context.facts["bundles"] = {}
    for folder in folders:
        yield _check_bundle(context, folder)
    if context.deployments:
        try:
            default = find_default(settings, context.deployments)
        except UnetppError as error:
            remedy = "set UNETPP_DEFAULT_MODEL to one of them, or leave it unset"
            yield Check("bundles", "failed", str(error), remedy)
        else:
            context.facts["default_model"] = default
            yield Check(
                "bundles", "ok", f"{len(context.deployments)} can be served; the default is {default}"
            )


def _check_bundle(context: Context, folder: Path) -> Check:
    settings = context.known_settings
    name = f"bundles:{folder.name}"
    try:
        bundle = read_bundle(folder)
        context.bundles.append(bundle)
        deployment = read_deployment(folder, settings.runtime, settings.batching)
    except BundleDamaged as error:
        return Check(name, "failed", str(error), "copy or export the bundle again (unetpp export)")
    except EngineUnavailable as error:
        remedy = "install the engine, or set UNETPP_RUNTIME__ENGINE, __PROVIDER and __PRECISION to auto"
        return Check(name, "failed", str(error), remedy)
    except OSError as error:
        return Check(name, "failed", f"{folder} cannot be read: {error.strerror}", "make it readable")
    manifest = bundle.manifest
    if deployment.name in context.deployments:
        text = f"a bundle named {deployment.name!r} is already there; names must differ"
        return Check(name, "failed", text, "remove one of the two")
    context.deployments[deployment.name] = deployment
    context.facts["bundles"][deployment.name] = {
        "manifest_sha256": bundle.sha256,
        "recommended_level": manifest.recommended_level,
        "files": {file: entry.sha256 for file, entry in manifest.files.items()},
    }
    return Check(
        name,
        "ok",
        f"{manifest.name}: {len(manifest.files)} files match their hashes; SHA-256 of the manifest {bundle.sha256[:12]}; "
        f"levels {', '.join(map(str, manifest.levels))}, recommended {manifest.recommended_level}",
    )


def check_tuning(context: Context) -> Iterator[Check]:
    """Reports which tuning a start would use, and the stored ones that do not fit this machine."""
    folder = context.known_settings.runtime.tuning_folder
    for name, deployment in context.deployments.items():
        if deployment.tuning:
            made = time.strftime("%Y-%m-%d", time.gmtime(deployment.tuning.created))
            yield Check(f"tuning:{name}", "ok", f"measured on {made}; decides engine and precision")
            continue
        others = _read_tunings(folder, deployment)
        if not others:
            yield Check(f"tuning:{name}", "ok", "none stored; the fixed rule decides engine and precision")
            continue
        yield Check(
            f"tuning:{name}",
            "warning",
            f"{len(others)} stored, none of which was made for this machine, its packages and settings; the fixed rule decides",
            "unetpp tune",
        )


def _read_tunings(folder: Path, deployment: Deployment) -> list[Tuning]:
    """Reads the stored tunings of a bundle, for whatever machine."""
    tunings = []
    for place in (folder, deployment.bundle.folder / BUNDLE_FOLDER):
        for path in sorted(place.glob("*.json")):
            try:
                tuning = Tuning.model_validate_json(path.read_bytes())
            except (OSError, ValidationError):
                continue
            if tuning.key.bundle == deployment.bundle.sha256:
                tunings.append(tuning)
    return tunings


def check_graphs(context: Context) -> Iterator[Check]:
    """Opens what `precision=auto` serves for each graph, one at a time, as a start does: hashes, engine, golden pairs."""
    device = DeviceThread()
    # Without a budget the loader closes each graph for the next one.
    loader = Loader(device, memory_bytes=0)
    context.facts["graphs"] = []
    try:
        for deployment in context.deployments.values():
            for graph in deployment.manifest.all_graphs:
                yield _check_graph(context, loader, device, deployment, graph.name)
    finally:
        loader.close()
        device.close()


def _check_graph(
    context: Context, loader: Loader, device: DeviceThread, deployment: Deployment, graph: str
) -> Check:
    name = f"graphs:{deployment.name}/{graph}"
    problems: list[str] = []
    while True:
        instance = deployment.find_auto(graph)
        try:
            engine = loader.submit(deployment, instance).result()
            break
        except UnetppError as error:
            problems.append(str(error))
            # The loader has excluded what does not work here, if anything is left for the graph.
            if deployment.find_auto(graph) is instance:
                remedy = "copy the bundle again; if it is sound, check engines and driver"
                return Check(name, "failed", "; ".join(problems), remedy)
    milliseconds = device.run_blocking(_time_run, engine, deployment)
    instance.engine = None
    served = _describe(deployment, instance)
    context.facts["graphs"].append({"model": deployment.name, **served, "milliseconds": milliseconds})
    side = TIMED_SIDE[deployment.manifest.dims]
    detail = (
        f"{served['precision']}, {served['engine']} on {served['provider']}, by {served['reason']}; golden pairs agree; "
        f"{milliseconds:.1f} ms per {' × '.join([str(side)] * deployment.manifest.dims)}"
    )
    if problems:
        remedy = "the server answers without it; to keep what does not work out of service, name engine, provider or precision"
        return Check(name, "warning", f"{detail}; before it failed: {'; '.join(problems)}", remedy)
    return Check(name, "ok", detail)


def _describe(deployment: Deployment, instance: ModelInstance) -> dict[str, str]:
    candidate = instance.choice.candidate
    return {
        "graph": instance.graph.name,
        "precision": candidate.precision,
        "engine": candidate.engine,
        "provider": candidate.provider,
        "reason": deployment.selection.reason[instance.graph.name],
    }


def _time_run(engine: Engine, deployment: Deployment) -> float:
    """Returns milliseconds of the second run of a tile; the first prepares the engine for its size."""
    manifest = deployment.manifest
    tile = golden.noise(1, len(manifest.channels), [TIMED_SIDE[manifest.dims]] * manifest.dims)
    engine.run(tile)
    begun = time.perf_counter()
    engine.run(tile)
    return round((time.perf_counter() - begun) * 1e3, 2)
