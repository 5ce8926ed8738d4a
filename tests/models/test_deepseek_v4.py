"""DeepSeek-V4 as its makers name and configure it, in pages of any size, and behind rejected drafts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from atom_cluster.errors import ConfigError
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.registry import load_model, spec_from_config
from atom_cluster.models.spec import ModelSpec
from atom_cluster.ops.select import torch_table
from tests.models.paged_driver import PagedDriver, make_context
from tests.tiny_models import TINY_MODELS, random_tokens, reference_logits, tiny_model_dir

TOKENS = random_tokens(50, seed=4)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_HUB_NAMES = (
    (r"^model\.embed_tokens\.", "embed."),
    (r"^model\.hc_head\.hc_", "hc_head_"),
    (r"^model\.", ""),
    (r"\.attn\.norm\.", ".attn.kv_norm."),
)


def driver(directory: Path, *, block_size: int = 4) -> PagedDriver:
    model = load_model(directory, context=make_context(torch_table("test")), max_model_len=512)
    return PagedDriver(model, block_size=block_size)


def assert_right(logits: torch.Tensor, tokens: list[int]) -> None:
    expected = reference_logits("deepseek_v4", tokens)[-len(logits) :]
    torch.testing.assert_close(logits, expected, atol=TINY_MODELS["deepseek_v4"].tolerance, rtol=0)


def tiny_config() -> dict[str, object]:
    values: dict[str, object] = json.loads((tiny_model_dir("deepseek_v4") / "config.json").read_text())
    return values


def hub_config() -> dict[str, object]:
    """The tiny model's, with the keys of the makers; two of its values cannot be told by them."""
    config = tiny_config()
    rope = {**config.pop("rope_parameters")["compress"], "type": "yarn"}  # type: ignore[index]
    for key in ("rope_type", "rope_theta", "partial_rotary_factor", "attention_factor"):
        rope.pop(key)
    for key in ("layer_types", "mlp_layer_types", "compress_rates", "partial_rotary_factor"):
        config.pop(key)
    return config | {
        "compress_ratios": [0, 4, 128, 4, 0],
        "num_hash_layers": 1,
        "qk_rope_head_dim": 8,
        "rope_scaling": rope,
    }


def spec_of(values: dict[str, object]) -> ModelSpec:
    return spec_from_config(HfConfig(values))


def hub_tensors() -> dict[str, torch.Tensor]:
    tensors = load_file(tiny_model_dir("deepseek_v4") / "model.safetensors")
    for pattern, replacement in _HUB_NAMES:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    return tensors


def save(tensors: dict[str, torch.Tensor], config: dict[str, object], directory: Path) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_the_makers_names_and_keys(tmp_path: Path) -> None:
    tensors = hub_tensors()
    # Layers for drafting, which are not built, and a narrower table of experts.
    tensors["mtp.0.e_proj.weight"] = torch.zeros(3, 3)
    tensors["layers.0.ffn.gate.tid2eid"] = tensors["layers.0.ffn.gate.tid2eid"].int()
    directory = save(tensors, hub_config() | {"compress_rate_hca": 8}, tmp_path / "hub")
    assert_right(driver(directory).step([(0, TOKENS)])[0], TOKENS)  # type: ignore[index]


