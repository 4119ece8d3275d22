"""Writes the generated pages of the manual; tests/docs/test_reference.py fails where one is stale.

python -m tools.reference
"""

from collections.abc import Callable
from pathlib import Path

from bench import summaries
from tools.reference_cli import cli, settings
from tools.reference_errors import error_codes
from tools.reference_http import http, parameters
from tools.reference_metrics import metrics
from tools.reference_models import hippocampus, nuclei

ROOT = Path(__file__).parents[1]

PAGES: dict[str, Callable[[], str]] = {
    "bench/results/images_sizes.md": summaries.images,
    "bench/results/levels_summary.md": summaries.levels,
    "docs/models/hippocampus.md": hippocampus,
    "docs/models/nuclei.md": nuclei,
    "docs/reference/cli.md": cli,
    "docs/reference/errors.md": error_codes,
    "docs/reference/http.md": http,
    "docs/reference/metrics.md": metrics,
    "docs/reference/parameters.md": parameters,
    "docs/reference/settings.md": settings,
}


def main() -> None:
    """Writes every page."""
    for path, make in PAGES.items():
        (ROOT / path).write_text(make())


if __name__ == "__main__":
    main()
