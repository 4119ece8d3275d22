"""The drawing of the dashboard: each row is in one picture, and each kind of panel is drawn from series and without any."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench.dashboard_panels import draw, format_value, read_rows
from bench.dashboard_picture import PICTURES

LABELS = {"model": "nuclei", "mode": "fast", "level": "3", "outcome": "ok", "phase": "infer"}


def test_each_row_of_the_dashboard_is_in_one_picture() -> None:
    assert [row.title for row in read_rows()] == [title for rows in PICTURES.values() for title in rows]


@pytest.mark.parametrize("has_data", [True, False])
def test_all_panels_are_drawn_from_their_own_expressions(tmp_path: Path, has_data: bool) -> None:
    rows = read_rows()
    evaluated: list[tuple[str, bool]] = []

    def query(expression: str, *, instant: bool) -> list[dict[str, Any]]:
        evaluated.append((expression, instant))
        at = 1_700_000_000.0
        value = {"value": [at, "0.5"]} if instant else {"values": [[at, "0.5"], [at + 60, "NaN"]]}
        return [{"metric": LABELS, **value}] if has_data else []

    draw(tmp_path / "dashboard.png", rows, query)
    targets = [target["expr"] for row in rows for panel in row.panels for target in panel["targets"]]
    assert [expression for expression, _ in evaluated] == targets
    with Image.open(tmp_path / "dashboard.png") as picture:
        assert picture.height > picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 2


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0205, "s", "20.5 ms"),
        (2.5, "s", "2.5 s"),
        (0.25, "percentunit", "25 %"),
        (3 << 29, "bytes", "1.5 GiB"),
    ],
)
def test_values_have_short_units(value: float, unit: str, text: str) -> None:
    assert format_value(value, unit) == text
