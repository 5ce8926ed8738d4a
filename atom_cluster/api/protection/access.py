"""Which role each route needs. A route that is not listed needs an admin's key, so that none is open by oversight.

`/health` and `/ready` need no key: kubelets and load balancers ask them and have none, and they tell nothing but yes or
no. A readiness probe generates at most once in ten seconds, however many ask.
"""

from __future__ import annotations

from typing import Literal

from atom_cluster.config.protection import Role

Access = Literal["open", "any key", "user", "monitor", "admin"]

ACCESS_BY_ROUTE: dict[str, Access] = {
    "/health": "open",
    "/ready": "open",
    "/v1/models": "any key",
    "/v1/models/{model_id:path}": "any key",
    "/openapi.json": "any key",
    "/docs": "any key",
    "/v1/chat/completions": "user",
    "/v1/completions": "user",
    "/v1/responses": "user",
    "/v1/messages": "user",
    "/v1/messages/count_tokens": "user",
    "/tokenize": "user",
    "/detokenize": "user",
    "/": "monitor",
    "/metrics": "monitor",
    "/v1/cluster": "monitor",
    "/v1/requests/{request_id}/timeline": "any key",
    "/start_profile": "admin",
    "/stop_profile": "admin",
}
"""By the route's template."""


def access_of(template: str | None) -> Access:
    """What a route needs; None for a path that is no route, whose answer says just that, to any key."""
    return "any key" if template is None else ACCESS_BY_ROUTE.get(template, "admin")


def may_use(role: Role, access: Access) -> bool:
    """Whether keys of a role may use a route."""
    return role == "admin" or access in ("open", "any key", role)
