import pytest

from server.errors import UnknownModel
from server.service import open_service
from server.settings import Settings
from tests.support.service import fake_deployment, fake_service


def test_open_service_without_the_configured_default_model_is_refused() -> None:
    with pytest.raises(UnknownModel) as caught:
        open_service(Settings(default_model="nuclie"), {"fake": fake_deployment()})
    assert caught.value.fields == {"setting": "UNETPP_DEFAULT_MODEL", "value": "nuclie", "allowed": ["fake"]}


def test_open_service_without_a_configured_default_takes_the_first() -> None:
    service = fake_service()
    assert service.registry.default == "fake"
    service.close()
