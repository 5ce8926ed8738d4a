import pytest

from atom_cluster.layers.forward_batch import ForwardBatch
from atom_cluster.runner.profiling import largest_step, step_plans
from tests.runner.context_model import BLOCK, MAX_MODEL_LEN, ContextModel, make_memory, make_runner


@pytest.mark.parametrize(
    ("num_requests", "model_len", "num_tokens", "expected"),
    [
        (4, 100, 50, [1, 1, 1, 47]),
        (4, 20, 50, [1, 9, 20, 20]),
        (2, 20, 50, [20, 20]),
        (8, 20, 3, [1, 1, 1]),
        (1, 20, 7, [7]),
    ],
)
def test_the_largest_step_uses_all_rows_and_tokens_it_can(
    num_requests: int, model_len: int, num_tokens: int, expected: list[int]
) -> None:
    found = largest_step(max_num_requests=num_requests, max_model_len=model_len, max_num_batched_tokens=num_tokens)
    assert found == expected


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_the_profiled_steps_run_with_every_kind_of_cache_and_verify_drafts(num_drafts: int) -> None:
    class Model(ContextModel):
        def _fold_states(self, batch: ForwardBatch) -> list[int]:
            return [0] * len(batch.token_ids)  # rows share pages of states

    model = Model(window=6, has_state=True, num_draft_layers=min(1, num_drafts))
    plans, num_pages = step_plans(
        [1, 1, 9, 40, 40],
        layout=model.kv_layout,
        block_size=BLOCK,
        max_model_len=MAX_MODEL_LEN,
        num_drafts=num_drafts,
    )
    runner = make_runner(model=model, num_rows=5, memory=make_memory(model, num_pages), max_drafts=num_drafts)
    results = [runner.run(plan) for plan in plans]
    assert [len(result.sampled) for result in results] == ([5, 3] if num_drafts else [5])
    assert num_pages[2] == 1 + num_drafts
