"""Tables for people and for machines: markdown on the screen and beside the JSON."""

import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table; numbers are expected as formatted text."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def write(
    name: str,
    caption: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[object]],
    facts: Any,
    folder: Path = RESULTS,
) -> None:
    """Prints the table and writes FOLDER/NAME.md and FOLDER/NAME.json."""
    # Here, because it imports torch, whose CUDA libraries would get into the way of ONNX Runtime's.
    from export.calibrate import machine

    text = f"{caption}\n\nMeasured {datetime.now(UTC).date()} on {machine()}, Python {platform.python_version()}.\n\n"
    text += markdown(headings, rows)
    print(text)
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
