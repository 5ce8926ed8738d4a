"""RunnerOptions -> ModelRunner: the one place where a rank is put together. Knows no engine and no requests."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from atom_cluster.config.ops import OpsConfig
from atom_cluster.errors import ConfigError
from atom_cluster.kv_cache.layout import KvLayout
from atom_cluster.kv_cache.page_map import check_page_bytes, page_maps
from atom_cluster.kv_transfer.agent import KvAgent, PageFacts, open_agent
from atom_cluster.kv_transfer.registry import TransportSettings
from atom_cluster.layers.context import LayerContext
from atom_cluster.messages.transfer import KvPlacement
from atom_cluster.models.protocol import CausalLM
from atom_cluster.models.registry import describe_weights, load_model, read_spec
from atom_cluster.models.spec import ModelSpec
from atom_cluster.ops.select import select_ops
from atom_cluster.ops.table import OpTable
from atom_cluster.parallel.collectives import smallest
from atom_cluster.parallel.groups import ProcessGroups
from atom_cluster.platform.detect import detect_platform
from atom_cluster.platform.device import device_memory, select_device
from atom_cluster.runner.fingerprint import fingerprint_fields, weights_identity
from atom_cluster.runner.kv_memory import KvMemory, allocate_kv_memory
from atom_cluster.runner.kv_sizing import KvSizing, describe_pages, other_groups
from atom_cluster.runner.model_runner import ModelRunner
from atom_cluster.runner.options import RunnerOptions
from atom_cluster.runner.profiling import kv_budget_bytes
from atom_cluster.runner.rank_info import NO_TRACES, RankInfo
from atom_cluster.runner.rehearsal import rehearsal_pages, rehearse
from atom_cluster.runner.row_state import slack
from atom_cluster.runner.start_facts import start_facts
from atom_cluster.runner.warm_up import warm_up_plans
from atom_cluster.structured.compiler import GrammarCompiler
from atom_cluster.units import GiB


def build_model_runner(options: RunnerOptions) -> ModelRunner:
    """Join the gang, load the model, allocate KV memory, open KV transports. All ranks of a gang call this together.

    Raises ConfigError, WeightsError or TransferError; what was opened until then is closed.
    """
    clock = _PartClock()
    platform = detect_platform(options.device)
    device = select_device(platform, options.device_index)
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    spec = read_spec(Path(options.model_dir))
    options = replace(options, max_model_len=_max_model_len(options.max_model_len, spec))
    num_draft_layers = num_loaded_draft_layers(options.num_drafts, spec)
    dtype, dtype_choice = _choose_dtype(options, spec, device)
    with ExitStack() as on_failure:
        groups = ProcessGroups.connect(
            rank=options.rank,
            world_size=options.world_size,
            init_method=options.init_method,
            device=device,
            divides_experts=options.divides_experts,
        )
        on_failure.callback(groups.close)
        ops = select_ops(OpsConfig(backend=options.ops_backend, overrides=dict(options.ops_overrides)), platform, dtype)
        context = LayerContext(
            ops=ops,
            groups=groups,
            dtype=dtype,
            device=device,
            weight_dtype=dummy_weight_dtype(dtype, spec),
            kv_dtype=None if options.kv_dtype == "auto" else str(ops.float8_dtype).removeprefix("torch."),
        )
        clock.note("join")
        model, weights_choice = _load(options, context, num_draft_layers)
        clock.note("load")
        kernels_choice = _compile_ahead(options, model, groups, ops, device)
        if kernels_choice is not None:
            clock.note("compile")
        num_pages, blocks_choice = _num_pages(options, model, groups, ops, device)
        memory = allocate_kv_memory(model.kv_layout, num_pages=num_pages, block_size=options.block_size, device=device)
        clock.note("cache")
        agent, transfer_choice = _open_agent(options, memory, model.kv_layout)
        if agent is not None:
            on_failure.callback(agent.close)
        choices = {
            "device": f"{device} ({platform.arch})",
            "collectives": groups.choice,
            "dtype": dtype_choice,
            "kv_blocks": blocks_choice,
            "kernels": kernels_choice or "compiled, if they are, when they are launched",
            "kv_dtype": f"{context.cache_dtype} ({'as computed' if context.kv_dtype is None else 'configured'})",
            "kv_memory": memory.choice,
            "kv_transport": transfer_choice,
            "speculative": f"{options.num_drafts} drafts by {num_draft_layers} of the checkpoint's layers",
            "weights": weights_choice,
            **ops.choices,
        }
        fingerprint = _fingerprint(options, model, dtype, num_draft_layers)
        runner = ModelRunner(
            model=model,
            groups=groups,
            memory=memory,
            ops=ops,
            info=_rank_info(options, model, num_pages=num_pages, agent=agent, choices=choices, fingerprint=fingerprint),
            device=device,
            agent=agent,
            profile=options.profile,
            grammars=GrammarCompiler.for_model(options.model_dir, model.vocab_size, capacity=1),
            graph_sizes=options.compilation.sizes(options.max_num_requests) if ops.is_capturable else (),
            piecewise_sizes=_piecewise_sizes(options) if ops.is_capturable else (),
        )
        choices["graphs"], graph_bytes = _capture(runner, options, ops)
        clock.note("capture")
        if device.type != "cpu" and ops.is_capturable and options.compilation.capture == "start":
            _warm_up(runner, options, model.kv_layout)
            clock.note("warm up")
        choices["start"] = clock.describe()
        start = start_facts(runner, model, memory, graph_bytes=graph_bytes, parts_s=clock.parts_s)
        runner.info = replace(runner.info, start=start)
        on_failure.pop_all()
    return runner


class _PartClock:
    """How long the parts of a start take."""

    def __init__(self) -> None:
        self._last_s = time.perf_counter()
        self.parts_s: dict[str, float] = {}

    def note(self, part: str) -> None:
        """This part is over, and the next one begins."""
        now_s = time.perf_counter()
        self.parts_s[part] = now_s - self._last_s
        self._last_s = now_s

    def describe(self) -> str:
        """All parts, in order."""
        return ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.parts_s.items())


def _piecewise_sizes(options: RunnerOptions) -> tuple[int, ...]:
    assert options.max_model_len is not None, "resolved by build_model_runner"
    return options.compilation.piecewise_sizes(min(options.max_num_batched_tokens, options.max_model_len))


def _capture(runner: ModelRunner, options: RunnerOptions, ops: OpTable) -> tuple[str, int]:
    """Capture graphs if that is to be done now; what there is of them, and why, and the bytes that took."""
    if options.compilation.graph_mode == "none":
        return "none (configured)", 0
    if not ops.is_capturable:
        return "none: these ops cannot be captured", 0
    if options.compilation.capture == "lazy":
        return "captured when first needed (configured)", 0
    free_before = device_memory(runner.device).free_bytes
    problems = runner.capture_graphs()
    num_bytes = max(0, free_before - device_memory(runner.device).free_bytes)
    parts = [f"{part.describe()}, in {part.capture_s:.1f} s" for part in (runner.graphs, runner.pieces) if part]
    parts += [f"{kind}: none: {problem}" for kind, problem in problems.items()]
    return f"{'; '.join(parts)}; {num_bytes / GiB:.2f} GiB", num_bytes


def _compile_ahead(
    options: RunnerOptions, model: CausalLM, groups: ProcessGroups, ops: OpTable, device: torch.device
) -> str | None:
    """Compile side by side what the steps before the first request launch; what came of it. None: that is not to be."""
    if ops.compile_ahead is None or device.type == "cpu" or options.compilation.capture == "lazy":
        return None
    num_pages = rehearsal_pages(model.kv_layout, options.num_drafts)
    info = _rank_info(options, model, num_pages=num_pages, agent=None, choices={}, fingerprint={})
    return rehearse(model, groups, ops, info, max_num_batched_tokens=options.max_num_batched_tokens, device=device)


def _warm_up(runner: ModelRunner, options: RunnerOptions, layout: KvLayout) -> None:
    plans = warm_up_plans(
        layout,
        runner.info,
        max_num_batched_tokens=options.max_num_batched_tokens,
        decodes=runner.graphs is None,
    )
    for plan in plans:
        runner.run(plan)


def _max_model_len(wanted: int | None, spec: ModelSpec) -> int:
    if wanted is not None and wanted > spec.max_positions:
        raise ConfigError(f"max_model_len {wanted} is above the checkpoint's limit of {spec.max_positions}")
    return spec.max_positions if wanted is None else wanted


def num_loaded_draft_layers(num_drafts: int, spec: ModelSpec) -> int:
    """How many of the checkpoint's drafting layers to load. Raises ConfigError when they are wanted and it has none."""
    if num_drafts and not spec.num_draft_layers:
        raise ConfigError(
            f"speculative: {num_drafts} tokens are to be drafted, but the checkpoint ({spec.architecture}) has "
            "no layers for it"
        )
    return min(num_drafts, spec.num_draft_layers)


