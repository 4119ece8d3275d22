"""docs/reference/metrics.md: the metric families with type, labels and help, from the server's own registry."""

from pathlib import Path

from prometheus_client import Metric

from server.metrics_gpu import TEXTS
from server.monitoring import model_info
from server.service import open_service
from server.settings import Settings
from tools.markdown import codes, page, table

BUNDLES = Path(__file__).parents[1] / "bundles"

# Heading, and the beginnings of the names below it; the first group that fits takes a family.
GROUPS = {
    "Requests": (
        "unetpp_request",
        "unetpp_phase",
        "unetpp_refusals",
        "unetpp_cancellations",
        "unetpp_degraded",
        "unetpp_level_deficit",
    ),
    "Queue and batches": (
        "unetpp_queue",
        "unetpp_backlog",
        "unetpp_predicted",
        "unetpp_batch",
        "unetpp_pixels",
        "unetpp_windows",
    ),
    "Jobs": ("unetpp_jobs",),
    "Models and state": (
        "unetpp_model",
        "unetpp_engine",
        "unetpp_bundle",
        "unetpp_ready",
        "unetpp_stopping",
        "unetpp_reload",
    ),
    "Quality: calibrated": ("unetpp_calibrated",),
    "Quality: reference": ("unetpp_reference",),
    "Quality: agreement": ("unetpp_agreement",),
    "GPUs": ("unetpp_gpu",),
}

# Labels whose values are the same on every server.
CLOSED = ("outcome", "reason", "phase", "kind", "priority")

NOTES = {
    "Quality: calibrated": "What a level reached when the bundle was made, from the manifest.\n\n",
    "Quality: reference": "Masks as served against the references that requests and jobs brought.\n\n",
    "Quality: agreement": "Fast masks, degraded ones too, against our own accurate masks of the same inputs. "
    "This is not accuracy: both may be wrong.\n\n",
    "GPUs": "One series per GPU; absent where there is no GPU, or no `nvidia-ml-py` (extra `gpu`).\n\n",
}

INTRODUCTION = """\
`GET /metrics` gives these metric families in the text format of Prometheus, beside the client library's own
`process_…` and `python_…`. [Monitoring and alerts](../operate/monitoring.md) describes the rules, the dashboard and
the alerts that are made of them.

- Units are seconds, bytes, pixels and ratios. Names of counters end with `_total`; a histogram `NAME` has the series
  `NAME_bucket`, `NAME_sum` and `NAME_count`.
- Label values are closed sets: nothing that a caller sends becomes one. `model` is the bundle's name; `mode` and `level`
  are as served, `requested_level` as requested. Every counter exists, at 0, before the first request.

"""


def metrics() -> str:
    """The page of the metric families."""
    service = open_service(Settings(bundles=BUNDLES))
    service.metrics.register_models(model_info.describe(service.registry.deployments))
    families = [one for one in service.metrics.registry.collect() if one.name.startswith("unetpp_")]
    rows = {title: [_family(one) for one in families if _group(one.name) == title] for title in GROUPS}
    # They have no series on a machine without a GPU.
    rows["GPUs"] = [(f"`{name}`", "gauge", "`gpu`", text) for name, text in TEXTS.items()]
    parts = [
        f"## {title}\n\n{NOTES.get(title, '')}" + table(("metric", "type", "labels", "meaning"), lines)
        for title, lines in rows.items()
    ]
    return page("Metrics", INTRODUCTION, *parts)


def _group(name: str) -> str:
    return next(title for title, starts in GROUPS.items() if name.startswith(starts))


def _family(family: Metric) -> tuple[str, str, str, str]:
    """The name, type, labels with their closed sets of values, and help of a family."""
    name = f"{family.name}_total" if family.type == "counter" else family.name
    values: dict[str, list[str]] = {}
    for sample in family.samples:
        for label, value in sample.labels.items():
            if label != "le" and value not in values.setdefault(label, []):
                values[label].append(value)
    labels = (
        f"`{label}`: {codes(known)}" if label in CLOSED else f"`{label}`" for label, known in values.items()
    )
    return f"`{name}`", family.type, "; ".join(labels), family.documentation
