import tempfile
from pathlib import Path

import pytest

from server.errors import EngineUnavailable
from server.runtime.providers import PROVIDERS, choose
from server.runtime.selection import PRECISIONS

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"


@pytest.mark.parametrize("name", PROVIDERS)
def test_providers_every_row_can_run_fp32(name: str) -> None:
    row = PROVIDERS[name]
    assert row.execution_provider.endswith("ExecutionProvider")
    assert "fp32" in row.precisions
    assert set(row.precisions) <= set(PRECISIONS)


def test_providers_are_the_choices_of_the_setting() -> None:
    from typing import get_args

    from server.settings import RuntimeSettings

    assert set(get_args(RuntimeSettings.model_fields["provider"].annotation)) == {"auto", *PROVIDERS}


@pytest.mark.parametrize(
    ("available", "tried"),
    [
        ([CPU], ["cpu"]),
        ([CUDA, CPU], ["cuda", "cpu"]),
        ([CPU, TENSORRT, CUDA], ["cuda", "cpu"]),
        ([TENSORRT], []),
        (["AzureExecutionProvider", CPU], ["cpu"]),
        ([], []),
    ],
)
def test_choose_auto_tries_the_best_first(available: list[str], tried: list[str]) -> None:
    assert choose("auto", available) == tried


@pytest.mark.parametrize("name", PROVIDERS)
def test_choose_named_one_alone(name: str) -> None:
    assert choose(name, [CUDA, TENSORRT, CPU]) == [name]


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_choose_named_one_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(EngineUnavailable) as caught:
        choose(name, [CPU])
    assert caught.value.fields == {"provider": name, "allowed": ["cpu"]}


@pytest.mark.parametrize(
    ("precision", "switches"), [("fp32", set()), ("fp16", {"trt_fp16_enable"}), ("int8", {"trt_int8_enable"})]
)
def test_tensorrt_computes_in_the_precision_of_the_graph(precision: str, switches: set[str]) -> None:
    options = PROVIDERS["tensorrt"].options_for(precision)
    assert {name for name in options if name in ("trt_fp16_enable", "trt_int8_enable")} == switches
    assert options["trt_engine_cache_enable"]
    assert Path(options["trt_engine_cache_path"]).parent == Path(tempfile.gettempdir())


def test_options_of_a_precision_stay_with_it() -> None:
    before = dict(PROVIDERS["tensorrt"].options)
    PROVIDERS["tensorrt"].options_for("fp16")["more"] = 1
    assert PROVIDERS["tensorrt"].options == before
