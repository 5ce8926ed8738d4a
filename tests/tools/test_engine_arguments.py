from __future__ import annotations

import argparse

import pytest

from atom_cluster.errors import ConfigError
from atom_cluster.tools.engine_arguments import EngineArguments, add_engine_arguments, engine_arguments, kebab


def parse(*arguments: str) -> EngineArguments:
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    return engine_arguments(parser.parse_args(kebab(arguments)))


def test_kebab_and_snake_case_mean_the_same() -> None:
    kebabs = ("--max-num-seqs", "8", "--kv-cache-dtype=fp8", "--no-enable-prefix-caching", "--load-dummy")
    snakes = ("--max_num_seqs", "8", "--kv_cache_dtype=fp8", "--no-enable_prefix_caching", "--load_dummy")
    assert parse(*kebabs) == parse(*snakes)
    assert kebab(["--model", "a_b", "--model=c_d", "-tp"]) == ["--model", "a_b", "--model=c_d", "-tp"]


def test_options_become_those_of_the_engine() -> None:
    arguments = parse(
        *("--model", "m", "-tp", "4", "--kv_cache_dtype", "fp8", "--block-size", "32", "--max-model-len", "4096"),
        *("--gpu-memory-utilization", "0.8", "--max-num-seqs", "64", "--max-num-batched-tokens", "2048"),
        *("--load_dummy", "--method", "mtp", "--num-speculative-tokens", "3", "--torch-profiler-dir", "/traces"),
        *("--online_quant_config", '{"global_quant_config": "ptpc_fp8", "exclude_layer": ["lm_head"]}'),
    )
    assert (arguments.model, arguments.tensor_parallel_size, arguments.kv_dtype) == ("m", 4, "fp8")
    assert (arguments.block_size, arguments.max_model_len, arguments.memory_fraction) == (32, 4096, 0.8)
    assert (arguments.max_num_requests, arguments.max_num_batched_tokens) == (64, 2048)
    assert arguments.load_format == "dummy"
    assert arguments.speculative is not None and arguments.speculative.num_tokens == 3
    assert (arguments.quantization.online, arguments.quantization.exclude) == ("fp8", ("lm_head",))
    assert arguments.profile.directory == "/traces"
    assert arguments.notes == ()


@pytest.mark.parametrize("words", [["[1,2,8]"], ["1", "2", "8"], ["8", "2", "1", "2"], ["[1, 2, 8]"]])
def test_capture_sizes_come_as_a_list_or_as_words(words: list[str]) -> None:
    assert parse("--cudagraph-capture-sizes", *words).compilation.capture_sizes == (1, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "graph_mode", "is_noted"),
    [
        ([], "full_and_piecewise", False),
        (["--enforce-eager"], "none", False),
        (["--level", "0"], "none", False),
        (["--cudagraph-mode", "NONE"], "none", False),
        (["--cudagraph-mode", "full"], "full", False),
        (["--level", "3"], "full_and_piecewise", True),
        (["--level", "3", "--cudagraph-mode", "FULL"], "full", True),
        (["--cudagraph-mode", "FULL", "--enforce-eager"], "none", False),
        (["--cudagraph-mode", "FULL_DECODE_ONLY"], "full", False),
        (["--cudagraph-mode", "FULL_AND_PIECEWISE"], "full_and_piecewise", False),
        (["--cudagraph-mode", "PIECEWISE"], "full_and_piecewise", True),
        (["--load-dummy", "zero"], "full_and_piecewise", True),
        (["--trust-remote-code"], "full_and_piecewise", True),
    ],
)
def test_graph_modes_and_levels_become_what_there_is_here(
    arguments: list[str], graph_mode: str, is_noted: bool
) -> None:
    found = parse(*arguments)
    assert found.compilation.graph_mode == graph_mode
    assert bool(found.notes) == is_noted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cudagraph-mode", "AF_PIECEWISE"], "use FULL_AND_PIECEWISE"),
        (["--method", "eagle3"], "use mtp"),
        (["--method", "mtp", "--num-speculative-tokens", "17"], "1 to 16"),
        (["--cudagraph-capture-sizes", "[1,two]"], "no list of numbers"),
        (["--cudagraph-capture-sizes", "0"], "1 or more"),
        (["--online-quant-config", "{"], "no JSON"),
        (["--online-quant-config", '{"global_quant_config": "int3"}'], "one of ptpc_fp8"),
        (["--online-quant-config", '{"layer_quant_config": {"a": "mxfp4"}}'], "one format for all layers"),
        (["--online-quant-config", '{"global": "mxfp4"}'], "an object with keys"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*arguments)