def _choose_dtype(options: RunnerOptions, spec: ModelSpec, device: torch.device) -> tuple[torch.dtype, str]:
    """Compute dtype, and why."""
    name: str
    if options.dtype != "auto":
        name, reason = options.dtype, "configured"
    elif device.type == "cpu":
        name, reason = "float32", "auto: the fastest exact one on CPUs"
    elif spec.checkpoint_dtype in ("float32", "bfloat16"):
        name, reason = spec.checkpoint_dtype, "auto: the checkpoint's"
    else:
        name, reason = "bfloat16", f"auto: the checkpoint's is {spec.checkpoint_dtype or 'not stated'}"
    dtype: torch.dtype = getattr(torch, name)
    return dtype, f"{name} ({reason})"


def dummy_weight_dtype(dtype: torch.dtype, spec: ModelSpec) -> torch.dtype:
    """Dtype of dummy weights: as narrow as the checkpoint's would be. Real ones know their own."""
    stored: torch.dtype = getattr(torch, spec.checkpoint_dtype or "bfloat16")
    return stored if stored.itemsize < dtype.itemsize else dtype


@torch.inference_mode()
def _load(options: RunnerOptions, context: LayerContext, num_draft_layers: int) -> tuple[CausalLM, str]:
    """The loaded model, and what became of its matrices."""
    assert options.max_model_len is not None, "resolved by build_model_runner"
    try:
        model = load_model(
            Path(options.model_dir),
            context=context,
            max_model_len=options.max_model_len + slack(options.num_drafts),
            num_draft_layers=num_draft_layers,
            load_format=options.load_format,
            seed=options.seed,
            quantization=options.quantization,
        )
    except torch.cuda.OutOfMemoryError as exc:
        memory = device_memory(context.device)
        in_use, total = torch.cuda.memory_allocated(context.device) / GiB, memory.total_bytes / GiB
        raise ConfigError(
            f"the weights of rank {options.rank} of {options.world_size} do not fit: the GPU has {total:.1f} GiB, of "
            f"which {in_use:.1f} GiB hold weights so far and {memory.free_bytes / GiB:.1f} GiB are free; split the "
            "model over more GPUs (parallel.tensor) or quantize it (quantization.online)"
        ) from exc
    return model, f"{describe_weights(model)} ({options.load_format})"


