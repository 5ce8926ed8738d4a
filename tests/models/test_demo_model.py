"""The small real model, in the fastest configuration, says what transformers says in float32."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from atom_cluster.config.ops import OpsConfig
from atom_cluster.models.registry import load_model
from atom_cluster.ops.select import select_ops
from atom_cluster.platform.detect import detect_platform
from tests.models.paged_driver import PagedDriver, make_context

NUM_STEPS = 24


@pytest.mark.demo_model
def test_greedy_tokens_equal_those_of_transformers(demo_model: Path) -> None:
    prompt = list(range(1000, 1040))
    reference = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    with torch.inference_mode():
        generated = reference.generate(
            torch.tensor([prompt]), max_new_tokens=NUM_STEPS, do_sample=False, eos_token_id=None, pad_token_id=2
        )
    expected = generated[0, len(prompt) :].tolist()
    ops = select_ops(OpsConfig(), detect_platform("cpu"), torch.float32)
    driver = PagedDriver(load_model(demo_model, context=make_context(ops), max_model_len=256), block_size=16)
    found, tokens = [], prompt
    for _ in range(NUM_STEPS):
        tokens = [int(driver.step([(0, tokens)])[0][-1].argmax())]
        found += tokens
    assert found == expected
