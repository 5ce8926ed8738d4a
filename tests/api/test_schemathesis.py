"""Requests that a fuzzer makes from our own OpenAPI page: none is answered with a 5xx, and answers are as it says."""

from __future__ import annotations

from collections.abc import Callable

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case
from schemathesis.generation import GenerationMode

from atom_cluster.api.protection.access import ACCESS_BY_ROUTE
from atom_cluster.api.text.tokenizer import Tokenizer
from tests.api.conftest import Api
from tests.api.page_checks import CHECKS

NUM_EXAMPLES = 4
"""Per route, of requests that fit the page and of those that do not."""
FEW = settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_nothing_that_fits_the_page_or_does_not_breaks_the_api(
    make_api: Callable[..., Api], tokenizer: Tokenizer
) -> None:
    script = [*[(token_id,) for token_id in tokenizer.encode("Hi")], "stop"]
    api = make_api(lambda request: script, body_timeout_s=1.0)
    page = schemathesis.openapi.from_asgi("/openapi.json", api.app)
    asked: set[str] = set()
    statuses: set[int] = set()

    def ask(case: Case) -> None:
        asked.add(case.path)
        statuses.add(case.call_and_validate(checks=CHECKS).status_code)

    for found in page.get_all_operations():
        operation = found.ok()
        modes = [GenerationMode.POSITIVE, *([GenerationMode.NEGATIVE] if operation.body else [])]
        for mode in modes:
            FEW(given(case=operation.as_strategy(generation_mode=mode))(ask))()
    assert asked | {"/openapi.json"} >= {path.replace(":path}", "}") for path in ACCESS_BY_ROUTE}
    assert statuses >= {200, 400, 404}
    assert not api.generator.open_ids