def _num_pages(
    options: RunnerOptions, model: CausalLM, groups: ProcessGroups, ops: OpTable, device: torch.device
) -> tuple[tuple[int, ...], str]:
    """Pages per cache group, equal on all ranks, and why that many."""
    sizing = KvSizing(
        layout=model.kv_layout,
        block_size=options.block_size,
        max_num_requests=options.max_num_requests,
        max_num_batched_tokens=options.max_num_batched_tokens,
        num_drafts=options.num_drafts,
    )
    if options.num_blocks is not None:
        num_blocks, reason = options.num_blocks, "configured"
    else:
        budget_bytes, reason = _budget_bytes(options, model, groups, ops, device)
        # The smallest budget first: an error about it is then everybody's, and nobody waits for a rank that is gone.
        num_blocks = smallest(
            _fit(sizing, smallest(budget_bytes, groups.tensor, device), reason), groups.tensor, device
        )
        reason = f"auto: {reason}"
    num_pages = tuple(smallest(count, groups.tensor, device) for count in sizing.pages(num_blocks))
    return num_pages, f"{describe_pages(model.kv_layout, num_pages)} ({reason})"


def _fit(sizing: KvSizing, budget_bytes: int, arithmetic: str) -> int:
    try:
        return sizing.fit(budget_bytes)
    except ConfigError as exc:
        raise ConfigError(f"{exc} ({arithmetic})") from exc


