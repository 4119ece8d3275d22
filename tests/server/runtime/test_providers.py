import pytest

from server.errors import EngineUnavailable
from server.runtime.opening import PRECISIONS
from server.runtime.providers import PROVIDERS, choose

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"


@pytest.mark.parametrize("name", PROVIDERS)
def test_every_row(name: str) -> None:
    row = PROVIDERS[name]
    assert row.execution_provider.endswith("ExecutionProvider")
    assert "fp32" in row.precisions
    assert set(row.precisions) <= set(PRECISIONS)


def test_rows_are_the_settings_choices() -> None:
    from typing import get_args

    from server.settings import RuntimeSettings

    assert set(get_args(RuntimeSettings.model_fields["provider"].annotation)) == {"auto", *PROVIDERS}


@pytest.mark.parametrize(
    ("available", "tried"),
    [
        ([CPU], ["cpu"]),
        ([CUDA, CPU], ["cuda", "cpu"]),
        ([CPU, TENSORRT, CUDA], ["tensorrt", "cuda", "cpu"]),
        (["AzureExecutionProvider", CPU], ["cpu"]),
        ([], []),
    ],
)
def test_auto_tries_the_best_first(available: list[str], tried: list[str]) -> None:
    assert choose("auto", available) == tried


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_named_one_alone(name: str) -> None:
    assert choose(name, [CUDA, TENSORRT, CPU]) == [name]


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_a_named_one_that_is_not_there(name: str) -> None:
    with pytest.raises(EngineUnavailable, match=r"it has: cpu.*pip install 'unetpp-server\[gpu\]'"):
        choose(name, [CPU])
