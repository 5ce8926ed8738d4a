from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from atom_cluster.config.protection import ProtectionConfig, RateLimits
from atom_cluster.config.serving import ApiConfig, ServingConfig
from atom_cluster.units import KiB, MiB

PAGE = Path(__file__).parents[2] / "docs" / "protection.md"


def test_a_limit_that_is_not_given_is_the_default_one() -> None:
    own = RateLimits(requests_per_minute=5)
    both = own.or_else(RateLimits(requests_per_minute=9, concurrent_requests=3))
    assert (both.requests_per_minute, both.tokens_per_minute, both.concurrent_requests) == (5, None, 3)


@pytest.mark.parametrize("path", ["keys.yaml", "~/keys.yaml", ""])
def test_the_file_of_keys_is_the_same_from_every_directory(path: str) -> None:
    with pytest.raises(ValidationError, match="absolute path"):
        ProtectionConfig(api_keys_file=path)


def test_the_documented_reverse_proxy_has_our_own_limits() -> None:
    found = re.search(r"```nginx\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    values = dict(re.findall(r"^\s*(\w+) (.+?);", found[1], re.MULTILINE))
    api = ApiConfig()
    num_buffers, buffer_kib = values["large_client_header_buffers"].removesuffix("k").split()
    assert int(num_buffers) * int(buffer_kib) * KiB == api.protection.max_header_bytes
    assert int(values["client_max_body_size"].removesuffix("m")) * MiB == api.max_body_bytes
    assert float(values["client_body_timeout"].removesuffix("s")) == api.body_timeout_s
    assert float(values["proxy_read_timeout"].removesuffix("s")) == ServingConfig().request_timeout_s
    assert "location /-/ { return 404; }" in found[1]
