"""Every route says who may use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
from starlette.routing import Route

from atom_cluster.api.protection.access import ACCESS_BY_ROUTE, access_of, may_use
from atom_cluster.config.protection import Role
from tests.api.conftest import Api

OPEN = {"/health", "/ready"}


def templates(api_routes: list[object]) -> set[str]:
    return {route.path for route in api_routes if isinstance(route, Route)}


def test_every_route_is_listed_and_only_probes_are_open(make_api: Callable[..., Api]) -> None:
    found = templates(list(make_api(lambda request: ["stop"]).app.router.routes))
    assert found <= set(ACCESS_BY_ROUTE)
    assert {path for path in found if access_of(path) == "open"} == OPEN


def test_what_is_not_listed_is_for_admins_and_what_is_nothing_is_told_to_any_key() -> None:
    assert access_of("/debug/new") == "admin"
    assert access_of(None) == "any key"


@pytest.mark.parametrize("role", get_args(Role))
def test_a_role_may_use_its_own_routes_and_admins_all(role: Role) -> None:
    allowed = {access for access in ("open", "any key", "user", "monitor", "admin") if may_use(role, access)}
    assert allowed == {"open", "any key", "user", "monitor", "admin"} if role == "admin" else {"open", "any key", role}
