"""What one rank of a model will need, without its weights and without a device: the model is built of tensors that
have shapes and no memory, by the code that builds the one that is served, and the KV cache is sized by the same code.

Weights and KV are exact. Two amounts can only be measured on the device, and are estimates: what its runtime takes, and
what the largest step needs. Engines measure both when they start (`runner/profiling.py`). Knows no configuration files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from atom_cluster.config.quantization import QuantizationConfig
from atom_cluster.kv_cache.layout import KvLayout
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.embedding import Embedding
from atom_cluster.layers.experts import Experts
from atom_cluster.layers.logits import LogitsHead
from atom_cluster.layers.mlp import GatedMlp
from atom_cluster.layers.module import CachingModule, Module
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.registry import build_model, spec_from_config
from atom_cluster.ops.select import torch_table
from atom_cluster.ops.table import OpTable
from atom_cluster.parallel.groups import Group, ProcessGroups
from atom_cluster.quantization.online import with_online
from atom_cluster.quantization.plan import read_plan
from atom_cluster.runner.build import dummy_weight_dtype, num_loaded_draft_layers
from atom_cluster.runner.kv_sizing import KvSizing, left_for_kv
from atom_cluster.runner.prompt_scores import SLICE
from atom_cluster.runner.row_state import slack
from atom_cluster.units import GiB, ceil_div

WeightKind = Literal["attention", "experts", "other MLPs", "embeddings", "drafting", "others"]
WEIGHT_KINDS: tuple[WeightKind, ...] = ("attention", "experts", "other MLPs", "embeddings", "drafting", "others")
"""others: norms, routers, tables of rotary positions."""

_RUNTIME_BYTES = int(0.6 * GiB)
"""What is in use beside weights on a rank that is alone: context, kernels, libraries. Measured on an H200: 0.5."""
_COMMUNICATION_BYTES = int(0.9 * GiB)
"""More on each of several ranks, for NCCL. Measured on H200s: 0.85."""
_KEPT_HIDDEN = 3
"""Hidden states of all tokens that exist at once around a layer: input, residual stream, output."""
_KEPT_HIDDEN_DRAFTING = 5
"""More while layers draft: the main model's output, embeddings, and both side by side."""

