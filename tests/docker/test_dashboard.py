"""The dashboard is what its script writes, what Grafana's own library reads, and asks for what there is."""

import json
import re

import pytest

from tests.docker.conftest import DASHBOARD, dashboard_expressions, live_names, names_in, panels, script

ROWS = ["Service level", "Levels", "Quality", "Where the time goes", "Capacity", "Health"]


def test_file_is_what_the_script_writes() -> None:
    assert DASHBOARD.read_text() == script("grafana/dashboard.py").text(), "run: python docker/grafana/dashboard.py"


def test_round_trip_through_the_library_loses_nothing() -> None:
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    document = json.loads(DASHBOARD.read_text())
    assert json.loads(json.dumps(Dashboard.from_json(document), cls=JSONEncoder)) == document


def test_rows_are_in_their_order() -> None:
    assert [panel["title"] for panel in panels() if panel["type"] == "row"] == ROWS


def test_panels_lie_side_by_side_and_have_numbers_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not taken & cells, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    numbers = [panel["id"] for panel in panels()]
    assert len(set(numbers)) == len(numbers)
    # No gaps between panels.
    assert len(taken) == 24 * (max(y for _, y in taken) + 1)


def test_model_and_instance_can_be_chosen() -> None:
    variables = {variable["name"]: variable for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]}
    assert variables.keys() == {"source", "model", "instance"}
    assert variables["model"]["allValue"] == variables["instance"]["allValue"] == ".*"


@pytest.mark.parametrize(("title", "expression"), dashboard_expressions())
def test_expression_parses_and_selects_series_that_exist(title: str, expression: str) -> None:
    assert "$" not in expression
    assert names_in(expression) <= live_names()


def test_requests_without_a_model_are_counted_whichever_is_chosen() -> None:
    """Those turned away before their model was known have model="none"; what succeeded has one."""
    asked = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    selected = [one for expression in asked for one in re.findall(r"unetpp_requests_total\{(.*?)\}", expression)]
    assert len(selected) >= 6
    assert [one for one in selected if 'model=~"$model|none"' not in one and 'outcome="ok"' not in one] == []


def test_time_against_iou_is_one_plot_per_kind() -> None:
    plots = [panel for panel in panels() if panel["type"] == "xychart"]
    assert [plot["title"].rsplit(" ", 1)[1] for plot in plots] == ["calibrated", "reference", "agreement"]
    for plot in plots:
        assert all(target["instant"] and target["format"] == "table" for target in plot["targets"])
        (axes,) = plot["options"]["series"]
        renamed = next(step for step in plot["transformations"] if step["id"] == "organize")["options"]["renameByName"]
        assert {axes["x"]["matcher"]["options"], axes["y"]["matcher"]["options"]} == set(renamed.values())
        # `merge` joins rows whose labels are all the same, so both queries give those three and no name.
        assert all(target["expr"].startswith("max by (model, mode, level) (unetpp:tradeoff_") for target in plot["targets"])
