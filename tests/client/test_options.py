from typing import Any

import pytest

from client import cli
from client.options import parameter_options, with_options
from server.segment.request import SegmentParams
from tests.client.conftest import run


def test_every_parameter_of_the_request_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    help_ = {command: run(command, "--help").stdout for command in ("segment", "compare")}
    for name, field in SegmentParams.model_fields.items():
        flag = f"--{name.replace('_', '-')} "
        assert flag in help_["segment"]
        assert field.description in help_["segment"]
        assert (flag in help_["compare"]) is (name not in cli.CHOSEN)


def test_only_given_options_arrive() -> None:
    def command(path: str, *, parameters: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return path, parameters

    expanded = with_options(parameters=parameter_options())(command)
    values = dict.fromkeys(SegmentParams.model_fields) | {"level": 2, "include_mask": False}
    assert expanded(path="x", **values) == ("x", {"level": 2, "include_mask": False})