@pytest.mark.parametrize("expert_dtype", ["fp4", None])
def test_the_makers_quantization(tmp_path: Path, expert_dtype: str | None) -> None:
    """Codes with exponents stand for what plain floats say; the rest is how inputs are rounded."""
    generator = torch.Generator().manual_seed(0)
    plain, quantized = hub_tensors(), {}
    for name, tensor in plain.items():
        if not re.fullmatch(r".*(\.wq_a|attn\.wq_b|attn\.wkv|wo_a|wo_b|w[123])\.weight", name):
            quantized[name] = tensor
        elif expert_dtype == "fp4" and ".experts." in name:
            codes = torch.randint(0, 256, (len(tensor), tensor.shape[1] // 2), dtype=torch.uint8, generator=generator)
            exponents = torch.randint(
                121, 124, (len(tensor), tensor.shape[1] // 32), dtype=torch.uint8, generator=generator
            )
            quantized |= {name: codes.view(torch.int8), scale_of(name): exponents.view(torch.float8_e8m0fnu)}
            nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1).long()
            plain[name] = E2M1[nibbles] * 2.0 ** (exponents.float() - 127).repeat_interleave(32, dim=1)
        else:
            rows, columns = (-(-size // 16) for size in tensor.shape)
            exponents = torch.randint(119, 121, (rows, columns), dtype=torch.uint8, generator=generator)
            scale = 2.0 ** (exponents.float() - 127).repeat_interleave(16, 0).repeat_interleave(16, 1)
            scale = scale[: len(tensor), : tensor.shape[1]]
            codes = (tensor / scale).to(torch.float8_e4m3fn)
            quantized |= {name: codes, scale_of(name): exponents.view(torch.float8_e8m0fnu)}
            plain[name] = codes.float() * scale
    method = {"quant_method": "fp8", "weight_block_size": [16, 16], "scale_fmt": "ue8m0"}
    config = hub_config() | {"compress_rate_hca": 8, "expert_dtype": expert_dtype}
    whole = driver(save(plain, config, tmp_path / "plain")).step([(0, TOKENS)])
    rounded = driver(save(quantized, {**config, "quantization_config": method}, tmp_path / "quantized")).step(
        [(0, TOKENS)]
    )
    assert whole is not None and rounded is not None
    assert torch.corrcoef(torch.stack((whole[0].flatten(), rounded[0].flatten())))[0, 1] > 0.95


def scale_of(name: str) -> str:
    return name.removesuffix("weight") + "scale"


def test_the_makers_keys_mean_what_transformers_takes_them_for() -> None:
    hub = hub_config()
    theirs = AutoConfig.for_model(**hub).to_dict()
    assert spec_of(hub) == spec_of({**theirs, "architectures": hub["architectures"]})


def test_layers_that_no_key_tells_are_those_of_transformers() -> None:
    bare = {key: value for key, value in hub_config().items() if key not in ("compress_ratios", "num_hash_layers")}
    bare["num_hidden_layers"] = 7
    theirs = AutoConfig.for_model(**bare).to_dict()
    assert spec_of(bare) == spec_of({**theirs, "architectures": bare["architectures"]})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types has no compressed layers"),
        ({"layer_types": ["full_attention"] * 4}, "'full_attention' is not supported"),
        ({"layer_types": None, "compress_ratios": [0, 4, 8, 4]}, "compress_ratios 8 is not supported"),
        ({"mlp_layer_types": ["moe"]}, "must name 4 layers, got 1"),
        ({"o_groups": 3}, "o_groups must divide the 4 attention heads"),
        ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not supported"),
        ({"num_key_value_heads": 2}, "num_key_value_heads 2 is not supported"),
    ],
)
def test_what_no_layer_can_run_is_refused(values: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        spec_of({**tiny_config(), **values})


@pytest.mark.parametrize("block_size", [1, 2, 8, 16])
def test_pages_of_any_size_that_fits(block_size: int) -> None:
    rows = driver(tiny_model_dir("deepseek_v4"), block_size=block_size)
    cuts = (0, 5, 6, 7, 8, 30, 43, 44, 50)
    steps = [rows.step([(0, TOKENS[start:end])]) for start, end in zip(cuts, cuts[1:])]
    assert_right(torch.cat([logits[0] for logits in steps]), TOKENS)  # type: ignore[index]


def test_pages_that_cut_entries_are_refused() -> None:
    with pytest.raises(ConfigError, match="cache.block_size = 12 .* 8 tokens"):
        driver(tiny_model_dir("deepseek_v4"), block_size=12)


def test_rejected_drafts_leave_nothing_behind() -> None:
    rows = driver(tiny_model_dir("deepseek_v4"))
    rows.step([(0, TOKENS[:13])])
    for start in range(13, 45, 2):
        drafted = [*TOKENS[start : start + 2], *random_tokens(3, seed=start)]
        logits = rows.step([(0, drafted)])
        assert_right(logits[0][:2], TOKENS[: start + 2])  # type: ignore[index]
        rows.take_back(0, 3)
