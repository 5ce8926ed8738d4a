from __future__ import annotations

import pytest
from pydantic import ValidationError

from atom_cluster.config.protection import ProtectionConfig, RateLimits


def test_a_limit_that_is_not_given_is_the_default_one() -> None:
    own = RateLimits(requests_per_minute=5)
    both = own.or_else(RateLimits(requests_per_minute=9, concurrent_requests=3))
    assert (both.requests_per_minute, both.tokens_per_minute, both.concurrent_requests) == (5, None, 3)


@pytest.mark.parametrize("path", ["keys.yaml", "~/keys.yaml", ""])
def test_the_file_of_keys_is_the_same_from_every_directory(path: str) -> None:
    with pytest.raises(ValidationError, match="absolute path"):
        ProtectionConfig(api_keys_file=path)
