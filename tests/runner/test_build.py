from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from atom_cluster.errors import ConfigError
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.messages.steps import NewRow, RowStep, StepPlan
from atom_cluster.runner.build import build_model_runner
from atom_cluster.runner.options import RunnerOptions
from tests.draft_models import draft_model_dir
from tests.processes import forking
from tests.runner.rank_process import Tokens, run_and_send, run_plans
from tests.tiny_models import VOCAB_SIZE, random_tokens, tiny_model_dir

SAMPLINGS = (SamplingParams(temperature=0.0, seed=0), SamplingParams(temperature=1.0, top_p=0.9, seed=5))
PROMPT_LEN = 21
NUM_DECODES = 12


def options(**changes: object) -> RunnerOptions:
    base = RunnerOptions(
        model_dir=str(tiny_model_dir("llama")),
        dtype="float64",
        device="cpu",
        block_size=8,
        num_blocks=32,
        max_num_requests=4,
        max_model_len=64,
        num_threads=1,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def plans() -> list[StepPlan]:
    new_rows = tuple(
        NewRow(
            row=row,
            request_id=f"r{row}",
            token_ids=tuple(random_tokens(PROMPT_LEN, seed=row)),
            num_prompt_tokens=PROMPT_LEN,
            pages=(tuple(range(row * 8, row * 8 + 8)),),
            sampling=sampling,
        )
        for row, sampling in enumerate(SAMPLINGS)
    )
    rows = range(len(SAMPLINGS))
    first = StepPlan(
        step_id=0, new_rows=new_rows, rows=tuple(RowStep(row, 0, PROMPT_LEN, samples=True) for row in rows)
    )
    decodes = [
        StepPlan(step_id=1 + i, rows=tuple(RowStep(row, PROMPT_LEN + i, 1, samples=True) for row in rows))
        for i in range(NUM_DECODES)
    ]
    return [first, *decodes]


def run(settings: RunnerOptions) -> Tokens:
    return run_plans(settings, plans())


def test_info_tells_sizes_choices_and_identity() -> None:
    runner = build_model_runner(options(dtype="auto", num_blocks=None, cpu_cache_gib=0.001))
    info = runner.info
    runner.close()
    assert (info.vocab_size, info.max_model_len, info.block_size) == (VOCAB_SIZE, 64, 8)
    # 2 layers x 2 KV heads x (16 + 16) x 4 bytes x 8 tokens; one block is spare
    assert info.num_blocks == int(0.001 * 2**30) // 4096 - 1
    assert info.choices["dtype"].startswith("float32 (auto")
    assert "cpu_cache_gib" in info.choices["kv_blocks"]
    names = {"config", "weights", "quantization", "dtype", "kv_layout", "drafting", "code"}
    assert set(info.fingerprint_fields) == names


def test_a_model_with_states_has_pages_for_them_and_says_how_many() -> None:
    settings = options(model_dir=str(tiny_model_dir("qwen3_next")), num_blocks=None, cpu_cache_gib=0.01)
    runner = build_model_runner(settings)
    info = runner.info
    runner.close()
    (states,) = info.other_groups
    assert (states.kind, states.window) == ("state", None)
    assert states.num_pages >= 4 * 2 + 16
    assert info.choices["kv_blocks"].startswith(f"{info.num_blocks}, state: {states.num_pages} (auto: cpu_cache_gib")


def test_drafts_without_layers_for_them_are_an_error_that_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"speculative: 2 tokens .*LlamaForCausalLM"):
        build_model_runner(options(num_drafts=2))


def test_no_more_drafting_layers_are_loaded_than_drafts_are_wanted() -> None:
    """As their caches tell: prefill and decode with other drafting layers must not exchange pages."""
    directory = str(draft_model_dir("glm4_moe"))
    layouts = []
    for num_drafts in (0, 1, 2, 5):
        runner = build_model_runner(options(model_dir=directory, num_drafts=num_drafts))
        assert runner.info.max_drafts == num_drafts
        layouts.append(runner.info.fingerprint_fields["kv_layout"])
        runner.close()
    assert [layout.count(",") + 1 for layout in layouts] == [3, 4, 5, 5]


def test_the_context_is_the_checkpoints_unless_configured() -> None:
    runner = build_model_runner(options(max_model_len=None))
    assert runner.info.max_model_len == 512
    runner.close()
    with pytest.raises(ConfigError, match="max_model_len 513 .* 512"):
        build_model_runner(options(max_model_len=513))


def test_a_directory_without_a_model_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        build_model_runner(options(model_dir=str(tmp_path)))


def test_dummy_weights_depend_on_the_seed_only() -> None:
    first = run(options(load_format="dummy", seed=1))
    assert run(options(load_format="dummy", seed=1)) == first
    assert run(options(load_format="dummy", seed=2)) != first


def test_an_exporting_rank_has_a_descriptor_per_transport() -> None:
    runner = build_model_runner(options(kv_transport="auto", secret=b"0123456789abcdef"))
    try:
        assert [name.partition("@")[0] for name in runner.info.kv_descriptors] == ["shm", "tcp"]
        assert "shm" in runner.info.choices["kv_transport"]
    finally:
        runner.close()


def test_two_ranks_sample_what_one_does_and_only_the_first_answers(tmp_path: Path) -> None:
    expected = run(options())
    context = forking()
    results = []
    for rank in range(2):
        receiver, sender = context.Pipe(duplex=False)
        settings = options(rank=rank, world_size=2, init_method=f"file://{tmp_path}/meeting")
        process = context.Process(target=run_and_send, args=(settings, plans(), sender), daemon=True)
        process.start()
        sender.close()
        results.append((process, receiver))
    found = [receiver.recv() for _, receiver in results]
    for process, _ in results:
        process.join(timeout=60)
    assert found == [expected, [()] * len(expected)]
