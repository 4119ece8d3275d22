"""What the OpenAPI document promises, asked for at random by schemathesis, of a real server."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks

from tests.support.server import full_server

# Derandomized: what it comes upon once shall not come and go.
profile = settings(
    max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)  # fmt: skip

# A schema cannot say that a parameter suits a volume and not an image.
UNFIT = [checks.positive_data_acceptance]


# Threads of the server's libraries may draw while a strategy does.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
def test_is_kept() -> None:
    failed: list[str] = []
    with full_server() as opened:
        operations = [
            found.ok()
            for found in schemathesis.openapi.from_url(
                f"{opened.client.base_url}/openapi.json"
            ).get_all_operations()
        ]
        for operation in operations:

            @profile
            @given(operation.as_strategy())
            def ask(case: schemathesis.Case) -> None:
                case.call_and_validate(timeout=60, excluded_checks=UNFIT)

            try:
                ask()
            except FailureGroup as error:
                failed.append(f"{operation.label}\n{error.exceptions}")
    assert len(operations) >= 10
    assert not failed, "\n\n".join(failed)
