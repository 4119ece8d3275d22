import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from server.settings import OLD_SETTINGS, SETTINGS, Settings, markdown_table, unknown_variables


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("UNETPP_")]:  # noqa: TID251 - to empty it
        monkeypatch.delenv(name)


def test_settings_without_environment_are_safe() -> None:
    settings = Settings()
    assert (settings.http.host, settings.auth.insecure) == ("127.0.0.1", False)


def test_settings_read_the_environment_and_keep_the_rest_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    default = Settings()
    for name, value in {
        "BUNDLES": "/srv/bundles",
        "HTTP__PORT": "9000",
        "RUNTIME__PRECISION": "int8",
    }.items():
        monkeypatch.setenv(f"UNETPP_{name}", value)
    settings = Settings()
    assert settings.bundles == Path("/srv/bundles")
    assert settings.http == default.http.model_copy(update={"port": 9000})
    assert settings.runtime == default.runtime.model_copy(update={"precision": "int8"})
    assert unknown_variables() == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP__PORT", "0"),
        ("HTTP__PORT", "http"),
        ("RUNTIME__ENGINE", "torch"),
        ("RUNTIME__PRECISION", "fp8"),
        ("RUNTIME__THREADS", "-1"),
        ("LIMITS__MAX_PIXELS", "-5"),
        ("LIMITS__UNKNOWN", "5"),
    ],
)
def test_settings_refuse_a_value_out_of_bounds(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"UNETPP_{name}", value)
    with pytest.raises(ValidationError):
        Settings()


def test_settings_are_frozen() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.default_model = "x"
    with pytest.raises(ValidationError):
        settings.http.port = 1


@pytest.mark.parametrize("name", ["UNETPP_HTTP__PROT", "UNETPP_HTPP__PORT", "unetpp_bundle", "UNETPP_HTTP"])
def test_unknown_variables_names_what_does_not_exist(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "{}")
    assert unknown_variables() == [f"{name.upper()} does not exist"]


@pytest.mark.parametrize("name", sorted(OLD_SETTINGS))
def test_unknown_variables_says_what_became_of_an_old_setting(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    assert unknown_variables() == [f"{name} {OLD_SETTINGS[name]}"]
    assert "(" in OLD_SETTINGS[name] or "UNETPP_" in OLD_SETTINGS[name]


def test_constants_are_taken_by_constructors_and_are_no_settings() -> None:
    assert Settings(limits={"head_s": 0.5}).limits.head_s == 0.5  # type: ignore[arg-type]
    assert "UNETPP_LIMITS__HEAD_S" not in SETTINGS
    assert OLD_SETTINGS["UNETPP_LIMITS__HEAD_S"] == "is a constant now (10)"


def test_markdown_table_has_a_row_per_setting_and_no_folder_of_this_machine() -> None:
    rows = [line for line in markdown_table().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(SETTINGS)
    assert all(len(row.strip("| ").split(" | ")) == 3 for row in rows)
    assert not [
        row for row in rows if "PydanticUndefined" in row or "None" in row or str(Path.home()) + "/" in row
    ]


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("UNETPP_SERVICE_HOST", False),
        ("UNETPP_PORT_8000_TCP_ADDR", False),
        ("UNETPP_SERVER_SERVICE_PORT", False),
        ("UNETPP_SERVER_PORT", False),
        ("UNETPP_HTTP__PROT", True),
        ("UNETPP_HTTP_PORT", True),
    ],
)
def test_unknown_variables_leave_out_those_that_kubernetes_sets_for_a_service(
    name: str, listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "8000" if listed or name.endswith("SERVICE_PORT") else "tcp://10.0.0.1:8000")
    assert bool(unknown_variables()) is listed
