"""The whole command against a small server: runs, files, refusals, agreement with the server, sweeps."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import server_metrics, sweep
from benchmarks.result_file import OWN, read_runs, without_secrets
from benchmarks.serving import cpu_seconds, ingress_pids, main, status_of
from benchmarks.serving_flags import REFUSED, make_parser, parse_arguments, promises_of
from tests.benchmarks.fake_server import FakeServer, running_in_thread

FLAGS = ["--disable-tqdm", "--ignore-eos", "--num-warmups", "2", "--random-input-len", "20", "--random-output-len", "6"]
# What ATOM's client writes, apart from the statistics of latencies.
ATOM_FIELDS = {
    "date",
    "backend",
    "model_id",
    "tokenizer_id",
    "best_of",
    "num_prompts",
    "request_rate",
    "burstiness",
    "max_concurrency",
    "duration",
    "completed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "request_goodput:",
    "output_throughput",
    "total_token_throughput",
    "concurrency",
    "accept_length",
    "acceptance_rate",
}
ATOM_DETAILS = {"input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors"}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running_in_thread() as fake:
        yield fake


def run(server: FakeServer, tmp_path: Path, *flags: str) -> int:
    saved = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    return main(["--base-url", server.url, *FLAGS, *saved, *flags])


def result(tmp_path: Path) -> dict[str, object]:
    (found,) = read_runs(tmp_path / "result.json")
    return found


@pytest.mark.parametrize(
    ("load", "rate", "concurrency"),
    [
        (["--max-concurrency", "4"], "inf", 4),
        (["--request-rate", "500"], 500.0, None),
        (["--request_rate=500", "--max_concurrency=2"], 500.0, 2),
    ],
)
def test_a_result_has_the_fields_of_atoms_client(
    server: FakeServer, tmp_path: Path, load: list[str], rate: object, concurrency: int | None
) -> None:
    metadata = ["--metadata", "tp=8", "quantization=fp8", "--metric-percentiles", "50,99.9"]
    goodput = ["--goodput", "ttft:10000", "tpot:1000"]
    assert run(server, tmp_path, "--num-prompts", "10", "--random-prefix-len", "16", *load, *metadata, *goodput) == 0
    found = result(tmp_path)
    assert found.keys() >= ATOM_FIELDS
    assert found.keys() >= {f"{kind}_ttft_ms" for kind in ("mean", "median", "std", "p50", "p99.9")}
    assert not found.keys() & ATOM_DETAILS
    assert (found["request_rate"], found["max_concurrency"], found["model_id"]) == (rate, concurrency, "tiny")
    assert (found["completed"], found["total_input_tokens"], found["total_output_tokens"]) == (10, 360, 60)
    tokens = {"output_throughput": 60, "total_token_throughput": 420, "request_throughput": 10}
    assert {name: found[name] * found["duration"] for name in tokens} == pytest.approx(tokens)
    assert (found["tp"], found["quantization"]) == ("8", "fp8")
    assert found["request_goodput:"] == found["request_goodput"] == found["request_throughput"]
    warm_up, measured = server.bodies[:2], server.bodies[2:]
    assert len({tuple(body["prompt"][:16]) for body in measured}) == 1
    assert {body["model"] for body in server.bodies} == {"tiny"}
    assert warm_up[0]["prompt"] not in [body["prompt"] for body in measured]


def test_details_page_and_ingress_time_are_there_when_asked_for(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    flags = ["--num-prompts", "6", "--max-concurrency", "3", "--save-detailed", "--frontend-overhead", "--profile"]
    secret = ["--api-key", "sk-secret", "--header", "x-team=a"]
    assert run(server, tmp_path, *flags, *secret, "--html", str(page)) == 0
    found = result(tmp_path)
    assert found.keys() >= ATOM_DETAILS
    assert found["generated_texts"] == ["ab"] * 6
    assert found["output_lens"] == [6] * 6
    own = found[OWN]
    assert isinstance(own, dict)
    assert own["ingress_cpu_us_per_token"] >= 0
    assert own["client"]["max_under_way"] == 3
    assert server.posts == ["/start_profile", "/stop_profile"]
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer sk-secret"}
    assert {headers["x-team"] for headers in server.headers} == {"a"}
    assert "sk-secret" not in (tmp_path / "result.json").read_text() + page.read_text()
    assert page.read_text().count("<svg") == 6
    assert "E2EL" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["openai-chat", "openai-responses"])
def test_other_endpoints_take_conversations(server: FakeServer, tmp_path: Path, backend: str) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"messages": [{"role": "user", "content": "a"}], "output_tokens": 4}\n' * 3)
    dataset = ["--dataset-name", "custom", "--dataset-path", str(own)]
    assert run(server, tmp_path, "--backend", backend, *dataset) == 0
    assert result(tmp_path)["total_output_tokens"] == 12


def test_a_trace_is_sent_at_its_times(server: FakeServer, tmp_path: Path) -> None:
    trace = ["--dataset-name", "mooncake", "--num-prompts", "5", "--speedup", "100000", "--trace-length-scale", "0.01"]
    assert run(server, tmp_path, *trace) == 0
    sent = server.bodies[2:]
    assert len(sent) == 5
    assert {tuple(body["prompt"][:5]) for body in sent} == {tuple(sent[0]["prompt"][:5])}  # the block that all share


def test_one_process_holds_five_hundred_connections(server: FakeServer, tmp_path: Path) -> None:
    server.hold_until = 500
    many = ["--num-prompts", "520", "--max-concurrency", "500", "--num-warmups", "0", "--timeout-s", "120"]
    assert run(server, tmp_path, *many) == 0
    assert server.max_open == 500


def test_failures_end_with_a_status_and_are_told_by_kind(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.failure = "cut"
    assert run(server, tmp_path, "--num-prompts", "4", "--num-warmups", "0") == 1
    own = result(tmp_path)[OWN]
    assert isinstance(own, dict)
    assert own["errors"] == {"the stream ended early": 4}
    assert "error x4" in capsys.readouterr().out
    server.failure = "short"
    assert run(server, tmp_path, "--num-prompts", "4", "--num-warmups", "0", "--goodput", "ttft:10000") == 0
    own = result(tmp_path)[OWN]
    assert isinstance(own, dict)
    assert (own["goodput"]["num_good"], own["goodput"]["num_smooth"], own["goodput"]["num_incomplete"]) == (4, 0, 4)
    server.failure = "refused"
    assert run(server, tmp_path, "--num-prompts", "4") == 2
    assert "a warm-up request failed: HTTP 503" in capsys.readouterr().err


def test_warm_ups_are_short_and_an_answer_may_end_early_unless_told_otherwise(
    server: FakeServer, tmp_path: Path
) -> None:
    server.failure = "short"
    flags = [flag for flag in FLAGS if flag != "--ignore-eos"]
    more = ["--random-output-len", "20", "--num-prompts", "2", "--goodput", "ttft:10000"]
    saved = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    assert main(["--base-url", server.url, *flags, *more, *saved]) == 0
    assert [body["max_tokens"] for body in server.bodies] == [16, 16, 20, 20]
    own = result(tmp_path)[OWN]
    assert isinstance(own, dict)
    assert own["goodput"]["num_incomplete"] == 0


def test_no_server_and_no_files_are_errors_and_no_tracebacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--base-url", "http://127.0.0.1:9", "--disable-tqdm"]) == 2
    assert "Cannot connect" in capsys.readouterr().err
    known = ["--base-url", "http://127.0.0.1:9", "--model", "m", "--disable-tqdm"]
    assert main([*known, "--tokenizer", "/no/such/model"]) == 2
    assert "--tokenizer: model `/no/such/model`" in capsys.readouterr().err
    assert main([*known, "--dataset-name", "azure", "--dataset-path", "/no/such/trace"]) == 2
    assert "--dataset-path: there is no file /no/such/trace" in capsys.readouterr().err


def test_the_servers_own_figures_are_compared(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_metrics, "SETTLE_S", 0.02)
    monkeypatch.setattr(server_metrics.settled, "__kwdefaults__", {"settle_s": 0.02})
    monkeypatch.setattr(server_metrics, "TOLERANCE_MS", 200.0)  # others use this machine too
    server.gap_s, server.front_s = 0.05, 0.6
    check = ["--num-prompts", "6", "--max-concurrency", "2", "--check-server-metrics"]
    assert run(server, tmp_path, *check) == 0
    own = result(tmp_path)[OWN]
    assert isinstance(own, dict)
    observed = {one["metric"]: one["num_observed"] for one in own["server_metrics"]}
    assert observed == {server_metrics.TTFT: 6, server_metrics.TPOT: 6, server_metrics.ITL: 6}
    server.server_skew_s = 0.5
    assert run(server, tmp_path, *check) == 3
    assert "DIFFER" in capsys.readouterr().out


@pytest.mark.parametrize("flag", list(REFUSED))
def test_flags_without_a_meaning_here_are_refused_with_the_reason(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([flag, "2"])
    assert REFUSED[flag].split("{")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backend", "tgi"], "another protocol"),
        (["--endpoint", "/generate_stream"], "--endpoint"),
        (["--num-prompts", "0"], "--num-prompts"),
        (["--max-concurrency", "0"], "--max-concurrency"),
        (["--num-warmups", "-1"], "--num-warmups"),
        (["--timeout-s", "0"], "--timeout-s"),
        (["--request-rate", "0"], "--request-rate"),
        (["--speedup", "10"], "--speedup"),
        (["--goodput", "itl:5"], "--goodput"),
        (["--goodput", "ttft:soon"], "--goodput"),
        (["--metadata", "tp"], "--metadata"),
        (["--metric-percentiles", "101"], "--metric-percentiles"),
        (["--percentile-metrics", "ttfb"], "ttfb"),
        (["--dataset-name", "imagenet"], "--dataset-name"),
    ],
)
def test_wrong_arguments_are_named(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(flags)
    assert message in capsys.readouterr().err


def test_promises_are_in_milliseconds() -> None:
    promises = promises_of(parse_arguments(["--goodput", "ttft:2000", "tpot:50.5", "--stall-ms", "300"]))
    assert (promises.ttft, promises.tpot, promises.e2el, promises.stall_s) == (2000, 50.5, None, 0.3)


def test_keys_are_left_out_of_what_is_kept() -> None:
    kept = without_secrets(["--model", "m", "--api_key", "sk", "--header=a=b", "--header", "x=1", "y=2", "--seed", "3"])
    assert kept == ["--model", "m", "--api-key=...", "--header=...", "--header=...", "--seed", "3"]


def test_a_sweep_goes_on_where_it_stopped(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "sweep"
    command = ["--output", str(output), "--prompts-per-user", "3", "--", "--base-url", server.url, *FLAGS]
    assert sweep.main(["--over", "max-concurrency", "1", *command]) == 0
    assert len(server.bodies) == 2 + 3
    assert sweep.main(["--over", "max-concurrency", "4", "1", "2", *command]) == 0
    assert len(server.bodies) == 5 + (2 + 12) + (2 + 6)
    # A server with a prefix cache meets no prompt twice.
    assert len({tuple(body["prompt"]) for body in server.bodies}) == len(server.bodies)
    assert "--max-concurrency 1: there already" in capsys.readouterr().out
    document = json.loads(output.with_suffix(".json").read_text())
    assert [run["max_concurrency"] for run in document["runs"]] == [1, 2, 4]
    assert output.with_suffix(".html").read_text().count("<svg") == 4 + 3 * 6
    other = [*command[: -len(FLAGS)], *FLAGS, "--seed", "7"]
    assert sweep.main(["--over", "max-concurrency", "1", *other]) == 2
    assert "another sweep" in capsys.readouterr().err
    for wrong in (["--over", "seed", "1"], ["--over", "max-concurrency", "1", "--", "--save_result"]):
        with pytest.raises(SystemExit):
            sweep.main(wrong)
    assert "--save-result is for one run" in capsys.readouterr().err


@pytest.mark.parametrize(("num_failed", "is_close", "status"), [(0, True, 0), (1, False, 1), (0, False, 3)])
def test_the_status_of_several_runs_is_that_of_the_worst(num_failed: int, is_close: bool, status: int) -> None:
    good = {OWN: {"num_failed": 0, "server_metrics": []}}
    other = {OWN: {"num_failed": num_failed, "server_metrics": [{"is_close": True}, {"is_close": is_close}]}}
    assert status_of([good, other]) == status
    assert status_of([good]) == 0


def test_cpu_time_is_read_behind_a_program_name_with_blanks_and_parentheses(tmp_path: Path) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    for pid, (user, system) in {7: (3 * ticks, ticks), 8: (0, 2 * ticks)}.items():
        (tmp_path / str(pid)).mkdir()
        before = " ".join(["S", *["0"] * 10])
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (ray::(x) y) {before} {user} {system} 0 0 20\n")
    assert cpu_seconds([7, 8], proc=tmp_path) == 6.0
    assert cpu_seconds([]) == 0
    with pytest.raises(ValueError, match="process id 9"):
        cpu_seconds([7, 9], proc=tmp_path)
    assert ingress_pids({"ingresses": [{"pid": 7}, {"pid": 8}]}) == [7, 8]
    with pytest.raises(ValueError, match="/v1/cluster"):
        ingress_pids(None)


def test_own_cpu_time_is_what_the_system_says() -> None:
    before_s = sum(os.times()[:2])
    measured_s = cpu_seconds([os.getpid()])
    assert before_s - 0.05 <= measured_s <= sum(os.times()[:2]) + 0.05


def test_every_flag_is_in_the_documentation() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "benchmarking.md").read_text()
    flags = {flag for action in make_parser()._actions for flag in action.option_strings if flag.startswith("--")}
    assert {flag for flag in flags - {"--help"} if f"`{flag}`" not in page} == set()
