"""Attention over paged KV on a GPU, and what comes before it: python -m benchmarks.ops.attention

Decode steps are captured and shown against the bytes of their keys and values, prompts against torch's attention over
the same numbers, contiguous. Keys and values are of as many layers as exceed the caches.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from atom_cluster.ops.attention import AttentionMetadata, HeadNorms, KvLayerCache, Rotation
from atom_cluster.ops.triton import plan_attention
from atom_cluster.units import ceil_div
from benchmarks.ops.timing import share_of_bandwidth, time_us

ROTATED_BYTES = 200e6
DIM = 128


@dataclass(frozen=True)
class Heads:
    name: str
    query: int
    kv: int


MODELS = (Heads("llama-8b", 32, 8), Heads("qwen3-0.6b", 16, 8), Heads("qwen3-30b", 32, 4))


class Step:
    """Rows of (tokens with this step's, of which new), on random pages of some layers."""

    def __init__(
        self,
        rows: Sequence[tuple[int, int]],
        heads: Heads,
        *,
        block_size: int = 16,
        stored: torch.dtype = torch.bfloat16,
        window: int | None = None,
    ) -> None:
        counts = [ceil_div(context_len, block_size) for context_len, _ in rows]
        self.rows, self.heads = rows, heads
        self.num_keys = sum(context_len for context_len, _ in rows)
        self.kv_bytes = 2.0 * self.num_keys * heads.kv * DIM * stored.itemsize
        self.num_layers = max(1, min(48, math.ceil(ROTATED_BYTES / self.kv_bytes)))
        ids = torch.randperm(sum(counts)).split(counts)
        table = torch.zeros(len(rows), max(counts), dtype=torch.int32)
        slots, starts = [], [0]
        for row, (context_len, num_new) in enumerate(rows):
            table[row, : counts[row]] = ids[row]
            position = torch.arange(context_len - num_new, context_len)
            slots.append(ids[row][position // block_size] * block_size + position % block_size)
            starts.append(starts[-1] + num_new)
        self.metadata = AttentionMetadata(
            block_size=block_size,
            window=window,
            num_decode_rows=sum(num_new == 1 for _, num_new in rows),
            query_start=torch.tensor(starts, dtype=torch.int32, device="cuda"),
            context_len=torch.tensor([context_len for context_len, _ in rows], dtype=torch.int32, device="cuda"),
            block_table=table.cuda(),
            slot=torch.cat(slots).cuda(),
            query_start_cpu=tuple(starts),
            context_len_cpu=tuple(context_len for context_len, _ in rows),
        )
        memory = torch.empty(sum(counts), self.num_layers, 2, block_size, heads.kv, DIM, device="cuda", dtype=stored)
        for page in memory.split(1024):
            page.copy_(torch.randn(page.shape, device="cuda", dtype=torch.bfloat16))
        self.layers = [KvLayerCache(memory[:, i, 0], memory[:, i, 1]) for i in range(self.num_layers)]
        self.fused = torch.randn(starts[-1], heads.query + 2 * heads.kv, DIM, device="cuda").bfloat16()
        self.query = self.fused[:, : heads.query].contiguous()

    def attend_us(self) -> float:
        plan = plan_attention(self.metadata)
        return time_us([lambda kv=kv: plan.attend(self.query, kv, scale=DIM**-0.5) for kv in self.layers])

    def store_us(self, *, has_norms: bool) -> float:
        plan = plan_attention(self.metadata)
        angles = Rotation(*torch.randn(2, len(self.fused), 1, DIM, device="cuda"))
        norms = HeadNorms(*torch.randn(2, DIM, device="cuda").bfloat16(), 1e-6) if has_norms else None
        sizes = [self.heads.query, self.heads.kv, self.heads.kv]
        copies = [self.fused.clone() for _ in range(max(1, min(32, int(ROTATED_BYTES / self.fused.nbytes))))]
        return time_us(
            [
                lambda i=i, x=x: plan.store(
                    *x.split(sizes, dim=1), self.layers[i % self.num_layers], norms=norms, rotation=angles
                )
                for i, x in enumerate(copies)
            ]
        )

    @property
    def flops(self) -> float:
        """Of what is seen."""
        seen = sum(
            num_new * (context_len - num_new) + num_new * (num_new + 1) / 2 for context_len, num_new in self.rows
        )
        return 4.0 * seen * self.heads.query * DIM


def torch_us(step: Step, backend: SDPBackend) -> float | None:
    """Of prompts of one length without anything cached; None if torch cannot."""
    (length, num_new), batch = step.rows[0], len(step.rows)
    if length != num_new:
        return None
    shape = (batch, length, -1, DIM)
    query, key, value = (
        step.fused[:, a:b].contiguous().view(shape).transpose(1, 2)
        for a, b in (
            (0, step.heads.query),
            (step.heads.query, step.heads.query + step.heads.kv),
            (-step.heads.kv, None),
        )
    )
    try:
        with sdpa_kernel(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return time_us([lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)])
    except RuntimeError:
        return None


def decode_steps(heads: Heads) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    for batch in (1, 8, 32, 128):
        for length in (128, 1024, 8192, 32768):
            if batch * length * heads.kv <= 128 * 8192 * 8:
                yield f"{batch} x {length}", [(length, 1)] * batch
    yield "1 x 131072", [(131072, 1)]
    yield "128 x 1200", [(1200, 1)] * 128
    yield "128 x 200-2200", [(200 + 2000 * i // 127, 1) for i in range(128)]
    yield "63 x 1024, 1 x 65536", [(65536, 1)] + [(1024, 1)] * 63
    yield "128 x 1200, 4 tokens", [(1200, 4)] * 128


PROMPTS = {
    "1 x 1000": [(1000, 1000)],
    "16 x 1024": [(1024, 1024)] * 16,
    "4 x 4096": [(4096, 4096)] * 4,
    "2 x 8192": [(8192, 8192)] * 2,
    "4 x 8192": [(8192, 8192)] * 4,
    "1 x 32768": [(32768, 32768)],
    "8192 behind 8192": [(16384, 8192)],
    "2048 behind 30000": [(32048, 2048)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=["decode", "prompts", "store"])
    only = parser.parse_args().only
    print(f"{torch.cuda.get_device_name()}, bfloat16, pages of 16 tokens")
    if "decode" in only:
        for heads in MODELS:
            for name, rows in decode_steps(heads):
                step = Step(rows, heads)
                us = step.attend_us()
                print(
                    f"decode {heads.name:12s} {name:22s} {us:9.1f} us {share_of_bandwidth(step.kv_bytes, us)}",
                    flush=True,
                )
                del step
        for batch, length in ((1, 128), (1, 1024), (1, 32768), (32, 8192), (128, 128), (128, 1200)):
            step = Step([(length, 1)] * batch, MODELS[0], stored=torch.float8_e4m3fn)
            us, name = step.attend_us(), f"{batch} x {length}"
            print(f"decode {'llama-8b fp8':12s} {name:22s} {us:9.1f} us {share_of_bandwidth(step.kv_bytes, us)}")
            del step
    if "prompts" in only:
        for heads in MODELS[:1] + MODELS[2:]:
            for name, rows in PROMPTS.items():
                step = Step(rows, heads)
                found = [step.attend_us()]
                found += [
                    torch_us(step, backend) for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
                ]
                shown = [f"{step.flops / us / 1e6:5.0f}" if us else "    -" for us in found]
                print(
                    f"prompts {heads.name:12s} {name:20s} {found[0]:9.1f} us {shown[0]} TFLOP/s; "
                    f"torch cuDNN {shown[1]}, FlashAttention 2 {shown[2]}",
                    flush=True,
                )
                del step
    if "store" in only:
        for heads in MODELS:
            for batch in (1, 128, 8192):
                step = Step([(16, 1)] * batch, heads)
                us, num_bytes = step.store_us(has_norms=heads.name != "llama-8b"), 2 * step.fused.nbytes
                print(f"store {heads.name:12s} {batch:5d} tokens {us:9.2f} us {share_of_bandwidth(num_bytes, us)}")


if __name__ == "__main__":
    main()
