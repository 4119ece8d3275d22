import inspect
from typing import Any

import pytest
from fastapi import FastAPI

from client import cli
from client.options import OPTIONS, with_options
from tests.client.conftest import done


def test_are_the_parameters_of_the_server(app: FastAPI) -> None:
    parameters = {p["name"] for p in app.openapi()["paths"]["/segment"]["post"]["parameters"]}
    assert {option.name for option in OPTIONS} == parameters


def test_both_commands_have_them() -> None:
    names = {option.name for option in OPTIONS}
    assert names <= inspect.signature(cli.segment).parameters.keys()
    assert names - set(cli.COMPARED) <= inspect.signature(cli.compare).parameters.keys()
    assert not set(cli.COMPARED) & inspect.signature(cli.compare).parameters.keys()


def test_only_what_is_given_arrives() -> None:
    def command(path: str, *, asked: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return path, asked

    spelled = with_options(command)
    given = dict.fromkeys(option.name for option in OPTIONS) | {"level": 2, "include_mask": False}
    assert spelled(path="x", **given) == ("x", {"level": 2, "include_mask": False})


def test_help_says_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich takes words in brackets for markup."""
    monkeypatch.setenv("COLUMNS", "300")
    said = " ".join(done("segment", "--help").split())
    for option in OPTIONS:
        assert f"--{option.name.replace('_', '-')} " in said
        assert option.help in said
    assert "(beside each input)" in said
