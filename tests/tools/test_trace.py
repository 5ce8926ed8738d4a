from __future__ import annotations

import sys
from pathlib import Path

import openpyxl
import pytest

from atom_cluster import LLMEngine, SamplingParams
from atom_cluster.config.observability import ProfileConfig
from atom_cluster.errors import ConfigError
from atom_cluster.tools.__main__ import main
from atom_cluster.tools.trace.breakdown import Breakdown, break_down, percentile
from atom_cluster.tools.trace.events import Work, _innermost, read_trace
from atom_cluster.tools.trace.groups import GROUPS, group_of, own_kernels
from tests.tiny_models import random_tokens, tiny_model_dir
from tests.tools.hand_made_trace import ATTENTION, COPY, GEMM, MEMSET, NORM, write_trace


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return write_trace(tmp_path / "d_rank0_now.pt.trace.json.gz")


@pytest.fixture
def breakdown(trace: Path) -> Breakdown:
    return break_down(read_trace(trace))


def test_steps_are_found_by_their_labels_and_have_the_work_launched_in_them(trace: Path) -> None:
    found = read_trace(trace)
    assert found.device == "Some GPU"
    assert [step.phase for step in found.steps] == ["prefill", "decode bs=2", "decode bs=2", "decode bs=2"]
    assert [[work.name for work in step.work] for step in found.steps] == [
        [GEMM, ATTENTION],
        [GEMM, NORM, COPY],
        [GEMM, NORM, MEMSET, COPY],
        [GEMM, GEMM],
    ]
    assert [(step.phase, step.sizes, len(step.work)) for step in found.drafts] == [("draft", {"bs": 2, "k": 1}, 1)]


def test_times_of_kernels_groups_and_idle_add_up_to_the_steps(breakdown: Breakdown) -> None:
    decode, prefill, draft = breakdown.phases
    assert (decode.name, prefill.name, draft.name, draft.is_part) == ("decode bs=2", "prefill", "draft", True)
    assert decode.step_us == (21.0, 31.0, 35.0)
    assert decode.period_us == (30.0, 50.0)
    assert decode.idle_of_periods == pytest.approx(1 - (15 + 20) / 80)
    assert decode.us_by_group == pytest.approx({"gemm": 35 / 3, "norm": 8 / 3, "copy": 7 / 3})
    assert decode.busy_us + decode.idle_us == pytest.approx(decode.mean_step_us)
    assert decode.idle_us == pytest.approx((6 + 11 + 20) / 3)
    gemm = decode.rows[0]
    assert (gemm.name, gemm.calls_per_step, gemm.us_per_step) == (GEMM, pytest.approx(4 / 3), pytest.approx(35 / 3))
    norm = next(row for row in decode.rows if row.name == NORM)
    assert (norm.us_per_step, norm.mean_us) == (pytest.approx(8 / 3), 6.0)  # 2 of each 6 us beside the gemm
    assert sum(row.share for row in decode.rows) == pytest.approx(1.0)
    assert prefill.us_by_group == {"gemm": 30.0, "attention": 10.0}
    assert (prefill.idle_us, prefill.idle_share, prefill.period_us) == (10.0, pytest.approx(0.2), ())
    assert (draft.us_by_group, draft.step_us) == ({"gemm": 5.0}, (5.0,))


def test_gaps_say_between_what_the_device_waited(breakdown: Breakdown) -> None:
    gaps = [(gap.idle_us, gap.where, gap.before, gap.after) for gap in breakdown.gaps]
    assert gaps[:4] == [
        (20.0, "between prefill and decode bs=2", ATTENTION, GEMM),
        (20.0, "in decode bs=2", GEMM, GEMM),
        (19.0, "between decode bs=2 and decode bs=2", COPY, GEMM),
        (10.0, "in prefill", GEMM, ATTENTION),
    ]
    assert breakdown.span_us == 185.0
    assert breakdown.idle_between_steps_us == 20 + 9 + 19
    assert breakdown.idle_in_steps_us == 10 + 6 + 11 + 20


