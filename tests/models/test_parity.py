"""Every registered architecture computes what transformers does: whole, in chunks, step by step, in mixed batches."""

import pytest
import torch

from atom_cluster.config.ops import OpsConfig
from atom_cluster.models.registry import ARCHITECTURES, load_model
from atom_cluster.ops.select import select_ops
from atom_cluster.platform.detect import detect_platform
from tests.models.paged_driver import PagedDriver, make_context
from tests.tiny_models import TINY_MODELS, random_tokens, reference_logits, tiny_model_dir


def make_driver(name: str, *, backend: str = "torch", stored: str = "float32") -> PagedDriver:
    ops = select_ops(OpsConfig(backend=backend), detect_platform("cpu"), torch.float32)
    model = load_model(tiny_model_dir(name, stored), context=make_context(ops), max_model_len=512)
    return PagedDriver(model)


def assert_matches(actual: torch.Tensor, name: str, tokens: list[int], stored: str = "float32") -> None:
    expected = reference_logits(name, tokens, stored)
    torch.testing.assert_close(actual, expected, atol=TINY_MODELS[name].tolerance, rtol=0)


@pytest.fixture(params=["torch", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_whole_prompt_and_the_steps_after_it_match(name: str, backend: str) -> None:
    tokens = random_tokens(46)
    driver = make_driver(name, backend=backend)
    steps = [driver.step([(0, tokens[:40])])] + [driver.step([(0, [token])]) for token in tokens[40:]]
    assert_matches(torch.cat([logits[0] for logits in steps]), name, tokens)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_mixed_batches_of_chunks_and_decodes_match(name: str, backend: str) -> None:
    long, short, other = random_tokens(45, seed=1), random_tokens(11, seed=2), random_tokens(6, seed=3)
    driver = make_driver(name, backend=backend)
    plan = [
        [(0, long[:13]), (1, short[:5])],
        [(1, short[5:6]), (0, long[13:40])],
        [(0, long[40:41]), (1, short[6:7]), (2, other[:5])],
        [(2, other[5:6]), (0, long[41:42]), (1, short[7:11])],
        [(0, long[42:45])],
    ]
    found: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    for rows in plan:
        for (row, _), logits in zip(rows, driver.step(rows)):
            found[row].append(logits)
    for row, tokens in enumerate((long, short, other)):
        assert_matches(torch.cat(found[row]), name, tokens)


@pytest.mark.parametrize("name", ["llama", "qwen2", "glm4_moe"])
def test_a_bfloat16_checkpoint_computed_in_float32_matches(name: str, backend: str) -> None:
    tokens = random_tokens(30)
    driver = make_driver(name, backend=backend, stored="bfloat16")
    logits = driver.step([(0, tokens[:29])])[0], driver.step([(0, tokens[29:])])[0]
    assert_matches(torch.cat(logits), name, tokens, "bfloat16")


def test_rotation_beyond_the_original_context_matches() -> None:
    tokens = random_tokens(300)
    for name in ("llama", "llama_yarn"):
        logits = make_driver(name, backend="cpu").step([(0, tokens)])[0]
        assert_matches(logits, name, tokens)


def test_every_registered_architecture_has_a_tiny_model_here() -> None:
    assert set(ARCHITECTURES) == {tiny.architecture for tiny in TINY_MODELS.values()}
