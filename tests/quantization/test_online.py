"""A float checkpoint quantized while it is loaded computes what the same checkpoint quantized beforehand does."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from atom_cluster.config.quantization import QuantizationConfig
from atom_cluster.errors import ConfigError
from atom_cluster.models import registry
from atom_cluster.models.registry import LoadableCausalLM, describe_weights, load_model
from atom_cluster.ops.quantized import dequantize
from atom_cluster.ops.select import torch_table
from atom_cluster.quantization.quantize import QUANTIZERS, quantize_int4
from tests.models.paged_driver import PagedDriver, make_context
from tests.quantization.checkpoints import write_pair
from tests.quantization.formats import FORMATS, Pack, float8, int8_channel, mxfp4
from tests.tiny_models import random_tokens, tiny_model_dir

TWINS: dict[str, Pack] = {
    "mxfp8": float8((1, 32), is_e8m0=True),
    "mxfp4": mxfp4("codes", "scale"),
    "int8": int8_channel,
}


def load(directory: Path, **quantization: object) -> LoadableCausalLM:
    context = make_context(torch_table("test"), dtype=torch.float64)
    return load_model(
        directory, context=context, max_model_len=64, quantization=QuantizationConfig.model_validate(quantization)
    )


def logits(model: LoadableCausalLM) -> torch.Tensor:
    return PagedDriver(model).step([(0, random_tokens(30))])[0]


def test_every_format_has_a_quantizer() -> None:
    assert QUANTIZERS.keys() == TWINS.keys() | {"fp8", "fp8_block", "int4"}


@pytest.mark.parametrize("name", TWINS)
def test_weights_are_rounded_as_in_checkpoints(name: str) -> None:
    weight = torch.randn(200, 320, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    weight[:, 64:96] *= 30
    found = dequantize(QUANTIZERS[name](weight), torch.float64)
    weight[3] = 1  # so that the twin does not divide by zero
    expected = TWINS[name](weight.double())[1]
    assert found[3].abs().max() == 0
    rows = [row for row in range(200) if row != 3]
    torch.testing.assert_close(found[rows], expected[rows], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("name", "granularity"), [("fp8", "channel"), ("fp8_block", (128, 128))])
def test_float8_searches_scales_that_fit_better_than_those_of_the_largest_number(
    name: str, granularity: str | tuple[int, int]
) -> None:
    weight = torch.randn(200, 320, generator=torch.Generator().manual_seed(0))
    weight[:, 64:96] *= 30
    quantized = QUANTIZERS[name](weight)
    found, plain = dequantize(quantized, torch.float64), float8(granularity)(weight.double())[1]
    assert (found - weight).norm() < (plain - weight).norm() * 0.999
    # One rounding of the nearest numbers: at most a sixteenth of each.
    assert ((found - weight).abs() / weight.abs().clamp(min=0.01)).max() < 1 / 15


def test_int4_is_exact_on_sixteen_equal_steps_and_better_than_rounding_within_the_range() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(0, 16, (8, 64), generator=generator)
    steps[:, ::32], steps[:, 1::32] = 0, 15
    exact = steps * 0.01 - 0.0733
    found = dequantize(quantize_int4(exact), torch.float32)
    torch.testing.assert_close(found, exact, atol=1e-4, rtol=0)
    normal = torch.randn(64, 320, generator=generator)
    groups = normal.view(64, -1, 32)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    plain = ((groups - low) / (high - low) * 15).round() / 15 * (high - low) + low
    error = (dequantize(quantize_int4(normal), torch.float32) - normal).norm()
    assert error < 0.95 * (plain.view_as(normal) - normal).norm()
    assert torch.equal(dequantize(quantize_int4(torch.zeros(2, 32)), torch.float32), torch.zeros(2, 32))


@pytest.mark.parametrize(
    ("name", "online", "form"),
    [("llama", "int8", "ct_int8"), ("qwen3_moe", "int8", "ct_int8"), ("llama", "mxfp4", "ct_mxfp4")],
)
def test_a_model_computes_what_the_quantized_checkpoint_does(name: str, online: str, form: str, tmp_path: Path) -> None:
    quantized, _ = write_pair(name, FORMATS[form], tmp_path)
    found = logits(load(tiny_model_dir(name), online=online))
    # Scales of checkpoints are computed in another precision; a handful of codes differ by it.
    torch.testing.assert_close(found, logits(load(quantized)), atol=2e-2, rtol=0)
    assert (found - logits(load(tiny_model_dir(name)))).abs().max() > 2e-2


def test_excluded_layers_the_head_and_routers_stay_as_they_are() -> None:
    found = describe_weights(load(tiny_model_dir("qwen3_moe"), online="fp8", exclude=["model.layers.1", "mlp.experts"]))
    counts = {name: int(count) for count, name in (part.split(" ", 1) for part in found.split(", "))}
    # Layer 0: attention's two and the dense MLP's two; layer 2: attention's two.
    assert counts["float8 per channel (inputs float8 per token)"] == 6
    # Layer 1: attention's two; two routers; the head.
    assert counts["float64"] == 2 + 2 + 1


def test_parts_are_quantized_before_the_next_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[LoadableCausalLM] = []
    num_finished: list[int] = []
    build, read = registry.build_model, registry.load_weights

    def build_model(*args: object, **kwargs: object) -> LoadableCausalLM:
        built.append(build(*args, **kwargs))
        return built[0]

    def load_weights(*args: object, **kwargs: object) -> None:
        num_finished.append(sum(is_finished(layer.linear_ops) for layer in built[0].layers))
        read(*args, **kwargs)

    monkeypatch.setattr(registry, "build_model", build_model)
    monkeypatch.setattr(registry, "load_weights", load_weights)
    load(tiny_model_dir("llama"), online="int8")
    assert num_finished == [0, 0, 1, 2, 2]  # embedding, two layers, norm, head


def is_finished(linear_ops: Callable[[], object]) -> bool:
    try:
        linear_ops()
    except AttributeError:
        return False
    return True


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    quantized, _ = write_pair("llama", FORMATS["awq"], tmp_path)
    with pytest.raises(ConfigError, match=r"quantization\.online is fp8, and the checkpoint is quantized already"):
        load(quantized, online="fp8")
