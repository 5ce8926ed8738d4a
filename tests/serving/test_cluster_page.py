"""/v1/cluster and /metrics show the whole cluster, and nothing that is not ours."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import msgspec
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.parallel import GroupConfig
from atom_cluster.messages.cluster import EngineStatus, MemberCard, Membership, PeerAddress
from atom_cluster.serving.cluster_page import cluster_page, merge_pages, scrape_metrics
from tests.serving.conftest import ROUTER, engine_card

FIRST_NODE = """\
# HELP ray_node_cpu_count Total CPUs available on a ray node
# TYPE ray_node_cpu_count gauge
ray_node_cpu_count{NodeAddress="10.0.0.1"} 8.0
# HELP ray_atom_requests_running Requests that hold a row of the runner.
# TYPE ray_atom_requests_running gauge
ray_atom_requests_running{Component="core_worker",replica="decode-1",role="decode"} 3.0
# HELP ray_atom_time_to_first_token_seconds_bucket From arrival to the first token.
# TYPE ray_atom_time_to_first_token_seconds_bucket gauge
ray_atom_time_to_first_token_seconds_bucket{le="0.1",replica="decode-1"} 1.0
ray_atom_time_to_first_token_seconds_bucket{le="+Inf",replica="decode-1"} 2.0
# HELP ray_atom_time_to_first_token_seconds_sum From arrival to the first token.
# TYPE ray_atom_time_to_first_token_seconds_sum gauge
ray_atom_time_to_first_token_seconds_sum{replica="decode-1"} 0.7
# HELP ray_atom_time_to_first_token_seconds_count From arrival to the first token.
# TYPE ray_atom_time_to_first_token_seconds_count gauge
ray_atom_time_to_first_token_seconds_count{replica="decode-1"} 2.0
# HELP ray_atom_preemptions_total Requests put back.
# TYPE ray_atom_preemptions_total counter
ray_atom_preemptions_total{replica="decode-1"} 4.0
"""
SECOND_NODE = """\
# HELP ray_atom_time_to_first_token_seconds_bucket From arrival to the first token.
# TYPE ray_atom_time_to_first_token_seconds_bucket gauge
ray_atom_time_to_first_token_seconds_bucket{le="0.1",replica="decode-2"} 5.0
ray_atom_time_to_first_token_seconds_bucket{le="+Inf",replica="decode-2"} 5.0
# HELP ray_atom_time_to_first_token_seconds_sum From arrival to the first token.
# TYPE ray_atom_time_to_first_token_seconds_sum gauge
ray_atom_time_to_first_token_seconds_sum{replica="decode-2"} 0.2
# HELP ray_atom_time_to_first_token_seconds_count From arrival to the first token.
# TYPE ray_atom_time_to_first_token_seconds_count gauge
ray_atom_time_to_first_token_seconds_count{replica="decode-2"} 5.0
# HELP ray_atom_unheard_of_total Of another version of this software.
# TYPE ray_atom_unheard_of_total counter
ray_atom_unheard_of_total{replica="decode-2"} 4.0
# HELP ray_object_store_memory_ray_bytes Looks like ray_atom_preemptions_total and is not.
# TYPE ray_object_store_memory_ray_bytes gauge
ray_object_store_memory_ray_bytes 1.0
#EOF
"""


def samples(page: str) -> dict[str, list[float]]:
    """Values by sample name."""
    found: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.value)
    return found


def test_pages_of_two_nodes_become_one_with_only_our_metrics() -> None:
    page = merge_pages([FIRST_NODE, SECOND_NODE])
    assert samples(page) == {
        "atom_requests_running": [3.0],
        "atom_time_to_first_token_seconds_bucket": [1.0, 2.0, 5.0, 5.0],
        "atom_time_to_first_token_seconds_count": [2.0, 5.0],
        "atom_time_to_first_token_seconds_sum": [0.7, 0.2],
        "atom_preemptions_total": [4.0],
    }
    assert page.count("# TYPE atom_time_to_first_token_seconds histogram") == 1
    assert page.count("# HELP atom_time_to_first_token_seconds ") == 1
    assert "ray_" not in page


def test_each_familys_samples_are_together_below_its_header() -> None:
    lines = merge_pages([SECOND_NODE, FIRST_NODE]).splitlines()
    headers = [index for index, line in enumerate(lines) if line.startswith("# HELP ")]
    for start, end in zip(headers, [*headers[1:], len(lines)]):
        name = lines[start].split()[2]
        assert lines[start + 1].startswith(f"# TYPE {name} ")
        assert end > start + 2 and all(line.startswith(name) for line in lines[start + 2 : end])


def test_labels_survive() -> None:
    (family,) = text_string_to_metric_families(merge_pages([FIRST_NODE.split("# HELP ray_atom_time")[0]]))
    assert family.samples[0].labels == {"replica": "decode-1", "role": "decode"}, "ours do; Ray's are left out"


def test_labels_of_rays_are_left_out_wherever_they_stand_and_nothing_else_is() -> None:
    header = "# HELP ray_atom_kv_blocks x\n# TYPE ray_atom_kv_blocks gauge\n"
    for before, after in (
        ('{Component="c",state="free",WorkerId="w"}', '{state="free"}'),
        ('{SessionName="a,b",Version="2"}', ""),
        ('{state="a \\"Component=\\",",NodeAddress="10.0.0.1"}', '{state="a \\"Component=\\","}'),
        ('{MyVersion="1",otel_scope_name="x"}', '{MyVersion="1"}'),
    ):
        page = merge_pages([f"{header}ray_atom_kv_blocks{before} 1.0\n"])
        assert page.splitlines()[-1] == f"atom_kv_blocks{after} 1.0"


def test_no_pages_are_an_empty_page() -> None:
    assert merge_pages([]) == merge_pages(["", "# HELP ray_x y\n"]) == ""


@contextmanager
def node(page: str) -> Iterator[int]:
    """A node's metrics port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


