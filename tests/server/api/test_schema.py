"""The promises of the OpenAPI document, tried at random by schemathesis on a real server."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks

from tests.support.server import full_server

# Derandomized, so that what it comes upon once does not come and go.
profile = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)

# A schema cannot say that a parameter suits a volume and not an image.
EXCLUDED = [checks.positive_data_acceptance]

# A deadline of almost nothing passes; other statuses above 500 are faults.
DEADLINE_PASSED = 504


# Threads of the server's libraries may draw while a strategy does.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
def test_schema_is_kept() -> None:
    failed: list[str] = []
    with full_server() as opened:
        schema = schemathesis.openapi.from_url(f"{opened.client.base_url}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        for operation in operations:

            @profile
            @given(operation.as_strategy())
            def call(case: schemathesis.Case) -> None:
                response = case.call(timeout=60)
                if response.status_code != DEADLINE_PASSED:
                    case.validate_response(response, excluded_checks=EXCLUDED)

            try:
                call()
            except FailureGroup as error:
                failed.append(f"{operation.label}\n{error.exceptions}")
    assert len(operations) >= 10
    assert not failed, "\n\n".join(failed)
