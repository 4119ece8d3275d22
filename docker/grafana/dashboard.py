"""Writes dashboards/unetpp.json: python docker/grafana/dashboard.py. A row is a table of panels, a panel says what it asks Prometheus.

Model and instance are chosen above. What the rules record is of all instances together.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries, xychart
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import StackingMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DataTransformerConfig,
    Panel,
    VariableOption,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.xychart import SeriesMapping, XYShowMode

FILE = Path(__file__).parent / "dashboards" / "unetpp.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="$source")

INSTANCE = 'instance=~"$instance"'
MODEL = 'model=~"$model"'
BOTH = f"{MODEL}, {INSTANCE}"
# Requests that were turned away, or were no images, before their model was known.
COUNTED = f'model=~"$model|none", {INSTANCE}'
WINDOW = "[$__rate_interval]"

Query = tuple[str, str]  # expression, legend
KINDS = {
    "calibrated": "What the bundle's manifest says: time of one image and IoU on labelled data, at the precision that `auto` serves.",
    "reference": "Median time of the last hour's requests, and IoU of those that brought a reference with it.",
    "agreement": "Median time of the last hour's requests, and IoU of fast answers with our own accurate ones. This is no accuracy.",
}


def rate(metric: str, by: str, where: str = BOTH) -> str:
    """Per second, summed over all other labels."""
    return f"sum by ({by}) (rate({metric}{{{where}}}{WINDOW}))"


def mean(metric: str, by: str, where: str = INSTANCE) -> str:
    """Of a histogram, over the window."""
    return f"{rate(f'{metric}_sum', by, where)} / {rate(f'{metric}_count', by, where)}"


def share(metric: str, some: str, where: str = BOTH) -> str:
    """Of a counter, that of some labels."""
    return f"sum(rate({metric}{{{where}, {some}}}{WINDOW})) / sum(rate({metric}{{{where}}}{WINDOW}))"


def quantile(q: float) -> str:
    """Of the time of requests, by model and mode."""
    return f"histogram_quantile({q}, {rate('unetpp_request_duration_seconds_bucket', 'model, mode, le')})"


def number(title: str, unit: str, expression: str, text: str = "", span: int = 6) -> stat.Panel:
    """The value now, over its course."""
    panel = stat.Panel().title(title).unit(unit).span(span).height(4).datasource(SOURCE).description(text)
    return panel.with_target(prometheus.Dataquery().expr(expression).ref_id("A"))


def lines(title: str, unit: str, *queries: Query, text: str = "", stacked: str = "", span: int = 8) -> timeseries.Panel:
    """Values over time; `stacked` is "normal" or "percent"."""
    panel = timeseries.Panel().title(title).unit(unit).span(span).height(8).min(0).datasource(SOURCE).description(text)
    panel.fill_opacity(60 if stacked else 5)
    panel.legend(common.VizLegendOptions().show_legend(True)).tooltip(common.VizTooltipOptions())
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode(stacked)))
    for letter, (expression, legend) in zip("ABCDEF", queries, strict=False):
        panel.with_target(prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(letter))
    return panel


def rows(title: str, names: tuple[str, ...], *expressions: str, text: str = "", span: int = 8) -> table.Panel:
    """Labels and values now; those of several expressions with the same labels stand side by side."""
    panel = table.Panel().title(title).span(span).height(8).filterable(True).datasource(SOURCE).description(text)
    for letter, expression in zip("ABCDEF", expressions, strict=False):
        panel.with_target(instant(expression, letter))
    return panel.transformations(joined(*names))


def scatter(kind: str) -> xychart.Panel:
    """Time against IoU, a point for each model, mode and level."""
    panel = xychart.Panel().title(f"Time against IoU: {kind}").span(8).height(9).datasource(SOURCE).description(KINDS[kind])
    for letter, pair in (("A", "seconds"), ("B", "iou")):
        expression = f'max by (model, mode, level) (unetpp:tradeoff_{pair}{{{MODEL}, kind="{kind}"}})'
        panel.with_target(instant(expression, letter))
    panel.transformations([
        *joined("seconds", "IoU"),
        DataTransformerConfig("partitionByValues", options={"fields": ["model", "mode", "level"], "naming": {"asLabels": True}}),
    ])  # fmt: skip
    axes = xychart.XYSeriesConfig().x(xychart.XychartXYSeriesConfigX().matcher(named("seconds")))
    panel.series([axes.y(xychart.XychartXYSeriesConfigY().matcher(named("IoU")))])
    panel.mapping(SeriesMapping.AUTO).show(XYShowMode.POINTS).point_size(xychart.XychartFieldConfigPointSize().fixed(10))
    return panel.legend(common.VizLegendOptions().show_legend(True)).tooltip(common.VizTooltipOptions())


def instant(expression: str, letter: str) -> prometheus.Dataquery:
    """The values now, as a table."""
    return prometheus.Dataquery().expr(expression).instant().format(PromQueryFormat.TABLE).ref_id(letter)


def joined(*names: str) -> list[DataTransformerConfig]:
    """Tables of several expressions become one; the columns of values are named."""
    columns = (
        {"Value": names[0]}
        if len(names) == 1
        else {f"Value #{letter}": name for letter, name in zip("ABCDEF", names, strict=False)}
    )
    return [
        DataTransformerConfig("merge", options={}),
        DataTransformerConfig("organize", options={"excludeByName": {"Time": True}, "renameByName": columns}),
    ]


def named(field: str) -> xychart.MatcherConfig:
    """Finds a column."""
    return xychart.MatcherConfig().id("byName").options(field)


ROWS: dict[str, Sequence[Builder[Panel]]] = {
    "Service level": [
        number("Requests", "reqps", f"sum(rate(unetpp_requests_total{{{COUNTED}}}{WINDOW}))"),
        number("Failed by our fault", "percentunit", share("unetpp_requests_total", 'outcome="error"', COUNTED), "Alert above 1 %."),
        number("Turned away", "percentunit", share("unetpp_requests_total", 'outcome="refused"', COUNTED), "Alert above 1 %."),
        number(
            "Shallower than asked for", "percentunit",
            f'sum(rate(unetpp_degraded_total{{{BOTH}}}{WINDOW})) / sum(rate(unetpp_requests_total{{{BOTH}, outcome="ok"}}{WINDOW}))',
            "Degraded for load or a deadline, where min_level allowed it. Alert above 20 %.",
        ),
        lines("Requests by outcome", "reqps", (rate("unetpp_requests_total", "outcome", COUNTED), "{{outcome}}"), stacked="normal"),
        lines(
            "Time by mode", "s", *((quantile(q), f"{{{{model}}}} {{{{mode}}}} p{q * 100:.0f}") for q in (0.5, 0.95, 0.99)),
            (f"unetpp:slo_seconds{{{MODEL}}}", "{{model}} {{mode}} service level of p99"),
            text="Answers that succeeded, by mode as served. Models of volumes have a service level only where rules.yml gives one.",
        ),
        lines(
            "Time by level", "s",
            (f"model_mode_level:unetpp_request_duration_seconds:p50_5m{{{MODEL}}}", "{{model}} {{mode}} L{{level}} p50"),
            (f"model_mode_level:unetpp_request_duration_seconds:p95_5m{{{MODEL}}}", "{{model}} {{mode}} L{{level}} p95"),
            (f"model_mode_level:unetpp_request_duration_seconds:p99_5m{{{MODEL}}}", "{{model}} {{mode}} L{{level}} p99"),
        ),
    ],
    "Levels": [
        lines(
            "Served by level", "reqps", (rate("unetpp_request_duration_seconds_count", "mode, level"), "{{mode}} L{{level}}"),
            stacked="percent", text="Share of each level in what was served.",
        ),
        rows(
            "Asked for, and served", ("answers",),
            f'sum by (mode, requested_level, served_level) (increase(unetpp_requests_total{{{BOTH}, outcome="ok"}}[$__range])) > 0',
            text="In the time shown above.",
        ),
        lines(
            "Degradations", "reqps",
            (rate("unetpp_degraded_total", "requested_level, served_level, reason"), "L{{requested_level}} → L{{served_level}}, {{reason}}"),
        ),
    ],
    "Quality": [
        *(scatter(kind) for kind in KINDS),
        lines(
            "Reference IoU", "percentunit",
            (f"model_mode_level:unetpp_reference_iou:mean_1h{{{MODEL}}}", "{{model}} {{mode}} L{{level}} mean"),
            text="Against the references that requests brought, mean over an hour.",
        ),
        lines(
            "Agreement IoU", "percentunit",
            (f"model_mode_level:unetpp_agreement_iou:mean_1h{{{MODEL}}}", "{{model}} L{{level}} mean"),
            (f"model_mode_level:unetpp_agreement_iou:p10_1h{{{MODEL}}}", "{{model}} L{{level}} worst tenth"),
            text="Of fast answers with our own accurate ones, over an hour. This is no accuracy.",
        ),
        lines(
            "Compared", "reqps",
            (rate("unetpp_agreement_samples_total", "outcome", INSTANCE), "agreement {{outcome}}"),
            (rate("unetpp_reference_samples_total", "outcome", INSTANCE), "reference {{outcome}}"),
            text="How much the two rest on. Where both masks are empty there is nothing to compare.",
        ),
        rows(
            "Calibrated, by precision", ("IoU", "Dice", "seconds"),
            *(
                f"max by (model, mode, level, precision, engine) (unetpp_calibrated_{what}{{{BOTH}}})"
                for what in ("iou", "dice", "latency_seconds")
            ),
            text="As the manifests say.", span=24,
        ),
    ],
    "Where the time goes": [
        lines("Mean time in each phase", "s", (mean("unetpp_phase_duration_seconds", "phase"), "{{phase}}"), stacked="normal"),
        lines(
            "Queue", "short", (f"sum by (urgency) (unetpp_queue_tiles{{{INSTANCE}}})", "{{urgency}}"),
            text="Tiles that wait for the device: of requests, and of jobs and samples.",
        ),
        lines("Oldest in the queue", "s", (f"max by (urgency) (unetpp_queue_oldest_seconds{{{INSTANCE}}})", "{{urgency}}")),
        lines("Tiles in a batch", "short", (mean("unetpp_batch_size_tiles", "graph"), "{{graph}}")),
        lines("Fill of a batch", "percentunit", (mean("unetpp_batch_fill_ratio", "graph"), "{{graph}}"), text="Tiles in a run, of those it may hold."),
        lines(
            "Wasted", "percentunit", (share("unetpp_pixels_total", 'kind="padding"', INSTANCE), "padding, of all pixels computed"),
            text="Windows at the border are padded.",
        ),
    ],
    "Capacity": [
        lines("GPU", "percentunit", (f"unetpp_gpu_utilization_ratio{{{INSTANCE}}}", "{{instance}} {{gpu}}"), text="Empty on CPU hosts."),
        lines(
            "GPU memory", "bytes", (f"unetpp_gpu_memory_used_bytes{{{INSTANCE}}}", "{{instance}} {{gpu}} used"),
            (f"unetpp_gpu_memory_total_bytes{{{INSTANCE}}}", "{{instance}} {{gpu}} total"), text="Empty on CPU hosts.",
        ),
        lines(
            "Process", "bytes", (f'process_resident_memory_bytes{{job="unetpp", {INSTANCE}}}', "{{instance}} memory"),
        ),
        lines(
            "Wait", "s", (f"unetpp_predicted_wait_seconds{{{INSTANCE}}}", "{{instance}} predicted for a newcomer"),
            (f"unetpp_backlog_seconds{{{INSTANCE}}}", "{{instance}} work admitted"),
        ),
        lines(
            "Work", "short", (f"unetpp_requests_in_flight{{{INSTANCE}}}", "{{instance}} requests in flight"),
            (f"unetpp_jobs_running{{{INSTANCE}}}", "{{instance}} jobs running"), (f"unetpp_jobs_queued{{{INSTANCE}}}", "{{instance}} jobs waiting"),
        ),
        lines(
            "Cores busy", "short", (f'rate(process_cpu_seconds_total{{job="unetpp", {INSTANCE}}}{WINDOW})', "{{instance}}"),
        ),
    ],
    "Health": [
        lines(
            "Ready", "short", (f"unetpp_ready{{{INSTANCE}}}", "{{instance}} ready"), (f"unetpp_stopping{{{INSTANCE}}}", "{{instance}} stopping"),
            (f'up{{job="unetpp", {INSTANCE}}}', "{{instance}} answers"),
        ),
        lines(
            "Turned away and given up", "reqps", (rate("unetpp_refusals_total", "reason", INSTANCE), "turned away: {{reason}}"),
            (rate("unetpp_cancellations_total", "reason", INSTANCE), "given up: {{reason}}"),
            (rate("unetpp_windows_dropped_total", "reason", INSTANCE), "windows dropped: {{reason}}"),
        ),
        lines(
            "Reloads", "short", (f"sum by (outcome) (increase(unetpp_reloads_total{{{INSTANCE}}}[1h]))", "{{outcome}}, in an hour"),
        ),
        rows("Alerts", ("firing",), 'max by (alertname, severity, instance, model, mode, level) (ALERTS{alertstate="firing"})'),
        rows(
            "Bundles", ("instances",), f"count by (model, dims, sha256) (unetpp_bundle_info{{{BOTH}}})",
            text="One row per model, else replicas serve different ones.",
        ),
        rows(
            "Engines", ("instances",), f'count by (model, graph, precision, engine, provider) (unetpp_engine_info{{{BOTH}, auto="true"}})',
            text="What serves requests that name no precision.",
        ),
    ],
}  # fmt: skip


def choice(name: str, labels: str) -> dashboard.QueryVariable:
    """A list of label values, or all."""
    everything = VariableOption(text="All", value="$__all")
    variable = dashboard.QueryVariable(name).query(f"label_values({labels}, {name})").datasource(SOURCE).current(everything)
    return variable.multi(True).include_all(True).all_value(".*").refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)


def build() -> dashboard.Dashboard:
    """The dashboard."""
    built = (
        dashboard.Dashboard("UNet++ server").uid("unetpp").tags(["unetpp"]).refresh("30s").time("now-1h", "now").timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR).description("What each level costs, and what it gives.")
        .with_variable(dashboard.DatasourceVariable("source").label("data source").type("prometheus"))
        .with_variable(choice("model", "unetpp_bundle_info"))
        .with_variable(choice("instance", 'up{job="unetpp"}'))
    )  # fmt: skip
    for title, panels in ROWS.items():
        built.with_row(dashboard.Row(title))
        for panel in panels:
            built.with_panel(panel)
    return built


def text() -> str:
    """The file's content; panels are numbered as they stand."""
    document = build().build()
    for number_, panel in enumerate(document.panels or [], 1):
        panel.id_val = number_
    return json.dumps(document, cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