def test_the_command_writes_a_workbook_a_summary_and_pictures(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(["trace", str(trace), "--output", str(output)]) == 0
    assert "decode bs=2" in capsys.readouterr().out
    assert sorted(path.name for path in output.iterdir()) == [
        "breakdown.xlsx",
        "decode_bs_2.png",
        "draft.png",
        "prefill.png",
        "summary.md",
    ]
    book = openpyxl.load_workbook(output / "breakdown.xlsx")
    assert book.sheetnames == ["summary", "decode bs=2", "prefill", "draft", "gaps"]
    header, decode, *_ = book["summary"].iter_rows(values_only=True)
    values = dict(zip(header, decode))
    assert (values["phase"], values["steps"], values["step p50 us"], values["step p99 us"]) == (
        "decode bs=2",
        3,
        31,
        35,
    )
    assert values["p99/p50"] == pytest.approx(35 / 31)
    rows = list(book["prefill"].iter_rows(min_row=2, max_col=6, values_only=True))
    assert rows[0] == (GEMM, "gemm", 1, 30, 0.75, 30)
    summary = (output / "summary.md").read_text()
    assert "![decode bs=2](decode_bs_2.png)" in summary
    assert "| idle | 10.00 | 20.0% |" in summary


def test_a_trace_of_a_cpu_run_is_broken_down_by_op(tmp_path: Path) -> None:
    with LLMEngine(
        tiny_model_dir("llama"),
        device="cpu",
        num_blocks=64,
        num_threads=1,
        profile=ProfileConfig(directory=str(tmp_path)),
    ) as engine:
        engine.start_profile()
        prompts = [random_tokens(6, seed=seed) for seed in range(2)]
        engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
        (file,) = engine.stop_profile()
    found = read_trace(file)
    assert found.device == "CPU"
    assert [step.phase for step in found.steps] == ["prefill", *["decode bs=2"] * 3]
    for phase in break_down(found).phases:
        assert 0 < phase.busy_us <= phase.mean_step_us
        assert "gemm" in phase.us_by_group


def test_an_op_is_given_the_time_in_which_no_other_op_ran_inside_it() -> None:
    pieces = _innermost([Work("a", 0, 10, 1), Work("b", 2, 5, 1), Work("c", 2, 3, 1), Work("d", 12, 13, 1)])
    assert [(piece.name, piece.start_us, piece.end_us, piece.num_calls) for piece in pieces] == [
        ("a", 0, 2, 1),
        ("b", 2, 2, 1),
        ("c", 2, 3, 1),
        ("b", 3, 5, 0),
        ("a", 5, 10, 0),
        ("d", 12, 13, 1),
    ]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_sm90_tst_64x152_64x7_2x1_v_bz_TNT", "gemm"),
        ("Cijk_Alik_Bljk_BBS_BH_MT256x256x64", "gemm"),
        ("aten::addmm", "gemm"),
        ("_prefill_kernel", "attention"),
        ("void flash_fwd_splitkv_kernel<...>", "attention"),
        ("_rms_norm_kernel", "norm"),
        ("_rotary_kernel", "rotary/kv"),
        ("_store_kernel", "rotary/kv"),
        ("_gate_and_mul_kernel", "activation"),
        ("_route_kernel", "moe"),
        ("_race_kernel", "sampling"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("Memcpy HtoD (Pinned -> Device)", "copy"),
        ("something_else", "other"),
    ],
)
def test_kernels_are_grouped_by_name(name: str, group: str) -> None:
    assert group_of(name) == group


def test_every_group_of_our_own_kernels_is_one_of_the_groups() -> None:
    assert set(own_kernels().values()) <= set(GROUPS)
    assert {"gemm", "attention", "moe", "norm", "rotary/kv", "sampling"} <= set(own_kernels().values())


def test_percentiles_are_values_that_there_are() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, percent) for percent in (50, 99, 100)] == [50, 99, 100]
    assert percentile([3.0], 99) == 3.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a trace"),
        (b"\x1f\x8b not gzip", "cannot be read as a trace"),
        (b"[]", "it has no traceEvents"),
        (b'{"traceEvents": [{"ph": "X", "ts": 1, "dur": 2, "name": "x", "cat": "kernel"}]}', "no labelled steps"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "trace.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_trace(file)


@pytest.mark.parametrize(("module", "message"), [("openpyxl", "tables need"), ("matplotlib.figure", "pictures need")])
def test_a_missing_library_is_named(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["trace", str(trace)]) == 1
    assert message in capsys.readouterr().err


def test_replayed_graphs_of_a_real_gpu_belong_to_the_steps_that_launched_them() -> None:
    """From an H200: three layers of Qwen3-0.6B's shape, a step with four prompts, five decode steps as graphs."""
    found = read_trace(Path(__file__).with_name("h200_decode_graphs.pt.trace.json.gz"))
    assert found.device == "NVIDIA H200"
    assert [step.phase for step in found.steps] == ["prefill", *["decode bs=4"] * 5]
    num_norms = [sum(work.name == "_rms_norm_kernel" for work in step.work) for step in found.steps]
    assert num_norms == [7] * 6  # two per layer, and the last one
    assert sum(len(step.work) for step in found.steps) == len(found.work)
