"""What the pages of the manual name exists: commands, settings, metrics, formats; and the site loads nothing from other hosts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
ALL = "\n".join(PAGES.values())


def page(name: str) -> str:
    """Text of a page of docs/."""
    return PAGES[f"docs/{name}"]


def test_no_page_is_empty() -> None:
    assert [name for name, text in PAGES.items() if len(text.splitlines()) < 5] == []


def test_commands_exist() -> None:
    from server.cli import app

    known = {one.name or (one.callback and one.callback.__name__) for one in app.registered_commands}
    named = set(re.findall(r"(?:\.venv/bin/|`)unetpp ([a-z][\w-]*)", ALL))
    assert named
    assert named - known == set()


def test_commands_need_no_activated_environment() -> None:
    """Code blocks name `.venv/bin/unetpp`; in containers it is on the path."""
    lines = [
        line
        for text in PAGES.values()
        for block in re.findall(r"^```(?:sh|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    assert lines
    assert [
        line for line in lines if re.search(r"(?<![\w/.-])unetpp [a-z]", line) and "docker" not in line
    ] == []


def test_settings_exist() -> None:
    from server.settings import markdown_table

    table = set(re.findall(r"`(UNETPP_\w+)`", markdown_table()))
    # Without `{`: groups of settings. The page that shows what a misspelt setting is answered with names one.
    named = set(re.findall(r"\bUNETPP_[A-Z_]+[A-Z]\b(?!__|=\{)", ALL)) - {"UNETPP_HTTP__PROT"}
    assert named - table == set()


def test_metrics_exist() -> None:
    from server.metrics import Metrics
    from server.metrics_gpu import TEXTS

    families = {
        f"{one.name}_total" if one.type == "counter" else one.name for one in Metrics().registry.collect()
    }
    known = {name for name in families | set(TEXTS) if name.startswith("unetpp_")}
    # Whole names in backticks, without the suffixes that Prometheus adds to histograms.
    named = {
        re.sub(r"_(bucket|sum|count|created)$", "", name) for name in re.findall(r"`(unetpp_\w+)[`{]", ALL)
    }
    assert named
    assert named - known == set()


def test_formats_are_complete() -> None:
    from server.imaging.encode import ENCODERS, FAMILIES

    assert {*FAMILIES, *ENCODERS} - set(re.findall(r"`([\w.]+)`", page("guides/formats.md"))) == set()


def test_alerts_are_complete() -> None:
    rules = (ROOT / "docker" / "prometheus" / "alerts.yml").read_text()
    alerts = set(re.findall(r"alert: (\w+)", rules))
    assert alerts
    assert alerts - set(re.findall(r"`(Unetpp\w+)`", page("operate/monitoring.md"))) == set()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manual, built strictly."""
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}  # noqa: TID251 - of a child process
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_site_loads_nothing_from_other_hosts(site: Path) -> None:
    loads = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(https?:)?//|<link\b[^>]*\brel=\"?(?:stylesheet|preconnect)\"?[^>]*href=\"?(https?:)?//"
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    assert [one.name for one in pages if loads.search(one.read_text())] == []
    assert [
        one.name for one in site.rglob("*.css") if re.search(r"url\(\"?(https?:)?//", one.read_text())
    ] == []


def test_pictures_of_the_site_exist(site: Path) -> None:
    missing = [
        (str(one.relative_to(site)), source)
        for one in site.rglob("*.html")
        for source in re.findall(r"<img\b[^>]*\bsrc=\"?([^\" >]+)", one.read_text())
        if not source.startswith("data:") and not (one.parent / source).resolve().is_file()
    ]
    assert missing == []