_SCORING_BYTES = 5
"""Per logit while prompts are scored: the logit, and whether it is above another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShape:
    """What decides about one rank's memory, beside the model."""

    num_ranks: int = 1
    divides_experts: bool = False
    """Ranks hold whole experts."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of activations."""
    kv_dtype: Literal["auto", "fp8"] = "auto"
    max_model_len: int
    block_size: int = 16
    max_num_requests: int = 256
    max_num_batched_tokens: int = 8192
    num_drafts: int = 0
    quantization: QuantizationConfig = QuantizationConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """What one rank of a model needs. Made by `measure`."""

    shape: RankShape
    weights: Mapping[WeightKind, int]
    """Bytes on this rank, by what they are for."""
    layout: KvLayout
    step_bytes: int
    """Estimate of what the largest step needs beside weights and KV, tables of rows included."""

    @property
    def weight_bytes(self) -> int:
        """All weights."""
        return sum(self.weights.values())

    @property
    def runtime_bytes(self) -> int:
        """Estimate of what the device's runtime takes."""
        return _RUNTIME_BYTES + (_COMMUNICATION_BYTES if self.shape.num_ranks > 1 else 0)

    @property
    def kv_bytes_per_token(self) -> float:
        """KV of one token that every layer sees: windows and states come on top, and are bounded."""
        block_size = self.shape.block_size
        return self.layout.page_bytes(self.layout.groups[0], block_size) / block_size

    def budget(self, *, device_bytes: int, memory_fraction: float) -> tuple[int, str]:
        """Bytes left for KV on a device of `device_bytes`, and the arithmetic in words."""
        return left_for_kv(
            total_bytes=device_bytes,
            memory_fraction=memory_fraction,
            in_use_bytes=self.weight_bytes + self.runtime_bytes,
            step_bytes=self.step_bytes,
            num_step_tokens=self.shape.max_num_batched_tokens,
        )

    def num_blocks(self, budget_bytes: int) -> int:
        """KV blocks that fit. Raises ConfigError when that is too few to run anything."""
        return self.sizing.fit(budget_bytes)

    @property
    def sizing(self) -> KvSizing:
        """How pages are counted, as on a device."""
        shape = self.shape
        return KvSizing(
            layout=self.layout,
            block_size=shape.block_size,
            max_num_requests=shape.max_num_requests,
            max_num_batched_tokens=shape.max_num_batched_tokens,
            num_drafts=shape.num_drafts,
        )

    def num_requests(self, num_blocks: int, context_len: int) -> int:
        """Requests of so many tokens that can run at once."""
        return min(self.shape.max_num_requests, num_blocks // ceil_div(context_len, self.shape.block_size))


@torch.inference_mode()
def measure(config: HfConfig, shape: RankShape) -> RankMemory:
    """What the first rank of the model with this config.json needs; no other needs more.

    Raises ConfigError for a model that cannot run here, or cannot be divided among so many ranks.
    """
    spec, device = spec_from_config(config), torch.device("meta")
    plan = with_online(read_plan(config), shape.quantization, device)
    group = Group(rank=0, size=shape.num_ranks, handle=None)
    dtype: torch.dtype = getattr(torch, shape.dtype)
    context = LayerContext(
        ops=torch_table("for planning"),
        groups=ProcessGroups(group, group if shape.divides_experts else None),
        dtype=dtype,
        device=device,
        quantization=plan,
        weight_dtype=dummy_weight_dtype(dtype, spec),
        kv_dtype=None if shape.kv_dtype == "auto" else "float8_e4m3fn",
    )
    num_draft_layers = num_loaded_draft_layers(shape.num_drafts, spec)
    max_len = shape.max_model_len + slack(shape.num_drafts)
    model = build_model(spec, context, max_model_len=max_len, num_draft_layers=num_draft_layers)
    assert isinstance(model, Module)
    widest = model.widest
    model.finish_loading()
    hidden = spec.hidden_size * (_KEPT_HIDDEN + (_KEPT_HIDDEN_DRAFTING if shape.num_drafts else 0))
    logits = shape.max_num_requests * (1 + shape.num_drafts) * ceil_div(spec.vocab_size, shape.num_ranks) * 4
    scoring = SLICE * ceil_div(spec.vocab_size, shape.num_ranks) * _SCORING_BYTES
    known_tokens = shape.max_num_requests * max_len * 4  # as `RowTable` holds them
    num_tokens = shape.max_num_batched_tokens
    return RankMemory(
        shape=shape,
        weights=_count(model),
        layout=model.kv_layout,
        # Tokens are chosen and prompts scored when the memory that layers work in is free again.
        step_bytes=num_tokens * hidden * dtype.itemsize
        + max(num_tokens * widest * dtype.itemsize, scoring, logits)
        + known_tokens,
    )


def _count(model: Module) -> dict[WeightKind, int]:
    """Bytes of all tensors that a model holds, each once, by what they are for."""
    counted: set[int] = set()
    sizes: Counter[WeightKind] = Counter()
    drafting = {id(part) for layer in getattr(model, "draft_layers", ()) for part in layer.modules()}
    for module, kind in _kinds(model, "others"):
        for tensor in _tensors(vars(module), set()):
            storage = tensor.untyped_storage()
            if storage._cdata not in counted:
                counted.add(storage._cdata)
                sizes["drafting" if id(module) in drafting else kind] += storage.nbytes()
    return {kind: sizes[kind] for kind in WEIGHT_KINDS if sizes[kind]}


def _kinds(module: Module, around: WeightKind) -> Iterator[tuple[Module, WeightKind]]:
    """A module and all its parts, each with what it is for: the outermost of those that say so."""
    kind = around
    if around == "others":
        if isinstance(module, (Embedding, LogitsHead)):
            kind = "embeddings"
        elif isinstance(module, Experts):
            kind = "experts"
        elif isinstance(module, GatedMlp):
            kind = "other MLPs"
        elif isinstance(module, CachingModule):
            kind = "attention"
    yield module, kind
    for part in module.parts():
        yield from _kinds(part, kind)


_WITHOUT_TENSORS = (Module, LayerContext, OpTable, ProcessGroups)


def _tensors(value: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """Tensors that a module holds itself, in prepared ops for instance; not those of its parts."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, _WITHOUT_TENSORS):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        inner = list(value.values())
    elif isinstance(value, (list, tuple)):
        inner = list(value)
    elif type(value).__module__.startswith("atom_cluster."):
        names = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
        inner = [getattr(value, name, None) for name in names]
    else:
        return
    for item in inner:
        yield from _tensors(item, seen)
