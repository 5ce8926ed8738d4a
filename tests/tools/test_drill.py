"""The drill's clients count right, wrong, refused, broken and lost answers, and its verdict follows from the counts."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.errors import ConfigError
from atom_cluster.tools.__main__ import main
from atom_cluster.tools.drill import load as load_module
from atom_cluster.tools.drill import run
from atom_cluster.tools.drill.cluster import DrillError, RunningCluster
from atom_cluster.tools.drill.load import Load, Outcome
from atom_cluster.tools.drill.run import Result, drill
from atom_cluster.tools.drill.scenarios import SCENARIOS, Scene, chosen

NUM_CLIENTS = 4
REPO = Path(__file__).resolve().parents[2]


class ManyAtOnce(ThreadingHTTPServer):
    request_queue_size = 64


class Server:
    """Answers as a cluster does, unless told to misbehave."""

    def __init__(self) -> None:
        self.misbehave: Callable[[BaseHTTPRequestHandler, dict[str, Any]], bool] = lambda handler, body: False
        """Handles a completion itself, or returns False."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                respond(self, 200, {"data": [{"id": "some model"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if not outer.misbehave(self, body):
                    answer(self, body, text=body["prompt"][-9:])

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ManyAtOnce(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def respond(handler: BaseHTTPRequestHandler, status: int, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    handler.send_response(status)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def answer(handler: BaseHTTPRequestHandler, body: dict[str, Any], *, text: str, ends: bool = True) -> None:
    """A completion, as a whole or streamed."""
    if not body["stream"]:
        respond(handler, 200, {"choices": [{"text": text, "finish_reason": "length"}]})
        return
    handler.send_response(200)
    handler.send_header("content-type", "text/event-stream")
    handler.end_headers()
    for piece, finish in ((text[:3], None), (text[3:], "length")):
        event = {"choices": [{"text": piece, "finish_reason": finish}]}
        handler.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
    if ends:
        handler.wfile.write(b"data: [DONE]\n\n")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(load_module, "_RETRY_S", 0.01)
    found = Server()
    yield found
    found.close()


class Once:
    """Misbehaves a number of times."""

    def __init__(self, count: int, act: Callable[[BaseHTTPRequestHandler, dict[str, Any]], bool]) -> None:
        self._left = count
        self._act = act
        self._lock = threading.Lock()

    def __call__(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> bool:
        with self._lock:
            if not self._left:
                return False
            if not self._act(handler, body):
                return False
            self._left -= 1
            return True


def disturbed(server: Server, misbehave: Callable[[BaseHTTPRequestHandler, dict[str, Any]], bool]) -> Outcome:
    load = Load(RunningCluster(server.url), num_clients=NUM_CLIENTS)
    outcome = Outcome()

    def disturb() -> None:
        server.misbehave = misbehave

    load.run_while(disturb, outcome)
    return outcome


def test_refused_requests_are_sent_again_and_none_is_lost(server: Server) -> None:
    def refuse(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> bool:
        respond(handler, 503, {"error": {"message": "no replica"}})
        return True

    outcome = disturbed(server, Once(3, refuse))
    assert outcome.num_refused == 3
    assert outcome.num_right == outcome.num_sent
    assert (outcome.wrong, outcome.broken, outcome.lost) == ([], [], [])


def test_a_stream_without_its_end_is_broken_and_asked_again(server: Server) -> None:
    def cut(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> bool:
        if body["stream"]:
            answer(handler, body, text="numb", ends=False)
        return bool(body["stream"])

    outcome = disturbed(server, Once(2, cut))
    assert len(outcome.broken) == 2 and "[DONE]" in outcome.broken[0]
    assert outcome.num_right == outcome.num_sent


def test_a_cluster_with_keys_is_asked_with_one(server: Server) -> None:
    keys: set[str | None] = set()

    def look(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> bool:
        keys.add(handler.headers["authorization"])
        return False

    server.misbehave = look
    Load(RunningCluster(server.url, api_key="a key"), num_clients=1)
    assert keys == {"Bearer a key"}


def test_another_text_is_wrong(server: Server) -> None:
    def lie(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> bool:
        answer(handler, body, text="something else")
        return True

    outcome = disturbed(server, Once(2, lie))
    assert len(outcome.wrong) == 2 and "something else" in outcome.wrong[0]
    assert outcome.num_right == outcome.num_sent - 2


def test_a_request_without_an_answer_in_its_time_is_lost(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load(RunningCluster(server.url), num_clients=1)
    monkeypatch.setattr(load_module, "REQUEST_TIMEOUT_S", 0.5)
    outcome = Outcome()

    def disturb() -> None:
        server.misbehave = lambda handler, body: respond(handler, 500, {"error": {"message": "broken"}}) is None

    with pytest.raises(DrillError, match="right answers"):
        load.run_while(disturb, outcome)
    assert outcome.lost and "broken" in outcome.lost[0]


def test_a_bad_request_ends_the_drill_since_it_is_the_drills_own_fault(server: Server) -> None:
    server.misbehave = lambda handler, body: respond(handler, 400, {"error": {"message": "model"}}) is None
    with pytest.raises(DrillError, match="HTTP 400"):
        Load(RunningCluster(server.url), num_clients=1)


def test_what_breaks_a_promise() -> None:
    kept = Result(
        scenario=chosen(["decode-killed"])[0], outcome=Outcome(num_sent=9, num_right=9), recovery_s=1, num_leaked=0
    )
    assert kept.holds
    for outcome in (Outcome(lost=["x"]), Outcome(wrong=["x"]), Outcome(broken=["x"])):
        assert not replace(kept, outcome=outcome).holds
    assert not replace(kept, num_leaked=1).holds
    assert not replace(kept, left_behind=1).holds
    assert not replace(kept, problem="not within 60 s").holds
    assert replace(kept, scenario=chosen(["ingress-killed"])[0], outcome=Outcome(broken=["x"])).holds
    assert replace(kept, outcome=Outcome(num_refused=3)).holds
    assert not replace(kept, scenario=chosen(["rolling-upgrade"])[0], outcome=Outcome(num_refused=1)).holds


def test_scenarios_have_names_of_their_own_and_unknown_ones_are_named() -> None:
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS) == len(chosen(["all"]))
    with pytest.raises(ConfigError, match="no-such.*prefill-killed"):
        drill(
            ["no-such"], url="http://127.0.0.1:1", config=None, num_clients=1, num_samples=1, output=None, report=print
        )
    with pytest.raises(ConfigError, match="blocks-corrupted"):
        drill(
            ["blocks-corrupted"],
            url="http://127.0.0.1:1",
            config=None,
            num_clients=1,
            num_samples=1,
            output=None,
            report=print,
        )


def test_the_command_wants_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["drill", "all"])
    assert "--url" in capsys.readouterr().err


def test_a_cluster_that_is_started_sends_all_prompts_to_prefill_whatever_else_a_scenario_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[dict[str, Any]] = []

    @contextmanager
    def serve_run(config: Path, directory: Path, *, api_key: str | None) -> Iterator[RunningCluster]:
        assert api_key == "key"
        started.append(yaml.safe_load(config.read_text())["applications"][0]["args"])
        yield RunningCluster("http://127.0.0.1:1")

    monkeypatch.setattr(run, "serve_run", serve_run)
    for name in ("hostile-peers", "rolling-upgrade", "messages-lost"):
        (scenario,) = chosen([name])
        clusters = run._Clusters(None, REPO / "configs" / "smollm2_cpu.yaml", "key")
        with clusters.with_needs(dict(scenario.needs)):
            pass
    for args in started:
        assert args["kv_transfer"]["conditional_prefill"] is False and args["cache"]["prefix_caching"] is False
        ClusterConfig.model_validate(args)
    assert [args["kv_transfer"].get("transport") for args in started] == ["tcp", None, None]
    assert started[1]["cache"]["num_blocks"] == 256 and started[2]["kv_transfer"]["lease_s"] == 3.0


def test_a_configured_fault_that_never_strikes_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = RunningCluster("http://127.0.0.1:1")
    counted = {"atom_kv_bad_blocks_total": 0.0}
    monkeypatch.setattr(cluster, "metric", lambda name: counted[name])
    monkeypatch.setattr("atom_cluster.tools.drill.scenarios.RECOVERY_TIMEOUT_S", 0.05)
    scene = Scene(cluster, None, None, b"")  # type: ignore[arg-type]
    (scenario,) = chosen(["blocks-corrupted"])
    with pytest.raises(DrillError, match="atom_kv_bad_blocks_total"):
        scenario.disturb(scene)
    counted["atom_kv_bad_blocks_total"] = 3.0
    assert scenario.disturb(scene) == [] and scene.notes == counted


def test_what_is_still_queued_after_a_problem_is_not_leaked(monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([5, 2, 0])
    monkeypatch.setattr(RunningCluster, "num_held", lambda self: next(held))
    monkeypatch.setattr(RunningCluster, "replicas", lambda self: [])

    class Hopeless:
        def run_while(self, disturb: Callable[[], None], outcome: Outcome) -> None:
            raise DrillError("no answer")

    scene = Scene(RunningCluster("http://127.0.0.1:1"), None, None, b"")  # type: ignore[arg-type]
    (scenario,) = chosen(["flood"])
    result = run._run(scenario, scene, Hopeless())  # type: ignore[arg-type]
    assert (result.problem, result.num_leaked, result.holds) == ("no answer", 0, False)

    def never(self: RunningCluster) -> None:
        raise DrillError("not within 60 s")

    held = iter([7])
    monkeypatch.setattr(RunningCluster, "wait_until_idle", never)
    result = run._run(scenario, scene, Hopeless())  # type: ignore[arg-type]
    assert (result.problem, result.num_leaked) == ("no answer", 7)
