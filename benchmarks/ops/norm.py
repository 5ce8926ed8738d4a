"""Norms and gates on a GPU, against torch: python -m benchmarks.ops.norm"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from atom_cluster.ops import torch_ref as ref
from atom_cluster.ops import triton as kernels
from benchmarks.ops.timing import share_of_bandwidth, time_us

ROTATED_BYTES = 200e6
"""More than the caches hold."""


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def report(name: str, num_bytes: float, make: Callable[[], tuple], ours: Callable, theirs: Callable) -> None:
    """make: fresh inputs. num_bytes: what is read and written at least."""
    inputs = [make() for _ in range(max(1, min(64, round(ROTATED_BYTES / num_bytes))))]
    us, their_us = (time_us([lambda i=i, run=run: run(*i) for i in inputs]) for run in (ours, theirs))
    print(f"{name:40s} {us:8.2f} us {share_of_bandwidth(num_bytes, us)}   torch {their_us:8.2f} us", flush=True)


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, bfloat16")
    for size in (1024, 4096, 7168, 16384):
        weight = randn(size)
        for num_tokens in (1, 32, 128, 8192):
            report(
                f"add_rms_norm [{num_tokens}, {size}]",
                8.0 * num_tokens * size,
                lambda t=num_tokens, s=size: (randn(t, s), randn(t, s)),
                lambda x, r, w=weight: kernels.add_rms_norm(x, r, w, 1e-5),
                lambda x, r, w=weight, s=size: F.rms_norm(r.add_(x), (s,), w, 1e-5),
            )
    weight = randn(128)
    for num_tokens in (1, 128, 8192):
        report(
            f"rms_norm of 32 of 48 heads [{num_tokens}, 32, 128]",
            4.0 * num_tokens * 4096,
            lambda t=num_tokens: (randn(t, 48, 128)[:, :32],),
            lambda x: kernels.rms_norm(x, weight, 1e-5),
            lambda x: F.rms_norm(x, (128,), weight, 1e-5),
        )
        report(
            f"gated_rms_norm [{num_tokens}, 32, 128]",
            6.0 * num_tokens * 4096,
            lambda t=num_tokens: (randn(t, 32, 128), randn(t, 48, 128)[:, 16:]),
            lambda x, g: kernels.gated_rms_norm(x, g, weight, 1e-5),
            lambda x, g: ref.gated_rms_norm(x, g, weight, 1e-5),
        )
    for size in (3072, 14336, 18432):
        for num_tokens in (1, 32, 128, 8192):
            report(
                f"silu_and_mul [{num_tokens}, 2 x {size}]",
                6.0 * num_tokens * size,
                lambda t=num_tokens, s=size: (randn(t, 2 * s),),
                kernels.silu_and_mul,
                ref.silu_and_mul,
            )
    for num_tokens in (1, 128, 8192):
        report(
            f"sigmoid_and_mul [{num_tokens}, 16, 256]",
            6.0 * num_tokens * 4096,
            lambda t=num_tokens: (randn(t, 16, 256), randn(t, 16, 512)[..., 256:]),
            kernels.sigmoid_and_mul,
            ref.sigmoid_and_mul,
        )
    rows = randn(128256 // 4, 4096)
    for num_tokens in (1, 128, 8192):
        report(
            f"look_up in a shard [{num_tokens}, 4096]",
            4.0 * num_tokens * 4096,
            lambda t=num_tokens: (torch.randint(0, 128256, (t,), device="cuda"),),
            lambda ids: kernels.look_up(rows, ids, dtype=torch.bfloat16, shard=range(len(rows))),
            lambda ids: ref.look_up(rows, ids, dtype=torch.bfloat16, shard=range(len(rows))),
        )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