def _budget_bytes(
    options: RunnerOptions, model: CausalLM, groups: ProcessGroups, ops: OpTable, device: torch.device
) -> tuple[int, str]:
    """Bytes for KV on this rank, and where they come from."""
    if device.type == "cpu":
        return int(options.cpu_cache_gib * GiB), f"cpu_cache_gib {options.cpu_cache_gib}"
    assert options.max_model_len is not None, "resolved by build_model_runner"
    return kv_budget_bytes(
        model,
        groups,
        ops,
        block_size=options.block_size,
        max_num_requests=options.max_num_requests,
        max_model_len=options.max_model_len,
        max_num_batched_tokens=options.max_num_batched_tokens,
        num_drafts=options.num_drafts,
        memory_fraction=options.memory_fraction,
        device=device,
    )


def _open_agent(options: RunnerOptions, memory: KvMemory, layout: KvLayout) -> tuple[KvAgent | None, str]:
    if options.kv_transport is None:
        return None, "none: no KV exchange was asked for"
    settings = TransportSettings(rank=options.rank, host=options.host, secret=options.secret, faults=options.faults)
    rank, world_size, block_size = options.rank, options.world_size, options.block_size
    maps = page_maps(layout)
    check_page_bytes(maps, layout, rank=rank, world_size=world_size, block_size=block_size)
    pages = PageFacts(maps=maps, placement=KvPlacement(block_size=block_size, world_size=world_size))
    return open_agent(options.kv_transport, regions=memory.regions, pages=pages, settings=settings)


def _rank_info(
    options: RunnerOptions,
    model: CausalLM,
    *,
    num_pages: tuple[int, ...],
    agent: KvAgent | None,
    choices: dict[str, str],
    fingerprint: dict[str, str],
) -> RankInfo:
    assert options.max_model_len is not None, "resolved by build_model_runner"
    return RankInfo(
        num_blocks=num_pages[0],
        other_groups=other_groups(model.kv_layout, num_pages),
        max_drafts=options.num_drafts,
        block_size=options.block_size,
        max_num_requests=options.max_num_requests,
        max_model_len=options.max_model_len,
        vocab_size=model.vocab_size,
        rank=options.rank,
        world_size=options.world_size,
        kv_descriptors={} if agent is None else dict(agent.descriptors),
        fingerprint_fields=fingerprint,
        choices=choices,
        profile_refusal=NO_TRACES if options.profile.directory is None else "",
    )


def _fingerprint(options: RunnerOptions, model: CausalLM, dtype: torch.dtype, num_draft_layers: int) -> dict[str, str]:
    model_dir, quantization = Path(options.model_dir), options.quantization
    return fingerprint_fields(
        model_dir,
        weights=weights_identity(model_dir, load_format=options.load_format, seed=options.seed),
        quantization="the checkpoint's" if quantization.online is None else quantization.model_dump_json(),
        dtype=str(dtype).removeprefix("torch."),
        layout=model.kv_layout,
        drafting=f"{options.num_drafts} tokens by {num_draft_layers} layers",
    )
