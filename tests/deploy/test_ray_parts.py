"""The parts of Ray's application that need no Ray: its ASGI layers, its policy and its arguments."""

import asyncio
import json
import re
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from deploy.ray_arguments import Arguments, read_settings
from deploy.ray_door import Door
from deploy.ray_proxy import ProxyProblems
from deploy.ray_scaling import DEFICIT, WAIT, LevelDeficit, ScaleOnWait
from server.errors import Misconfigured
from server.metrics import Metrics
from tests.conftest import ROOT

Messages = list[dict[str, Any]]
SCOPE = {"type": "http", "method": "GET", "path": "/models", "headers": [(b"x-request-id", b"mine")]}
OK: Messages = [
    {"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"mine"), (b"connection", b"close")]},
    {"type": "http.response.body", "body": b"a", "more_body": True},
    {"type": "http.response.body", "body": b"b"},
]  # fmt: skip


async def nothing() -> None:
    pass


def saying(messages: Iterable[dict[str, Any]]) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        app.scope = scope  # type: ignore[attr-defined]
        for message in messages:
            await send(message)

    return app


async def answered(app: Any, scope: dict[str, Any] = SCOPE) -> Messages:
    sent: Messages = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(dict(scope), never, send)
    return sent


async def never() -> dict[str, Any]:
    return await asyncio.Event().wait()  # type: ignore[return-value]


async def test_what_rays_proxy_says_itself_is_left_out() -> None:
    start, *body = await answered(Door(saying(OK), nothing, nothing))
    assert start["headers"] == []
    assert body == OK[1:]


async def test_a_cancelled_request_becomes_a_disconnect_and_is_awaited() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((await receive())["type"])
        await asyncio.sleep(0)
        await send(OK[0])
        seen.append("ended")

    request = asyncio.ensure_future(answered(Door(app, nothing, nothing)))
    await asyncio.sleep(0)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert seen == ["http.disconnect", "ended"]


async def test_an_application_that_is_cancelled_itself_ends() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await answered(Door(app, nothing, nothing))


async def test_steps_of_the_lifespan_come_before_ray_hears_of_them() -> None:
    order: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})

    async def send(message: dict[str, Any]) -> None:
        order.append(message["type"])

    async def started() -> None:
        order.append("started")

    async def stopped() -> None:
        order.append("stopped")

    await Door(app, started, stopped)({"type": "lifespan"}, never, send)
    assert order == ["started", "lifespan.startup.complete", "stopped", "lifespan.shutdown.complete"]


@pytest.mark.parametrize(
    ("rays", "status", "code"), [(None, 503, "not-ready"), (503, 503, "not-ready"), (404, 503, "not-ready"), (429, 429, "overloaded")]
)  # fmt: skip
async def test_rays_refusals_are_problem_documents(rays: int | None, status: int, code: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"x-request-id", b"mine")]
    said = [{"type": "http.response.start", "status": rays, "headers": headers}, {"type": "http.response.body", "body": b"x"}]  # fmt: skip
    start, body = await answered(ProxyProblems(saying(said if rays else [])))
    sent = dict(start["headers"])
    assert (start["status"], json.loads(body["body"])["code"]) == (status, code)
    assert sent[b"retry-after"] == b"1"
    assert sent.get(b"x-request-id") == (b"mine" if rays else None)


async def test_answers_and_rays_own_paths_pass() -> None:
    assert await answered(ProxyProblems(saying(OK))) == OK
    plain = [OK[0] | {"status": 503, "headers": [(b"content-type", b"text/plain")]}, OK[2]]
    assert await answered(ProxyProblems(saying(plain)), SCOPE | {"path": "/-/healthz"}) == plain


@pytest.mark.parametrize(("given", "kept"), [(b"mine", True), (b"not an id", False), (b"x" * 65, False)])
async def test_ids_that_the_server_would_refuse_do_not_reach_ray(given: bytes, kept: bool) -> None:
    app = saying(OK)
    await answered(ProxyProblems(app), SCOPE | {"headers": [(b"x-request-id", given), (b"a", b"b")]})
    assert app.scope["headers"] == [*([(b"x-request-id", given)] if kept else []), (b"a", b"b")]


def context(current: int, target: int, **figures: list[float]) -> Any:
    metrics = {name: dict(enumerate(values)) for name, values in figures.items()}
    return SimpleNamespace(
        current_num_replicas=current, target_num_replicas=target, aggregated_metrics=metrics
    )


