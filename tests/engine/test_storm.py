from __future__ import annotations

import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.storm import ACTION, SIZES, Action, Sizes, Storm

NUM_EXAMPLES = int(os.environ.get("ATOM_STORM_EXAMPLES", "150"))
"""More by hand: ATOM_STORM_EXAMPLES=5000."""


@settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(sizes=SIZES, actions=st.lists(ACTION, min_size=30, max_size=150), seed=st.integers(0, 1000))
def test_no_request_is_lost_or_wrong_and_no_block_leaks_whatever_happens(
    sizes: Sizes, actions: list[Action], seed: int
) -> None:
    storm = Storm(sizes, seed)
    for action in actions:
        storm.act(*action)
    storm.check()
