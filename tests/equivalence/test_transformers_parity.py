"""Greedy output equals that of transformers' own generate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from atom_cluster import LLMEngine, SamplingParams
from tests.equivalence.generation import FAMILIES
from tests.tiny_models import random_tokens, reference_model, tiny_model_dir

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "Water boils at",
    "The three laws of motion are",
    "Dear Sir or Madam,",
    "1, 1, 2, 3, 5, 8,",
    "In 1969, humans first",
    "The quick brown fox",
    "A recipe for pancakes:",
    "import numpy as np\n\n",
    "Q: What is the largest planet?\nA:",
    "Photosynthesis is the process by which",
    "To be, or not to be,",
    "The difference between a list and a tuple is",
    "SELECT name FROM users WHERE",
    "Once the train had left the station,",
    "My favourite book is",
    "Die Hauptstadt von Deutschland ist",
    "The chemical symbol for gold is",
)


@torch.inference_mode()
def most_likely_continuation(model: PreTrainedModel, prompt: list[int], output: list[int]) -> list[int]:
    """What transformers finds most likely after each prefix of an output.

    If that is the output itself, then by induction so is greedy generation, which would take ten times as long.
    """
    logits = model(torch.tensor([prompt + output[:-1]])).logits[0]
    tokens: list[int] = logits[len(prompt) - 1 :].argmax(-1).tolist()
    return tokens


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_tiny_models_continue_prompts_as_transformers_does(name: str, backend: str) -> None:
    prompts = [random_tokens(length, seed=length) for length in (1, 7, 16, 33, 90)]
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    with LLMEngine(
        tiny_model_dir(name), device="cpu", dtype="float32", num_blocks=64, num_threads=1, ops_backend=backend
    ) as engine:
        outputs = engine.generate(prompts, params)
    for prompt, output in zip(prompts, outputs):
        assert output["token_ids"] == most_likely_continuation(reference_model(name), prompt, output["token_ids"])


@pytest.mark.demo_model
def test_the_demo_model_continues_twenty_prompts_as_transformers_does(demo_model: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    with LLMEngine(demo_model, device="cpu", dtype="float32", num_threads=1, cpu_cache_gib=0.25) as engine:
        outputs = engine.generate(PROMPTS, params)
        prompts = [list(engine.encode(prompt)) for prompt in PROMPTS]
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    for output, prompt in zip(outputs, prompts):
        assert len(output["token_ids"]) == 64
        assert output["token_ids"] == most_likely_continuation(model, prompt, output["token_ids"])
