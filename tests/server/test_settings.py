import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from server.settings import Settings, markdown_table


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("UNETPP_")]:  # noqa: TID251 - to empty it
        monkeypatch.delenv(name)


def test_defaults_are_safe() -> None:
    settings = Settings()
    assert settings.http.host == "127.0.0.1"
    assert settings.bundles == Path("bundles")
    assert settings.default_model == "nuclei"
    assert settings.runtime.precision == "auto"


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNETPP_BUNDLES", "/srv/bundles")
    monkeypatch.setenv("UNETPP_BATCHING__MAX_BATCH", "32")
    monkeypatch.setenv("UNETPP_RUNTIME__PRECISION", "int8")
    settings = Settings()
    assert settings.bundles == Path("/srv/bundles")
    assert settings.batching.max_batch == 32
    assert settings.runtime.precision == "int8"


def test_one_value_of_a_group_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    default = Settings().http
    monkeypatch.setenv("UNETPP_HTTP__PORT", "9000")
    assert Settings().http == default.model_copy(update={"port": 9000})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("UNETPP_HTTP__PORT", "0"), ("UNETPP_HTTP__PORT", "http"), ("UNETPP_BATCHING__MAX_BATCH", "0"),
        ("UNETPP_RUNTIME__ENGINE", "torch"), ("UNETPP_RUNTIME__PRECISION", "fp8"), ("UNETPP_RUNTIME__THREADS", "-1"),
        ("UNETPP_LIMITS__MAX_PIXELS", "-5"), ("UNETPP_LIMITS__UNKNOWN", "5"),
    ],
)  # fmt: skip
def test_bad_values(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError):
        Settings()


def test_frozen() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.default_model = "x"
    with pytest.raises(ValidationError):
        settings.http.port = 1


def test_the_table_has_a_row_per_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    table = markdown_table()
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    names = [row.split("`")[1] for row in rows]
    wanted = []
    for key, value in Settings():
        wanted += (
            [f"UNETPP_{key}__{inner}".upper() for inner, _ in value]
            if hasattr(value, "model_fields_set")
            else [f"UNETPP_{key.upper()}"]
        )
    assert names == wanted
    assert all(len(row.strip("| ").split(" | ")) == 3 for row in rows)
    assert all("PydanticUndefined" not in row and "None" not in row for row in rows)
    monkeypatch.setenv("UNETPP_HTTP__MAX_IN_FLIGHT", "3")  # names of the table are the names that work
    assert "UNETPP_HTTP__MAX_IN_FLIGHT" in names
    assert Settings().http.max_in_flight == 3
