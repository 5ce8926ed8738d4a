"""GET /: one HTML page with its style and its script in it. It needs no build step and nothing from elsewhere.

The page asks /v1/cluster and /metrics itself, as any client of theirs. Its policy lets it run its own script only and
talk to this server only, so that not even a name made to look like HTML could do harm. Knows nothing of clusters.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from fastapi import FastAPI
from starlette.responses import Response

from atom_cluster.api.openapi.operating import STATUS_PAGE
from atom_cluster.api.openapi.operation import described

_SCRIPTS = ("model.js", "view.js", "main.js")
"""In the order in which they run."""


def add_status_page(app: FastAPI) -> None:
    """The route. Raises OSError if the package's files are not there."""
    page, policy = build_page()
    headers = {
        "content-security-policy": policy,
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    async def status_page() -> Response:
        return Response(page, headers=headers, media_type="text/html; charset=utf-8")

    app.get("/", **described(STATUS_PAGE))(status_page)


def build_page() -> tuple[bytes, str]:
    """The page and its content security policy."""
    style, script = _read("style.css"), "\n".join(map(_read, _SCRIPTS))
    page = _read("page.html").replace("/* style */", style).replace("/* script */", script)
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.encode(), policy


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
