import pytest

from server.app import make_segmenter
from server.errors import UnknownModel
from server.metrics import Metrics
from server.settings import Settings


def test_a_configured_default_model_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNETPP_DEFAULT_MODEL", "nuclie")
    with pytest.raises(UnknownModel, match=r"UNETPP_DEFAULT_MODEL=nuclie is not among the bundles: fake$"):
        make_segmenter(Settings(), fake_bundles(), Metrics())


def test_without_one_the_first_answers() -> None:
    segmenter = make_segmenter(Settings(), fake_bundles(), Metrics())
    assert segmenter.default == "fake"
    segmenter.close()
