"""Statistics and, by choice, the mask as base64 PNG."""

import json
from typing import Any


def encode(report: dict[str, Any]) -> bytes:
    """UTF-8 JSON."""
    return json.dumps(report, ensure_ascii=False, allow_nan=False).encode()