@pytest.mark.parametrize(
    ("current", "target", "figures", "replicas"),
    [
        (2, 2, {}, 2),
        (2, 2, {WAIT: [0.5, 0.5], DEFICIT: [0, 0]}, 2),
        (2, 2, {WAIT: [1.0, 2.0], DEFICIT: [0, 0]}, 3),
        (2, 2, {WAIT: [90, 90], DEFICIT: [0, 0]}, 4),
        (4, 4, {WAIT: [0, 0, 0, 0], DEFICIT: [0.2, 0.1, 0.2, 0.1]}, 6),
        (2, 4, {WAIT: [1.2, 1.2]}, 4),
        (2, 2, {WAIT: [0.1, 0.1], DEFICIT: [0, 0.01]}, 1),
        (1, 1, {WAIT: [0]}, 1),
    ],
)
def test_replicas_follow_the_worse_of_wait_and_deficit(
    current: int, target: int, figures: dict[str, list[float]], replicas: int
) -> None:
    policy = ScaleOnWait(target_wait_s=1.0, target_deficit=0.1)
    assert policy(context(current, target, **figures)) == (replicas, {})


def test_the_deficit_is_of_the_answers_since_the_last_call() -> None:
    metrics = Metrics()
    deficit = LevelDeficit(metrics)
    assert deficit.since_last_call() == 0
    for served in (4, 4, 2, 1):
        metrics.requests.labels("nuclei", "fast", "4", f"{served}", "ok").inc()
    metrics.requests.labels("nuclei", "fast", "4", "none", "refused").inc(10)
    metrics.degraded.labels("nuclei", "4", "2", "load").inc()
    metrics.degraded.labels("nuclei", "4", "1", "load").inc()
    assert deficit.since_last_call() == 5 / 4
    assert deficit.since_last_call() == 0


def test_arguments_come_as_text_or_as_yaml() -> None:
    text = Arguments.model_validate(
        {
            "replicas": "2",
            "num_gpus": "0.5",
            "settings": '{"UNETPP_HTTP__MAX_IN_FLIGHT": "8"}',
        }
    )
    mapping = Arguments.model_validate(
        {
            "replicas": 2,
            "num_gpus": 0.5,
            "settings": {"UNETPP_HTTP__MAX_IN_FLIGHT": 8},
        }
    )
    assert text == mapping
    assert read_settings(text).http.max_in_flight == 8


def test_settings_of_the_arguments_precede_those_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNETPP_HTTP__MAX_IN_FLIGHT", "5")
    monkeypatch.setenv("UNETPP_HTTP__STOP_S", "7")
    http = read_settings(Arguments(settings={"UNETPP_HTTP__MAX_IN_FLIGHT": "8"})).http
    assert (http.max_in_flight, http.stop_s) == (8, 7)
    # The environment is as it was.
    assert read_settings(Arguments()).http.max_in_flight == 5


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"settings": {"UNETPP_HTTP__MAX_INFLIGHT": "8"}}, Misconfigured, "MAX_INFLIGHT"),
        ({"settings": {"UNETPP_HTTP__MAX_IN_FLIGHT": "0"}}, Misconfigured, "MAX_IN_FLIGHT"),
        ({"replicas": 3, "max_replicas": 2}, ValidationError, "max_replicas=2"),
        ({"replica": 3}, ValidationError, "replica"),
        ({"settings": "[1]"}, ValidationError, "settings"),
    ],
)
def test_mistakes_in_arguments_are_named(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Arguments.model_validate(arguments)


def serve_config(text: str) -> Any:
    """A configuration of Ray Serve, as Ray reads it."""
    schema = pytest.importorskip("ray.serve.schema", reason="needs the extra 'ray'")
    return schema.ServeDeploySchema.model_validate(yaml.safe_load(text))


def manifests() -> dict[str, Any]:
    documents = yaml.safe_load_all((ROOT / "deploy/rayservice.yaml").read_text())
    return {document["kind"]: document for document in documents}


def test_shipped_configurations_are_valid_and_agree() -> None:
    bare = serve_config((ROOT / "deploy/ray_serve.yaml").read_text())
    service = manifests()["RayService"]["spec"]
    kubernetes = serve_config(service["serveConfigV2"])
    assert bare.http_options == kubernetes.http_options
    for config in (bare, kubernetes):
        (application,) = config.applications
        assert application.import_path == "deploy.ray_app:build"
        arguments = Arguments.model_validate(application.args)
        assert "UNETPP_AUTH__KEYS_FILE" in arguments.settings
    (workers,) = service["rayClusterConfig"]["workerGroupSpecs"]
    assert workers["maxReplicas"] == arguments.max_replicas


def test_the_manifest_has_the_pinned_ray_and_valid_kubernetes_objects() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    found = manifests()
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    cluster = found["RayService"]["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == pins["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    templates = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": group["template"]["spec"]}
        for group in templates
    ]
    for document in (*pods, found["NetworkPolicy"]):
        validate.validate(document, "1.31", strict=True)


def test_the_manual_lists_all_arguments() -> None:
    page = (ROOT / "docs/operate/ray.md").read_text()
    table = page.partition("## Arguments")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(Arguments.model_fields)
