"""Engine options on a command line, under the names that ATOM's scripts use, and what each becomes here.

`--max-num-seqs` and `--max_num_seqs` are the same. What has no counterpart is refused with the reason, or, where the
result is the same without, noted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from atom_cluster.config.compilation import CompilationConfig
from atom_cluster.config.observability import ProfileConfig
from atom_cluster.config.quantization import OnlineFormat, QuantizationConfig
from atom_cluster.config.speculative import SpeculativeConfig
from atom_cluster.errors import ConfigError
from atom_cluster.llm_engine import LLMEngine

_ONLINE_FORMATS: dict[str, OnlineFormat] = {
    "ptpc_fp8": "fp8",
    "per_block_fp8": "fp8_block",
    "mxfp4": "mxfp4",
    "mxfp8": "mxfp8",
}
_GraphMode = Literal["none", "full", "full_and_piecewise"]
_GRAPH_MODES: dict[str, _GraphMode] = {
    "NONE": "none",
    "FULL": "full",
    "FULL_DECODE_ONLY": "full",
    "FULL_AND_PIECEWISE": "full_and_piecewise",
    "PIECEWISE": "full_and_piecewise",
}
_NOT_COMPILED = "models are not compiled here: their layers call fused kernels, and graphs are captured of those"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArguments:
    """What a command line comes to."""

    model: str
    tensor_parallel_size: int
    block_size: int
    memory_fraction: float
    max_num_requests: int
    max_num_batched_tokens: int
    max_model_len: int | None
    prefix_caching: bool
    chunked_prefill: bool
    kv_dtype: Literal["auto", "fp8"]
    load_format: Literal["safetensors", "dummy"]
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["auto", "float64", "float32", "bfloat16"]
    quantization: QuantizationConfig
    speculative: SpeculativeConfig | None
    compilation: CompilationConfig
    profile: ProfileConfig
    notes: tuple[str, ...] = field(default=())
    """What was asked for and is done another way, and why."""

    def open(self) -> LLMEngine:
        """The engine; the caller closes it."""
        return LLMEngine(
            self.model,
            dtype=self.dtype,
            device=self.device,
            block_size=self.block_size,
            memory_fraction=self.memory_fraction,
            max_num_requests=self.max_num_requests,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            prefix_caching=self.prefix_caching,
            chunked_prefill=self.chunked_prefill,
            load_format=self.load_format,
            kv_dtype=self.kv_dtype,
            quantization=self.quantization,
            speculative=self.speculative,
            compilation=self.compilation,
            profile=self.profile,
            tensor_parallel_size=self.tensor_parallel_size,
        )


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them, with ATOM's defaults."""
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument_group("engine").add_argument
    add("--model", default="Qwen/Qwen3-0.6B", help="directory, hub id or demo:NAME")
    add("--trust-remote-code", action="store_true", help="not needed: no code of a checkpoint is ever run")
    add("--tensor-parallel-size", "-tp", type=int, default=1)
    add("--kv-cache-dtype", choices=["auto", "bf16", "fp8"], default="bf16")
    add("--max-model-len", type=int)
    add("--max-num-seqs", type=int, default=512)
    add("--max-num-batched-tokens", type=int, default=16384)
    add("--block-size", type=int, default=16)
    add("--gpu-memory-utilization", type=float, default=0.9)
    add("--enable-prefix-caching", action=flag, default=True)
    add("--enable-chunked-prefill", action=flag, default=True)
    add("--enforce-eager", action="store_true", help="launch every kernel from the host")
    add("--cudagraph-capture-sizes", nargs="+", help="numbers of rows: [1,2,4] or 1 2 4")
    add("--cudagraph-mode", type=str.upper, choices=[*_GRAPH_MODES, "AF_PIECEWISE"])
    add("--level", type=int, choices=range(4), help="0: as --enforce-eager; 1 to 3 are levels of torch.compile")
    add("--load-dummy", nargs="?", const="xavier", choices=["empty", "zero", "xavier"], help="random weights")
    add("--method", choices=["mtp", "eagle3", "dspark"], help="who drafts tokens")
    add("--num-speculative-tokens", type=int, default=1, help="used with --method")
    add("--online-quant-config", help='JSON: {"global_quant_config": "ptpc_fp8", "exclude_layer": ["lm_head"]}')
    add("--torch-profiler-dir", help="where traces go")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")


def kebab(arguments: Sequence[str]) -> list[str]:
    """The same command line with `-` for `_` in the names of options."""
    result = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        result.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    return result


