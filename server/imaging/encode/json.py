"""Statistics and, by choice, the mask in base64: as the input, see `encode.like`."""

from typing import Any

from msgspec import json


def encode(report: dict[str, Any]) -> bytes:
    """UTF-8 JSON; a list of 30,000 objects takes a tenth of the standard library's time."""
    return json.encode(report)
