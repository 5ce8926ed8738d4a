"""Gated DeltaNet on a GPU, with the dims of Qwen3-Next: python -m benchmarks.ops.gated_delta

Decode steps are shown against the memory traffic of their states; prompts against the chunked form in torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from atom_cluster.ops.attention import AttentionMetadata
from atom_cluster.ops.cpu import plan_gated_delta as plan_in_torch
from atom_cluster.ops.gated_delta import GatedDeltaPlan, Gates, PlanGatedDelta, StateMetadata
from atom_cluster.ops.triton import plan_gated_delta
from benchmarks.ops.timing import share_of_bandwidth, time_us

KEY_HEADS, VALUE_HEADS, DIM, WIDTH = 16, 32, 128, 4
CHANNELS = (2 * KEY_HEADS + VALUE_HEADS) * DIM
STATE_BYTES = VALUE_HEADS * DIM * DIM * 4


class Layer:
    """Inputs of one layer, and its states: of each row one, and more to rotate through."""

    def __init__(self, lengths: Sequence[int], *, keeps_all: bool = False, num_copies: int = 1) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device="cuda").to(dtype)

        self.num_tokens, num_rows, self.num_copies = sum(lengths), len(lengths), num_copies
        self.width = max(lengths) if keeps_all else 1
        starts = [sum(lengths[:row]) for row in range(num_rows + 1)]
        self.rows = AttentionMetadata(
            block_size=16,
            num_decode_rows=list(lengths).count(1),
            query_start=torch.tensor(starts, dtype=torch.int32, device="cuda"),
            context_len=torch.tensor(lengths, dtype=torch.int32, device="cuda"),
            block_table=torch.zeros(num_rows, 1, dtype=torch.int32, device="cuda"),
            slot=torch.zeros(self.num_tokens, dtype=torch.int64, device="cuda"),
            query_start_cpu=tuple(starts),
            context_len_cpu=tuple(lengths),
        )
        pages = torch.arange(num_rows * self.width, device="cuda").view(num_rows, self.width)
        self.states = StateMetadata(
            read_page=pages[:, 0].clone(), write_page=pages, keeps_all_cpu=(keeps_all,) * num_rows
        )
        self.x_TC = randn(self.num_tokens, CHANNELS + VALUE_HEADS * DIM)[:, :CHANNELS]
        self.weight_CW = randn(WIDTH, CHANNELS).T
        self.past_NCJ = randn(num_rows * self.width, CHANNELS, WIDTH - 1)
        self.memory = [
            randn(num_rows * self.width, VALUE_HEADS, DIM, DIM, dtype=torch.float32) for _ in range(num_copies)
        ]
        gates = randn(self.num_tokens, 2 * VALUE_HEADS).chunk(2, dim=1)
        rates = (randn(VALUE_HEADS, dtype=torch.float32) for _ in range(2))
        self.gates = Gates(*gates, *rates)

    def plan(self, make: PlanGatedDelta) -> GatedDeltaPlan:
        return make(self.rows, self.states)

    def convolve(self, plan: GatedDeltaPlan) -> torch.Tensor:
        return plan.convolve(self.x_TC, self.weight_CW, self.past_NCJ)

    def delta_rule(self, plan: GatedDeltaPlan, y_TC: torch.Tensor, copy: int = 0) -> torch.Tensor:
        sizes = [KEY_HEADS * DIM, KEY_HEADS * DIM, VALUE_HEADS * DIM]
        heads = [part.view(self.num_tokens, -1, DIM) for part in y_TC.split(sizes, dim=1)]
        return plan.delta_rule(*heads, self.gates, self.memory[copy])


def report_decode(num_rows: int, *, num_tokens: int = 1) -> None:
    num_bytes = num_rows * STATE_BYTES * (1 + num_tokens)
    keeps_all = num_tokens > 1
    layer = Layer([num_tokens] * num_rows, keeps_all=keeps_all, num_copies=max(1, round(3e8 / num_bytes)))
    plan = layer.plan(plan_gated_delta)
    y_TC = layer.convolve(plan)
    conv_us = time_us([lambda: layer.convolve(plan)])
    us = time_us([lambda copy=copy: layer.delta_rule(plan, y_TC, copy) for copy in range(layer.num_copies)])
    name = f"{num_rows} rows x {num_tokens}"
    print(f"{name:24s} rule {us:8.2f} us {share_of_bandwidth(num_bytes, us)}   conv {conv_us:7.2f} us", flush=True)


def report_prompts(lengths: Sequence[int], *, compares: bool) -> None:
    layer = Layer(lengths)
    plan = layer.plan(plan_gated_delta)
    y_TC = layer.convolve(plan)
    conv_us = time_us([lambda: layer.convolve(plan)])
    us = time_us([lambda: layer.delta_rule(plan, y_TC)])
    text = f"{len(lengths)} x {max(lengths)}"
    text = f"{text:24s} rule {us:8.2f} us {layer.num_tokens / us:6.1f} tokens/us   conv {conv_us:7.2f} us"
    if compares:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        reference = layer.plan(plan_in_torch)
        layer.delta_rule(reference, y_TC)
        start.record()
        layer.delta_rule(reference, y_TC)
        end.record()
        end.synchronize()
        text += f"   rule in torch {start.elapsed_time(end) * 1e3:9.0f} us"
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-torch", action="store_true", help="do not time the chunked form in torch")
    compares = not parser.parse_args().no_torch
    print(f"{torch.cuda.get_device_name()}, bfloat16, states float32")
    for num_rows in (1, 8, 32, 128):
        report_decode(num_rows)
    for num_rows in (1, 32):
        report_decode(num_rows, num_tokens=3)
    for lengths in ([512], [2048], [8192], [1024] * 16, [100] * 20):
        report_prompts(lengths, compares=compares)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