async def test_nodes_that_do_not_answer_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with node("") as closed:
        pass
    with node(FIRST_NODE) as first, node(SECOND_NODE) as second:
        nodes = [
            {"Alive": is_alive, "NodeManagerAddress": "127.0.0.1", "MetricsExportPort": port}
            for port, is_alive in ((first, True), (closed, True), (second, True), (first, False))
        ]
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        page = await scrape_metrics()
    assert samples(page) == samples(merge_pages([FIRST_NODE, SECOND_NODE]))


def test_the_cluster_page_tells_who_is_there_and_why_it_is_so() -> None:
    config = ClusterConfig(model="owner/model", unified=GroupConfig())
    status = EngineStatus(num_running=1, num_waiting=2, num_tickets=0, blocks_by_state={"free": 9})
    engine = msgspec.structs.replace(engine_card(), status=status, choices={"ops": "torch (asked for)"})
    address = PeerAddress(peer_id="ingress", endpoint="tcp://127.0.0.1:3", epoch=3)
    membership = Membership(router=ROUTER, members=(engine, MemberCard(address=address, kind="ingress", pid=5)))
    page = json.loads(json.dumps(cluster_page(config, {"device": "no GPU"}, membership)))
    (replica,) = page["replicas"]
    assert (replica["id"], replica["role"], replica["epoch"]) == ("engine", "unified", 7)
    assert replica["status"]["blocks_by_state"] == {"free": 9} and replica["choices"] == engine.choices
    assert [(entry["id"], entry["pid"]) for entry in page["ingresses"]] == [("ingress", 5)]
    assert page["router"]["peer_id"] == "router" and page["reasons"] == {"device": "no GPU"}
    assert page["configuration"]["model"] == "owner/model"


def test_the_cluster_page_before_anybody_was_heard_of() -> None:
    page = cluster_page(ClusterConfig(model="m", unified=GroupConfig()), {}, None)
    assert (page["router"], page["replicas"], page["ingresses"]) == (None, [], [])
