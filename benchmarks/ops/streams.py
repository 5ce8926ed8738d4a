"""Hyper-connections on a GPU, with the dims of DeepSeek-V4: python -m benchmarks.ops.streams"""

from __future__ import annotations

import torch

from atom_cluster.ops import torch_ref as ref
from atom_cluster.ops import triton as kernels
from atom_cluster.ops.streams import StreamRule
from benchmarks.ops.timing import share_of_bandwidth, time_us

NUM = 4
RULE = StreamRule(norm_eps=1e-6, eps=1e-6, num_iterations=20)


def report(num_tokens: int, size: int) -> None:
    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    row_bytes = 2.0 * size * num_tokens
    outputs = (2 + NUM) * NUM
    fn, scale, bias = (randn(*s, dtype=torch.float32) * 0.01 for s in ((outputs, NUM * size), (3,), (outputs,)))
    all_streams = [randn(num_tokens, NUM, size) for _ in range(max(1, min(32, round(2e8 / (NUM * row_bytes)))))]
    x, write, mix = kernels.connect_streams(all_streams[0], fn, scale, bias, RULE)
    for name, num_bytes, ours, theirs in (
        (
            "connect",
            fn.numel() * 4 + (2 * NUM + 1) * row_bytes,
            lambda s: kernels.connect_streams(s, fn, scale, bias, RULE),
            lambda s: ref.connect_streams(s, fn, scale, bias, RULE),
        ),
        (
            "write",
            (2 * NUM + 1) * row_bytes,
            lambda s: kernels.write_streams(s, x, write, mix),
            lambda s: ref.write_streams(s, x, write, mix),
        ),
    ):
        us, their_us = (time_us([lambda s=s, run=run: run(s) for s in all_streams]) for run in (ours, theirs))
        text = f"{name} [{num_tokens}, {NUM}, {size}]"
        print(f"{text:30s} {us:8.2f} us {share_of_bandwidth(num_bytes, us)}   torch {their_us:8.2f} us", flush=True)


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, bfloat16; the projection reads the streams once more")
    for size in (4096, 7168):
        for num_tokens in (1, 32, 128, 4096):
            report(num_tokens, size)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
