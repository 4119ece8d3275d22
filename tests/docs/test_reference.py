"""The generated pages of the manual are those of the code."""

import re

import pytest

from server.api.routes.errors import entries
from server.api.routes.job_requests import EXCLUDED, JobOptions
from server.metrics import Metrics
from server.metrics_gpu import TEXTS
from server.segment.request import SegmentParams
from server.settings import SETTINGS
from tests.conftest import ROOT
from tools.markdown import REFRESH
from tools.reference import PAGES
from tools.reference_errors import EXAMPLES
from tools.reference_http import GROUPS


def anchors(path: str) -> list[str]:
    text = (ROOT / path).read_text()
    return re.findall(r'<a id="([^"]+)">', text) + re.findall(r"\{ #([\w-]+) \}", text)


@pytest.mark.parametrize("path", PAGES)
def test_page_is_up_to_date(path: str) -> None:
    assert (ROOT / path).read_text() == PAGES[path](), f"{path} is stale; run: {REFRESH}"


def test_every_page_of_the_reference_says_that_it_is_generated() -> None:
    pages = [path for path in PAGES if path.startswith("docs/")]
    assert all(REFRESH in (ROOT / path).read_text().partition("\n")[0] for path in pages)


def test_every_code_has_an_entry_and_an_example() -> None:
    codes = [entry.code for entry in entries()]
    assert sorted(anchors("docs/reference/errors.md")) == sorted(codes) == sorted(EXAMPLES)


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_has_only_members_of_the_entry(code: str) -> None:
    (entry,) = (one for one in entries() if one.code == code)
    if code != "reload-failed":  # whose members are those of the cause
        assert set(EXAMPLES[code]) - {"detail"} <= set(entry.fields.split(", "))


def test_every_parameter_is_described_once() -> None:
    assert sorted(name for group in GROUPS.values() for name in group) == sorted(SegmentParams.model_fields)
    assert set(SegmentParams.model_fields) | set(JobOptions.model_fields) == set(
        anchors("docs/reference/parameters.md")
    )
    page = (ROOT / "docs/reference/parameters.md").read_text()
    assert all(f"`{name}`" in page.partition("## Routes")[2] for name in EXCLUDED)


def test_every_setting_is_in_the_tables() -> None:
    assert anchors("docs/reference/settings.md") == [name.lower() for name in SETTINGS]


def test_every_metric_is_in_the_tables() -> None:
    page = (ROOT / "docs/reference/metrics.md").read_text()
    families = [
        f"{one.name}_total" if one.type == "counter" else one.name
        for one in Metrics().registry.collect()
        if one.name.startswith("unetpp_")
    ]
    assert sorted(re.findall(r"^\| `(unetpp_\w+)`", page, re.MULTILINE)) == sorted([*families, *TEXTS])


def test_pages_do_not_depend_on_the_width_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = []
    for columns in ("40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        pages.append(PAGES["docs/reference/cli.md"]())
    assert pages[0] == pages[1]
