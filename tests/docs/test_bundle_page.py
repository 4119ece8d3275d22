"""The page on the bundle format names every field of the manifest, each under the heading of its class, and no other."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from server.runtime import bundle, calibration, curve

PAGE = (Path(__file__).parents[2] / "docs" / "models" / "bundle.md").read_text()
CLASSES = [
    one
    for module in (bundle, calibration, curve)
    for one in vars(module).values()
    if isinstance(one, type)
    and issubclass(one, BaseModel)
    and one.__module__ == module.__name__
    # The base of all, and the base of `Calibration`, whose fields the page has there.
    and one not in (calibration.Part, calibration.Measured, curve._Part)
]


@pytest.mark.parametrize("model", CLASSES, ids=lambda one: one.__name__)
def test_table_has_the_fields_of_the_class(model: type[BaseModel]) -> None:
    [text] = re.findall(rf"^##+ {model.__name__}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(cells))) == sorted(model.model_fields)


def test_files_of_the_shipped_bundle_are_named() -> None:
    names = {path.name for path in Path(__file__).parents[2].glob("bundles/nuclei/*")}
    table = PAGE.partition("## Files")[2].partition("```")[0]
    kinds = {re.sub(r"^L\d", "L1", name) for name in names} - {"accurate.fp16.onnx", "accurate.int8.onnx"}
    assert {kind for kind in kinds if f"`{kind}`" not in table} == set()
