"""What all tests of PACS share."""

import gc
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def forgotten_sockets() -> Iterator[None]:
    """Collects sockets that pynetdicom forgets where a connection fails, so that no other test is blamed."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
