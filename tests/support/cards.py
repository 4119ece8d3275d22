"""Cards of foreign networks."""

import json
from pathlib import Path
from typing import Any

from export.card import Card

COLORS = ("#ff7f0e", "#1f77b4", "#2ca02c")


def fields(**changes: Any) -> dict[str, Any]:
    """The fields of a card of a network for colour images with one class.

    Args:
        changes: other fields; None removes one, and a number of channels or classes stands for so many.
    """
    dims = 3 if changes.get("dims") == 3 else 2
    for name, default in (("channels", 3), ("classes", 1)):
        count = changes.get(name, default)
        if isinstance(count, int):
            made = (
                [f"channel {k}" for k in range(count)]
                if name == "channels"
                else [{"value": k + 1, "name": f"class {k}", "color": COLORS[k]} for k in range(count)]
            )
            changes = changes | {name: made}
    card = {
        "name": "mine",
        "title": "Mine",
        "description": "A network.",
        "intended_use": "Tests.",
        "dims": dims,
        "activation": "sigmoid" if len(changes["classes"]) == 1 else "softmax",
        "input": {"normalization": "zscore"},
        "window": {"size": [32] * dims, "overlap": 0.25},
        "license": {"weights": "MIT"},
        "provenance": {"data": "none"},
    }
    card |= {"orientation": "RAS"} if dims == 3 else {}
    return {name: value for name, value in (card | changes).items() if value is not None}


def make_card(**changes: Any) -> Card:
    """A card."""
    return Card.model_validate(fields(**changes))


def write_card(path: Path, **changes: Any) -> Path:
    """Writes a card as a person would."""
    card = fields(**changes)
    tables = {name: value for name, value in card.items() if isinstance(value, dict)}
    lines = [
        f"{name} = {json.dumps(value)}" for name, value in card.items() if name not in (*tables, "classes")
    ]
    for one in card.get("classes", []):
        lines += ["", "[[classes]]", *(f"{name} = {json.dumps(value)}" for name, value in one.items())]
    for table, values in tables.items():
        lines += ["", f"[{table}]", *(f"{name} = {json.dumps(value)}" for name, value in values.items())]
    path.write_text("\n".join(lines) + "\n")
    return path
