"""The status page in a headless browser, over a cluster that is only pretended."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, Page, expect, sync_playwright
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from atom_cluster.api.status_page.page import add_status_page

HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>\'"&'


def chromium() -> str | None:
    """An installed Chromium, if there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")


def replica(name: str, role: str, **status: Any) -> dict[str, Any]:
    blocks = {"free": 50, "cached": 30, "running": 15, "leased": 5, "arriving": 0}
    return {
        "id": name,
        "role": role,
        "node": "node-1",
        "pid": 4242,
        "is_draining": False,
        "choices": {"ops": "triton (auto: the device can)"},
        "status": {"num_running": 3, "num_waiting": 1, "num_tickets": 2, "blocks_by_state": blocks, **status},
    }


def error(message: str, at_s: float = 1.0, kind: str = "EngineLost") -> dict[str, Any]:
    return {"at_s": at_s, "kind": kind, "message": message, "count": 2}


class Cluster:
    """What the page is told; tests change it while it looks."""

    def __init__(self) -> None:
        self.replicas = [replica("prefill-1", "prefill"), replica("decode-1", "decode")]
        self.key: str | None = None
        self.is_away = False
        self.num_requests = 0
        self.asked_s: list[float] = []
        self.recent_errors: list[dict[str, Any]] = []
        self.app = FastAPI()
        add_status_page(self.app)
        self.app.get("/v1/cluster")(self.cluster)
        self.app.get("/metrics")(self.metrics)

    async def cluster(self, request: Request) -> Response:
        self.asked_s.append(time.monotonic())
        if self.is_away:
            return PlainTextResponse("", 503)
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return PlainTextResponse("", 401)
        return JSONResponse(
            {
                "model": "models/tiny",
                "served_name": "tiny",
                "router": {"peer_id": "router-1", "endpoint": "tcp://10.0.0.1:5", "epoch": 1},
                "ingresses": [{"id": "ingress-1"}],
                "configuration": {"prefill": {"replicas": 1}, "decode": {"replicas": 1}, "unified": None},
                "reasons": {"device": "cpu (auto)"},
                "replicas": self.replicas,
                "recent_errors": self.recent_errors,
            }
        )

    async def metrics(self) -> Response:
        self.num_requests += 10
        lines = [
            f'atom_http_requests_total{{route="/v1/completions",status="200"}} {self.num_requests}',
            'atom_router_decisions_total{reason="prefix",replica="router-1"} 30',
            'atom_router_decisions_total{reason="load",replica="router-1"} 10',
            'atom_kv_transfer_bytes_total{transport="shm"} 5.0e+06',
            "atom_prefix_cache_queried_tokens_total 100",
            "atom_prefix_cache_hit_tokens_total 25",
            "atom_kv_bad_blocks_total 1",
        ]
        return PlainTextResponse("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Chromium's sandbox does not work for root, as which containers run.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        launched = playwright.chromium.launch(executable_path=chromium(), args=options)
        yield launched
        launched.close()


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def url(cluster: Cluster) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(cluster.app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    listener.close()


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, url: str) -> Iterator[Open]:
    """Opens the page. Time passes 20 times as fast in it. What its console says and what it asks others is an error."""
    contexts = []
    complaints: list[str] = []

    def start(**options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        context.add_init_script("const later = setTimeout; window.setTimeout = (what, ms) => later(what, ms / 20);")
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda found: complaints.append(str(found)))
        page.on("console", lambda line: complaints.append(line.text) if "Refused" in line.text else None)
        page.on("request", lambda asked: None if asked.url.startswith(url) else complaints.append(asked.url))
        page.goto(url)
        return page

    yield start
    for context in contexts:
        context.close()
    assert [line for line in complaints if not line.startswith("data:")] == []


def save(page: Page, name: str) -> None:
    """A picture for people, where somebody asks for them."""
    directory = os.environ.get("STATUS_PAGE_PICTURES")
    if directory:
        page.screenshot(path=Path(directory) / f"{name}.png", full_page=True)


def assert_accessible(page: Page) -> None:
    """Tables, parts and headings are what they look like."""
    assert page.evaluate("[...document.querySelectorAll('th')].every((cell) => cell.scope === 'col')")
    assert page.evaluate(
        "[...document.querySelectorAll('section')].every((part) => part.hasAttribute('aria-labelledby'))"
    )
    assert page.evaluate("document.documentElement.lang") == "en"
    levels = page.evaluate(
        "[...document.querySelectorAll('h1,h2,h3')].filter((e) => e.offsetParent).map((e) => +e.tagName[1])"
    )
    assert levels[0] == 1 and all(later <= earlier + 1 for earlier, later in zip(levels, levels[1:]))


def test_a_cluster_that_is_well(open_page: Open, cluster: Cluster) -> None:
    page = open_page()
    health = page.get_by_role("status")
    expect(health).to_have_text("All well")
    row = page.get_by_role("row").filter(has_text="decode-1")
    expect(row).to_contain_text("serving")
    expect(row.get_by_role("img", name="15 running, 5 leased, 0 arriving, 30 cached, 50 free")).to_be_visible()
    expect(page.locator("#decisions")).to_contain_text("75 %")
    expect(page.locator("#transfer")).to_contain_text("Read through shm")
    expect(page.locator("#transfer dd.bad")).to_have_text("1")
    expect(page.locator("#tiles")).to_contain_text("/s")
    expect(page.get_by_text("None since the processes started.")).to_be_visible()
    page.get_by_text("Of decode-1").click()
    expect(page.get_by_text("triton (auto: the device can)").nth(1)).to_be_visible()
    save(page, "well")
    assert_accessible(page)


def test_it_goes_red_when_a_replica_dies_and_recovers(open_page: Open, cluster: Cluster) -> None:
    page = open_page()
    health = page.get_by_role("status")
    expect(health).to_have_class("badge good")
    died = cluster.replicas.pop()
    cluster.recent_errors = [error("the engine decode-1 was lost")]
    expect(health).to_have_text("No replica decodes")
    expect(health).to_have_class("badge bad")
    expect(page.get_by_text("0 of 1 decode replicas are there.")).to_be_visible()
    expect(page.get_by_role("row").filter(has_text="decode-1").first).to_contain_text("gone")
    expect(page.locator("#errors")).to_contain_text("the engine decode-1 was lost")
    save(page, "dead")
    cluster.replicas.append({**died, "id": "decode-2"})
    expect(health).to_have_text("All well")
    expect(page.locator("[data-replica=decode-1]")).to_have_count(0)
    expect(page.locator("[data-replica=decode-2]")).to_contain_text("serving")


def test_names_are_text_whatever_they_look_like(open_page: Open, cluster: Cluster) -> None:
    hostile = replica(HOSTILE, "decode", recent_errors=[error(HOSTILE, kind=HOSTILE)])
    hostile["choices"] = {HOSTILE: HOSTILE}
    hostile["node"] = HOSTILE
    cluster.replicas[1] = hostile
    page = open_page()
    expect(page.get_by_text(HOSTILE, exact=True).first).to_be_visible()
    page.get_by_text(f"Of {HOSTILE}").click()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src], script").count() == 1, "its own script, and no picture"


