"""The dashboard selects series that exist, and its panels fill the grid."""

import re
from typing import Any

import pytest

from tests.docker.conftest import dashboard, dashboard_expressions, live_names, selected_names


def panels() -> list[dict[str, Any]]:
    documents: list[dict[str, Any]] = dashboard()["panels"]
    return documents


@pytest.mark.parametrize("expression", dashboard_expressions())
def test_expression_selects_series_that_exist(expression: str) -> None:
    assert "$" not in expression
    assert selected_names(expression) <= live_names()


def test_panels_have_unique_ids_and_fill_the_grid_without_overlap() -> None:
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in panels())
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(cells)) == len(cells) == 24 * (max(y for _, y in cells) + 1)
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_variables_select_source_model_and_instance() -> None:
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    assert variables.keys() == {"source", "model", "instance"}
    assert variables["model"]["allValue"] == variables["instance"]["allValue"] == ".*"
    assert {panel["datasource"]["uid"] for panel in panels() if panel["type"] != "row"} == {"$source"}


def test_requests_refused_before_their_model_was_known_are_counted_for_every_selection() -> None:
    expressions = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    selectors = [
        one for expression in expressions for one in re.findall(r"unetpp_requests_total\{(.*?)\}", expression)
    ]
    assert len(selectors) >= 6
    assert [one for one in selectors if 'model=~"$model|none"' not in one and 'outcome="ok"' not in one] == []


def test_time_against_iou_joins_both_queries_into_one_plot_per_kind() -> None:
    plots = [panel for panel in panels() if panel["type"] == "xychart"]
    assert [plot["title"].rsplit(" ", 1)[1] for plot in plots] == ["calibrated", "reference", "agreement"]
    for plot in plots:
        # `merge` joins rows whose labels are all equal, so both queries keep these three labels only.
        assert all(
            target["expr"].startswith("max by (model, mode, level) (unetpp:tradeoff_")
            for target in plot["targets"]
        )
        assert all(target["instant"] and target["format"] == "table" for target in plot["targets"])
        (axes,) = plot["options"]["series"]
        renamed = next(step for step in plot["transformations"] if step["id"] == "organize")["options"][
            "renameByName"
        ]
        assert {axes["x"]["matcher"]["options"], axes["y"]["matcher"]["options"]} == set(renamed.values())
