"""Fixtures of the server's rooms."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def copied_bundle(shipped_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the shipped bundle that a test may damage."""
    return Path(shutil.copytree(shipped_bundle, tmp_path / "nuclei"))


@pytest.fixture
def problem() -> Callable[..., SimpleNamespace]:
    """Checks that a response is a problem document of the contract, and gives its fields."""

    def checked(response: Any, status: int, code: str | None = None) -> SimpleNamespace:
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/problem+json"
        assert response.headers["x-request-id"]
        document = response.json()
        assert document.keys() >= {"type", "title", "status", "code", "detail"}
        assert document["status"] == status
        assert document["type"] == f"/errors#{document['code']}"
        assert document["title"]
        assert document["detail"]
        if code:
            assert document["code"] == code
        return SimpleNamespace(**document)

    return checked