def test_nonsense_does_not_stop_it(open_page: Open, cluster: Cluster) -> None:
    cluster.replicas = [{"id": None}, {"role": "decode", "status": {"blocks_by_state": {"free": "many"}}}]
    page = open_page()
    expect(page.get_by_role("status")).to_have_text("Degraded")
    cluster.replicas = [replica("prefill-1", "prefill"), replica("decode-1", "decode")]
    expect(page.get_by_role("status")).to_have_text("All well")


def test_while_nobody_answers_it_says_so_and_asks_less_and_less(open_page: Open, cluster: Cluster) -> None:
    page = open_page()
    expect(page.get_by_role("status")).to_have_text("All well")
    cluster.is_away = True
    expect(page.get_by_role("status")).to_have_text("No answer")
    expect(page.get_by_text("The cluster does not answer")).to_be_visible()
    cluster.asked_s.clear()
    while len(cluster.asked_s) < 4:
        page.wait_for_timeout(20)
    pauses = [later - earlier for earlier, later in zip(cluster.asked_s, cluster.asked_s[1:])]
    assert len(pauses) >= 2 and pauses[-1] > 1.5 * pauses[0], pauses
    cluster.is_away = False
    expect(page.get_by_role("status")).to_have_text("All well")


def test_a_key_is_asked_for_and_kept_for_the_tab(open_page: Open, cluster: Cluster) -> None:
    cluster.key = "right"
    page = open_page()
    page.get_by_role("textbox", name="Key").fill("wrong")
    page.get_by_role("button", name="Use it").click()
    expect(page.get_by_text("That key may not look here.")).to_be_visible()
    page.get_by_role("textbox", name="Key").fill("right")
    save(page, "key")
    page.get_by_role("button", name="Use it").click()
    expect(page.get_by_role("status")).to_have_text("All well")
    page.reload()
    expect(page.get_by_role("status")).to_have_text("All well")
    assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(open_page: Open, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    expect(page.get_by_role("status")).to_have_text("All well")
    shades = page.evaluate(
        "['color', 'backgroundColor'].map((name) => getComputedStyle(document.body)[name].match(/\\d+/g).map(Number))"
    )
    text, back = (sum(shade[:3]) for shade in shades)
    assert text < back if scheme == "light" else text > back
    save(page, scheme)
