"""The client's dictionaries have the keys that the server sends."""

from typing import Any, get_type_hints

import numpy as np
import pytest
from pydantic import BaseModel

from client import documents
from client.local import Local
from server.api import schemas
from server.runtime.bundle import Class
from tests.support.files import nifti_bytes, pages_bytes, picture_bytes

VOXELS = np.random.default_rng(0).integers(0, 256, (6, 20, 18), dtype=np.uint8)


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (documents.ModelSummary, schemas.ModelSummary),
        (documents.ModelCard, schemas.ModelCard),
        (documents.Serving, schemas.Serving),
        (documents.Class, Class),
        (documents.JobDocument, schemas.JobDocument),
        (documents.Windows, schemas.Windows),
    ],
)
def test_keys(here: type, there: type[BaseModel]) -> None:
    assert set(get_type_hints(here)) == set(there.model_fields)


@pytest.mark.parametrize(
    "data", [picture_bytes(VOXELS[0]), pages_bytes(VOXELS), nifti_bytes(VOXELS)], ids=["image", "stack", "volume"]
)
@pytest.mark.parametrize("asked", [{}, {"instances": True}, {"min_size_px": 2, "level": 1}])
def test_statistics(fakes: Any, data: bytes, asked: dict[str, Any]) -> None:
    fakes()
    with Local() as local:
        reference = next(iter(local.segment(data, formats="mask").files.values()))
        found = local.segment(data, formats="json", include_mask=True, reference=reference, **asked).statistics
    fits(found, documents.Statistics)
    assert sum(key.startswith("mask_") for key in found) == 1
    assert found["objects"]
    for one in found["objects"]:
        fits(one, documents.Object)
    for each in found["classes"]:
        fits(each, documents.ClassStatistics)


def fits(document: Any, kind: Any) -> None:
    assert kind.__required_keys__ <= set(document) <= set(get_type_hints(kind))
