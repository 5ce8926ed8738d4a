"""The page is whole in itself, and may do nothing but run its own script and ask its own server."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable

from atom_cluster.api.status_page.page import build_page
from tests.api.conftest import Api


async def test_the_page_is_served_with_its_policy(make_api: Callable[..., Api]) -> None:
    async with make_api(lambda request: ["stop"]).client() as client:
        answer = await client.get("/")
    page, policy = build_page()
    assert answer.status_code == 200 and answer.content == page
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"] == policy
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_nothing_comes_from_elsewhere_and_nothing_is_made_of_markup() -> None:
    page, policy = build_page()
    text = page.decode()
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//", text) and "@import" not in text and "url(" not in text
    for way_in in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        " style=",
    ):
        assert way_in not in text, way_in
    for tag in ("style", "script"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
