from collections.abc import Callable

import pytest
import typer

from server.cli_utils import report_errors
from server.errors import UnetppError


def test_report_errors_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def command(error: Exception) -> Callable[[], None]:
        def raises() -> None:
            raise error

        return report_errors(raises)

    for error in (UnetppError("wrong", value=1), OSError(28, "No space left")):
        with pytest.raises(typer.Exit):
            command(error)()
        assert capsys.readouterr().err == f"error: {error}\n"
    with pytest.raises(ModuleNotFoundError):
        command(ModuleNotFoundError(name="json_of_ours"))()
