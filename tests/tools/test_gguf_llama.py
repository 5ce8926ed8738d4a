from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer

from atom_cluster.errors import WeightsError
from atom_cluster.tools.gguf_llama import convert_gguf
from tests.tools.tiny_gguf import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, write_gguf


def interleave(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """The row order of a GGUF file: rows r and r + head_dim / 2 of a head become neighbours."""
    rows = [
        head * HEAD_DIM + half * HEAD_DIM // 2 + row
        for head in range(num_heads)
        for row in range(HEAD_DIM // 2)
        for half in (0, 1)
    ]
    return weight[rows]


@pytest.fixture
def query() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(HEADS * HEAD_DIM, HIDDEN)).astype(np.float32)


@pytest.fixture
def key() -> NDArray[np.float32]:
    """All of 0..15 in each block of 32, which Q4_1 keeps exactly: any loss is a mistake of the conversion."""
    levels = np.random.default_rng(1).integers(0, 16, size=(KV_HEADS * HEAD_DIM, HIDDEN)).astype(np.float32)
    levels[:, 0::32], levels[:, 1::32] = 0, 15
    return levels


@pytest.fixture
def converted(tmp_path: Path, query: NDArray[np.float32], key: NDArray[np.float32]) -> Path:
    weights = {
        "token_embd.weight": np.eye(6, HIDDEN, dtype=np.float32),
        "blk.0.attn_q.weight": interleave(query, HEADS),
        "blk.0.attn_k.weight": interleave(key, KV_HEADS),
        "blk.0.ffn_down.weight": np.ones((HIDDEN, 32), dtype=np.float32),
        "output_norm.weight": np.ones(HIDDEN, dtype=np.float32),
    }
    write_gguf(tmp_path / "model.gguf", weights)
    target = tmp_path / "out"
    target.mkdir()
    convert_gguf(tmp_path / "model.gguf", target, lambda line: None)
    return target


def test_weights_get_their_names_and_row_order_back(
    converted: Path, query: NDArray[np.float32], key: NDArray[np.float32]
) -> None:
    weights = load_file(converted / "model.safetensors")
    assert set(weights) == {
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.norm.weight",
    }
    expected = torch.from_numpy(query).to(torch.bfloat16)
    assert torch.equal(weights["model.layers.0.self_attn.q_proj.weight"], expected)
    assert torch.equal(weights["model.layers.0.self_attn.k_proj.weight"].float(), torch.from_numpy(key))


def test_the_tokenizer_merges_and_isolates_digits(converted: Path) -> None:
    tokenizer = Tokenizer.from_file(str(converted / "tokenizer.json"))
    assert tokenizer.encode("ab12<|end|>").ids == [3, 4, 5, 0]
    assert tokenizer.decode([3, 4]) == "ab1"


def test_the_configuration_describes_the_model(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert config["num_key_value_heads"] == KV_HEADS
    assert config["head_dim"] == HEAD_DIM
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["rms_norm_eps"] == 1e-5
    tokenizer_config = json.loads((converted / "tokenizer_config.json").read_text())
    assert tokenizer_config["eos_token"] == "<|end|>"
    assert (converted / "chat_template.jinja").read_text() == tokenizer_config["chat_template"] == "{{ messages }}"


def test_an_unexpected_tensor_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", {"blk.0.strange.weight": np.ones(8, dtype=np.float32)})
    with pytest.raises(WeightsError, match=r"unexpected tensor `blk\.0\.strange\.weight`"):
        convert_gguf(tmp_path / "model.gguf", tmp_path, lambda line: None)


def test_another_pre_tokenizer_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", {"output_norm.weight": np.ones(8, dtype=np.float32)}, pre="llama-bpe")
    with pytest.raises(WeightsError, match="pre-tokenizer llama-bpe"):
        convert_gguf(tmp_path / "model.gguf", tmp_path, lambda line: None)
