"""Requests made up from the OpenAPI description, valid and invalid: no error of the service, nothing undescribed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from serving import Known
from test_service_page import served

from ringmark.watermark.service.access import Caller
from ringmark.watermark.service.fetch import Fetcher
from ringmark.watermark.service.jobs import Jobs

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")
LEFT_OUT = [checks.positive_data_acceptance, checks.negative_data_rejection]
"""Bytes that are no picture fit the description and are refused; everything in a form is text, also what should not."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    access = Known(lab=Caller("lab", "p", None))
    with served(access=access, fetcher=Fetcher(), jobs=Jobs(tmp_path_factory.mktemp("jobs"))) as address:
        yield schemathesis.openapi.from_url(f"{address}openapi.json")


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_requests_from_the_description(described: schemathesis.BaseSchema, mode: str) -> None:
    for found in described.get_all_operations():

        @given(case=found.ok().as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
        @settings(max_examples=25, suppress_health_check=list(HealthCheck))
        def test(case: schemathesis.Case) -> None:
            case.call_and_validate(headers={"Authorization": "Bearer lab"}, excluded_checks=LEFT_OUT)

        try:
            test()
        except Unsatisfiable:
            assert mode == "NEGATIVE", "a route without parameters has no invalid request"