def engine_arguments(options: argparse.Namespace) -> EngineArguments:
    """What parsed options come to. Raises ConfigError for what cannot be had here."""
    notes: list[str] = []
    if options.trust_remote_code:
        notes.append("--trust-remote-code: no code of a checkpoint is ever run")
    if options.load_dummy in ("empty", "zero"):
        notes.append(f"--load-dummy {options.load_dummy}: dummy weights are random numbers, as large as real ones")
    return EngineArguments(
        model=options.model,
        tensor_parallel_size=options.tensor_parallel_size,
        block_size=options.block_size,
        memory_fraction=options.gpu_memory_utilization,
        max_num_requests=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=options.max_model_len,
        prefix_caching=options.enable_prefix_caching,
        chunked_prefill=options.enable_chunked_prefill,
        kv_dtype="fp8" if options.kv_cache_dtype == "fp8" else "auto",
        load_format="safetensors" if options.load_dummy is None else "dummy",
        device=options.device,
        dtype=options.dtype,
        quantization=_quantization(options.online_quant_config),
        speculative=_speculative(options),
        compilation=_compilation(options, notes),
        profile=ProfileConfig(directory=options.torch_profiler_dir),
        notes=tuple(notes),
    )


def _compilation(options: argparse.Namespace, notes: list[str]) -> CompilationConfig:
    mode, level = options.cudagraph_mode, options.level
    if mode == "AF_PIECEWISE":
        raise ConfigError(
            "--cudagraph-mode AF_PIECEWISE: attention over prompts is never part of a graph, since its shapes change "
            "from step to step; use FULL_AND_PIECEWISE"
        )
    if mode == "PIECEWISE":
        notes.append("--cudagraph-mode PIECEWISE: as FULL_AND_PIECEWISE; steps that only decode are captured whole")
    if level:
        notes.append(f"--level {level}: {_NOT_COMPILED}; --cudagraph-mode says which")
    sizes = _sizes(options.cudagraph_capture_sizes)
    if options.enforce_eager or level == 0:
        return CompilationConfig(graph_mode="none", capture_sizes=sizes)
    if mode is None:
        return CompilationConfig(capture_sizes=sizes)
    return CompilationConfig(graph_mode=_GRAPH_MODES[mode], capture_sizes=sizes)


def _sizes(words: Sequence[str] | None) -> tuple[int, ...] | None:
    if words is None:
        return None
    text = " ".join(words)
    try:
        sizes = tuple(sorted({int(word) for word in text.strip("[] ").replace(",", " ").split()}))
    except ValueError as exc:
        raise ConfigError(f"--cudagraph-capture-sizes: {text!r} is no list of numbers such as [1,2,4]") from exc
    if not sizes or sizes[0] < 1:
        raise ConfigError("--cudagraph-capture-sizes: sizes are numbers of rows, 1 or more")
    return sizes


def _speculative(options: argparse.Namespace) -> SpeculativeConfig | None:
    if options.method is None:
        return None
    if options.method != "mtp":
        raise ConfigError(f"--method {options.method}: drafts come from a checkpoint's own layers only; use mtp")
    if not 1 <= options.num_speculative_tokens <= 16:
        raise ConfigError("--num-speculative-tokens: 1 to 16")
    return SpeculativeConfig(num_tokens=options.num_speculative_tokens)


def _quantization(text: str | None) -> QuantizationConfig:
    if text is None:
        return QuantizationConfig()
    try:
        wanted = json.loads(text)
    except ValueError as exc:
        raise ConfigError(f"--online-quant-config: no JSON: {exc}") from exc
    known = {"global_quant_config", "layer_quant_config", "exclude_layer"}
    if not isinstance(wanted, dict) or not wanted.keys() <= known:
        raise ConfigError(f"--online-quant-config: an object with keys {', '.join(sorted(known))}")
    if wanted.get("layer_quant_config"):
        raise ConfigError(
            "--online-quant-config: layer_quant_config: there is one format for all layers; exclude others"
        )
    name = wanted.get("global_quant_config")
    if name not in _ONLINE_FORMATS:
        raise ConfigError(f"--online-quant-config: global_quant_config is one of {', '.join(_ONLINE_FORMATS)}")
    excluded = wanted.get("exclude_layer", [])
    if not isinstance(excluded, list) or not all(isinstance(layer, str) for layer in excluded):
        raise ConfigError("--online-quant-config: exclude_layer is a list of names")
    return QuantizationConfig(online=_ONLINE_FORMATS[name], exclude=tuple(cast("list[str]", excluded)))
