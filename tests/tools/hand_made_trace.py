"""A small trace with known numbers, as torch.profiler writes them: a prompt, two replayed decode steps, a draft.

Times in us. Host (thread 1):  prefill 0..100, decode 100..130, decode 130..160, decode with a draft 160..260
Device (stream 7):
    prefill   gemm 50..80, attention 90..100                                 30 us of gemm, 10 of attention, 10 idle
    decode 1  (one graph launch) gemm 120..130, norm 128..134, copy 140..141  10 gemm, 4 norm, 1 copy, 6 idle
    decode 2  (one graph launch) gemm 150..160, norm 158..164, copy 180..181  10 gemm, 4 norm, 1 copy, 16 idle
    decode 3  gemm 200..210, then drafting: gemm 230..235                     15 gemm, 20 idle
    no launch in the trace: a memset 165..170, covered by decode 2's label on the device
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

BEGAN_US = 4_402_581_528_000.0
GEMM = "nvjet_sm90_tst_64x152_64x7_2x1_v_bz_TNT"
ATTENTION = "flash_fwd_kernel"
NORM = "_rms_norm_kernel"
COPY = "Memcpy DtoH (Device -> Pinned)"
MEMSET = "Memset (Device)"


def write_trace(path: Path) -> Path:
    """Write it, compressed when the name ends in .gz."""
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "python"}}]
    for external_id, (name, start, end) in enumerate(
        [
            ("prefill[tokens=12 rows=2 ctx=12]", 0, 100),
            ("decode[bs=2 q=1 ctx=14]", 100, 130),
            ("decode[bs=2 q=1 ctx=16]", 130, 160),
            ("decode[bs=2 q=1 ctx=18]", 160, 260),
            ("draft[bs=2 k=1]", 220, 250),
            ("not a label", 0, 300),
        ]
    ):
        events.append(_event("user_annotation", name, start, end, tid=1, **{"External id": external_id}))
    events.append(_event("gpu_user_annotation", "decode[bs=2 q=1 ctx=16]", 150, 181, tid=7, **{"External id": 2}))
    launches = [(10, 5), (11, 20), (20, 105), (21, 110), (30, 135), (31, 140), (40, 170), (41, 230)]
    for correlation, at in launches:
        events.append(_event("cuda_runtime", "cudaGraphLaunch", at, at + 2, tid=1, correlation=correlation))
    for category, name, start, end, correlation in [
        ("kernel", GEMM, 50, 80, 10),
        ("kernel", ATTENTION, 90, 100, 11),
        ("kernel", GEMM, 120, 130, 20),
        ("kernel", NORM, 128, 134, 20),
        ("gpu_memcpy", COPY, 140, 141, 21),
        ("kernel", GEMM, 150, 160, 30),
        ("kernel", NORM, 158, 164, 30),
        ("gpu_memset", MEMSET, 165, 170, 999),
        ("gpu_memcpy", COPY, 180, 181, 31),
        ("kernel", GEMM, 200, 210, 40),
        ("kernel", GEMM, 230, 235, 41),
    ]:
        events.append(_event(category, name, start, end, tid=7, pid=0, stream=7, correlation=correlation))
    text = json.dumps({"deviceProperties": [{"id": 0, "name": "Some GPU"}], "traceEvents": events})
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def _event(
    category: str, name: str, start: float, end: float, *, tid: int, pid: int = 1, **args: object
) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": pid,
        "tid": tid,
        "ts": BEGAN_US + start,
        "dur": end - start,
        "args": args,
    }
