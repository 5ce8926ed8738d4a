"""Times ways to cut products with weights on this GPU, next to the vendor's library, and prints the fastest as JSON.

    python -m benchmarks.ops.tune_linear --kind bfloat16 --tokens 1 2 4 8 16 32 64 128

Lines of the result go into `atom_cluster/ops/triton/tuning/linear.<arch>.json`. Weights are taken in turn from more
memory than the caches hold, in a captured graph, as in decoding. With `--hopper`, ways to cut products for sm_90's own
kernel are timed next to the kernel that would be taken without it, for the part `gemm_hopper` of that file.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from atom_cluster.ops.triton.codes import KIND_NAMES, PackedWeight
from atom_cluster.ops.triton.gemm import GemmBlocks, Scales, gemm
from atom_cluster.ops.triton.gemm_hopper import gemm_hopper
from atom_cluster.ops.triton.gemm_hopper_cut import LINE_BYTES, MAX_SPLITS, PIECE, HopperBlocks, stages_with_room
from atom_cluster.ops.triton.gemm_packed import dequantize_packed, gemm_packed
from atom_cluster.ops.triton.gemv import MAX_TOKENS, gemv
from atom_cluster.ops.triton.linear_blocks import GEMM, GEMM_HOPPER, MAX_TUNED_TOKENS, choose
from atom_cluster.ops.triton.linear_blocks import gemm_blocks as blocks_of_choice
from tests.ops.triton.compile_kernels import CHIPS, compile_launch

PACKED_SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (8192, 28672))
BFLOAT16_SHAPES = (
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096),
    (4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024),
    (5120, 2048), (2048, 4096), (151936, 2048), (10240, 8192), (8192, 8192), (8192, 3584), (7168, 8192),
)  # fmt: skip
FLOAT8_SHAPES = (
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336),
    (2112, 7168), (24576, 1536), (7168, 16384), (36864, 7168), (7168, 18432), (4096, 7168), (7168, 2048),
)  # fmt: skip
SHAPES = {"bfloat16": BFLOAT16_SHAPES, "float8": FLOAT8_SHAPES, "float8_block": FLOAT8_SHAPES}
HOPPER_CUTS = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1))
"""Groups, pieces."""
HOPPER_MULTIPROCESSORS = 132
WORTHWHILE = 1.03
"""How much faster a kernel has to be than the one that was taken."""
CACHE_BYTES = 200e6
GRAPH_BYTES = 1e9


def gemv_blocks() -> list[dict[str, int]]:
    cuts = [(1, 1024, 4), (2, 1024, 4), (4, 1024, 4), (2, 512, 2), (4, 512, 2), (8, 512, 4), (1, 2048, 4), (2, 2048, 8)]
    cuts += [(1, 512, 2), (4, 256, 1)]
    return [{"block_out": rows, "block_in": columns, "num_warps": warps} for rows, columns, warps in cuts]


def gemm_blocks(num_tokens: int, num_out: int, num_in: int, element_bytes: int, is_grouped: bool) -> list[GemmBlocks]:
    width = max(16, 1 << (num_tokens - 1).bit_length())
    found = []
    if width <= 16:
        cuts = [
            (16, 256, 1, 6),
            (32, 128, 2, 6),
            (64, 128, 4, 4),
            (64, 128, 4, 6),
            (64, 256, 4, 3),
            (128, 128, 4, 4),
            (128, 64, 4, 6),
        ]
    elif width <= 64:
        cuts = [(64, 128, 4, 4), (64, 64, 4, 6), (128, 64, 4, 5), (128, 128, 4, 4), (128, 128, 8, 3), (64, 256, 4, 3)]
    else:
        width = 128
        cuts = [(64, 128, 4, 4), (128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 8, 3), (64, 64, 4, 5)]
    for outputs, inputs, warps, stages in cuts:
        if element_bytes == 1:
            inputs = 128 if is_grouped else max(128, inputs)
            stages += 1
        for splits in (1, 2, 4, 8):
            programs = -(-num_out // outputs) * splits * -(-num_tokens // width)
            turns = num_in // inputs // splits
            if (splits > 1 and programs > 1100) or (programs < 64 and turns > 8) or turns < 2:
                continue
            if (outputs + width) * inputs * element_bytes * stages > 220_000:
                continue
            blocks = GemmBlocks(
                outputs=outputs, tokens=width, inputs=inputs, splits=splits, num_warps=warps, num_stages=stages
            )
            if blocks not in found:
                found.append(blocks)
    return found


def hopper_blocks(
    num_tokens: int, num_out: int, num_in: int, element_bytes: int, *, is_grouped: bool
) -> list[HopperBlocks]:
    tokens = min(128, max(32 if is_grouped else 16, 1 << (num_tokens - 1).bit_length()))
    turns = -(-num_in * element_bytes // LINE_BYTES)
    found = []
    room = HOPPER_MULTIPROCESSORS
    for groups, pieces in HOPPER_CUTS:
        tiles = -(-num_out // (groups * pieces * PIECE)) * -(-num_tokens // tokens)
        most = max(1, min(MAX_SPLITS, room // tiles, turns // 2))
        if tiles > 3 * room:
            continue
        for splits in {most, -(-most // 2)} if most > 2 else {most}:
            blocks = HopperBlocks(groups=groups, pieces=pieces, tokens=tokens, splits=splits, num_stages=16)
            stages = min(16, stages_with_room(blocks, is_grouped=is_grouped), max(groups, 2, -(-turns // splits)))
            if stages < max(2, groups) or (tiles * splits < 60 and splits < most):
                continue
            blocks = replace(blocks, num_stages=stages)
            found.append(blocks)
            if tokens == 16 and stages % 2 == 0:
                found.append(replace(blocks, lines=2))
    return found


def packed_blocks(num_tokens: int, num_out: int, num_in: int, step: int) -> list[GemmBlocks]:
    found = []
    cuts = [(64, 64, 4, 4), (64, 64, 4, 3), (64, 128, 4, 3), (64, 128, 8, 3), (64, 32, 4, 5), (64, 128, 4, 4)]
    if num_tokens <= 32:
        cuts += [(16 if num_tokens <= 16 else 32, 64, 4, 4), (16 if num_tokens <= 16 else 32, 32, 2, 5)]
    if num_tokens > 64:
        cuts = [(128, 64, 4, 3), (128, 128, 8, 3), (128, 128, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3)]
    for width, outputs, warps, stages in cuts:
        for splits in (1, 2, 4, 8):
            programs = -(-num_out // outputs) * splits * -(-num_tokens // width)
            if (splits > 1 and programs > 1500) or programs < 64 or num_in // step // splits < 4:
                continue
            found.append(
                GemmBlocks(
                    outputs=outputs, tokens=width, inputs=step, splits=splits, num_warps=warps, num_stages=stages
                )
            )
    return found


def packed_weight(kind: str, num_out: int, num_in: int, device: str) -> PackedWeight:
    group = {"int4": 128, "float4": 32, "eight_bits": 32}[kind]
    run = {"int4": 64, "float4": 64, "eight_bits": 128}[kind]
    columns = num_in if kind == "eight_bits" else num_in // 2
    if device == "cpu":
        codes = torch.empty(num_out, columns, dtype=torch.uint8)
        scale = torch.empty(num_in // group, num_out, dtype=torch.float16 if kind == "int4" else torch.uint8)
    else:
        codes = torch.randint(0, 120, (num_out, columns), dtype=torch.uint8, device=device)
        scale = torch.randint(120, 130, (num_in // group, num_out), dtype=torch.uint8, device=device)
        scale = scale.half() if kind == "int4" else scale
    zero = torch.zeros(num_in // group, num_out, dtype=torch.int8, device=device) if kind == "int4" else None
    codes = codes.view(torch.float8_e4m3fn) if kind == "eight_bits" else codes
    index = KIND_NAMES.index(kind)
    return PackedWeight(
        kind=index,
        codes=codes,
        scale_GO=scale,
        zero_GO=zero,
        num_in=num_in,
        group_in=group,
        run=run,
        chunk=min(run, group),
    )


class Problem:
    def __init__(self, num_out: int, num_in: int, num_tokens: int, kind: str, device: str, copies: int = 1) -> None:
        self.is_float8 = kind.startswith("float8")
        self.is_packed = kind in KIND_NAMES
        self.kind = kind
        self.is_grouped = kind == "float8_block"
        dtype = torch.float8_e4m3fn if self.is_float8 else torch.bfloat16
        self.shape = (num_out, num_in, num_tokens)
        self.weights: list[Any]
        if self.is_packed:
            self.weights = [packed_weight(kind, num_out, num_in, device) for _ in range(max(copies, device == "cpu"))]
            self.x = torch.empty(num_tokens, num_in, dtype=dtype, device=device).normal_()
        elif device == "cpu":
            self.weights = [torch.empty(num_out, num_in, dtype=dtype)]
            self.x = torch.empty(num_tokens, num_in, dtype=dtype)
        else:
            self.weights = [
                (torch.randn(num_out, num_in, device=device, dtype=torch.bfloat16) * 0.5).to(dtype)
                for _ in range(copies)
            ]
            self.x = torch.randn(num_tokens, num_in, device=device).to(dtype)
        self.out = torch.empty(num_tokens, num_out, dtype=torch.bfloat16, device=device)
        self.counters = torch.zeros(4096, dtype=torch.int32, device=device)
        self.rounds = torch.zeros_like(self.counters)
        self.scales: Scales | None = None
        if self.is_grouped:
            groups, rows = -(-num_in // 128), -(-num_out // 128)
            x_scale = (torch.rand(groups, -(-num_tokens // 4) * 4, device=device) + 0.5).T[:num_tokens]
            self.scales = Scales(
                of_tokens_TG=x_scale,
                of_outputs=torch.rand(rows, groups, device=device) + 0.5,
                group_in=128,
                block=(128, 128),
            )
        elif self.is_float8:
            x_scale = torch.rand(num_tokens, 1, device=device) + 0.5
            self.scales = Scales(
                of_tokens_TG=x_scale,
                of_outputs=torch.rand(num_out, 1, device=device) + 0.5,
                group_in=num_in,
                block=(1, num_in),
            )

    def expected(self) -> torch.Tensor:
        num_out, num_in, _ = self.shape
        if self.is_packed:
            return self.x.float() @ dequantize_packed(self.weights[0], slice(0, num_out), torch.float32).T
        x, weight = self.x.float(), self.weights[0].float()
        if self.scales is not None:
            x_scale, w_scale = self.scales.of_tokens_TG, self.scales.of_outputs
            if self.is_grouped:
                x_scale = x_scale.repeat_interleave(128, 1)[:, :num_in]
                w_scale = w_scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:num_out, :num_in]
            x, weight = x * x_scale, weight * w_scale
        return x @ weight.T

    def hopper_launches(self) -> dict[str, Callable[[torch.Tensor], object]]:
        num_out, num_in, num_tokens = self.shape
        found: dict[str, Callable[[torch.Tensor], object]] = {}
        for blocks in hopper_blocks(num_tokens, num_out, num_in, self.x.itemsize, is_grouped=self.is_grouped):
            found[json.dumps({"kernel": GEMM_HOPPER, **asdict(blocks)})] = lambda weight, blocks=blocks: gemm_hopper(
                self.x, weight, None, self.out, self.rounds, blocks, self.scales
            )
        choice = choose(self.kind, num_out, num_in, min(num_tokens, MAX_TUNED_TOKENS))
        if choice["kernel"] == GEMM:
            found[json.dumps(choice)] = lambda weight: gemm(
                self.x, weight, None, self.out, self.counters, blocks_of_choice(choice), self.scales
            )
        return found

    def launches(self, *, hopper: bool = False) -> dict[str, Callable[[torch.Tensor], object]]:
        if hopper:
            return self.hopper_launches()
        num_out, num_in, num_tokens = self.shape
        found: dict[str, Callable[[torch.Tensor], object]] = {}
        if self.is_packed:
            step = packed_weight(self.kind, 16, 128, "cpu").step
            for blocks in packed_blocks(num_tokens, num_out, num_in, step):
                name = json.dumps({"kernel": "gemm", **asdict(blocks)})
                found[name] = lambda weight, blocks=blocks: gemm_packed(
                    self.x, weight, None, self.out, self.counters, blocks
                )
            return found
        if not self.is_float8 and num_tokens <= MAX_TOKENS:
            for cut in gemv_blocks():
                if (
                    cut["block_out"] * cut["block_in"] * num_tokens // cut["num_warps"] > 32 * 160
                    or cut["block_in"] > num_in
                ):
                    continue
                found[json.dumps({"kernel": "gemv", **cut})] = lambda weight, cut=cut: gemv(
                    self.x, weight, None, self.out, **cut
                )
        for blocks in gemm_blocks(num_tokens, num_out, num_in, self.x.itemsize, self.is_grouped):
            name = json.dumps({"kernel": "gemm", **asdict(blocks)})
            found[name] = lambda weight, blocks=blocks: gemm(
                self.x, weight, None, self.out, self.counters, blocks, self.scales
            )
        return found

    def library(self) -> dict[str, Callable[[torch.Tensor], object]]:
        if self.is_packed:
            return {}
        if not self.is_float8:
            return {"library": lambda weight: torch.mm(self.x, weight.T, out=self.out)}
        assert self.scales is not None
        x_scale, w_scale = self.scales.of_tokens_TG, self.scales.of_outputs
        if self.is_grouped:
            x_scale = x_scale.T.contiguous().T
            columns = w_scale.shape[1]
            padded = torch.empty(len(w_scale), -(-columns // 4) * 4, device=w_scale.device)
            padded[:, :columns] = w_scale
            w_scale = padded[:, :columns]
        return {
            "library": lambda weight: torch._scaled_mm(self.x, weight.T, x_scale, w_scale.T, out_dtype=torch.bfloat16)
        }


def num_bytes(weight: Any) -> int:
    return int(weight.codes.nbytes + weight.scale_GO.nbytes if isinstance(weight, PackedWeight) else weight.nbytes)


def seconds(launch: Callable[[torch.Tensor], object], weights: list[torch.Tensor]) -> float:
    launch(weights[0])
    torch.cuda.synchronize()
    count = max(3, min(60, int(GRAPH_BYTES / num_bytes(weights[0]))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            launch(weights[index % len(weights)])
    graph.replay()
    times = []
    for _ in range(3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[1] / count / 1e3


def distinct(problems: list[tuple[int, int, int, str]], *, hopper: bool) -> list[tuple[tuple[int, int, int, str], str]]:
    """One problem for each kernel that differs."""
    found: dict[tuple[object, ...], tuple[tuple[int, int, int, str], str]] = {}
    for problem in problems:
        num_out, num_in, tokens, _ = problem
        for name in Problem(*problem, "cpu").launches(hopper=hopper):
            cut = json.loads(name)
            if cut["kernel"] == GEMM_HOPPER:
                found.setdefault((name, problem[3], num_out % 16 == 0), (problem, name))
                continue
            rows = cut.get("block_out", 1)
            step = cut.get("block_in") or cut["inputs"] * cut["splits"]
            found.setdefault((name, tokens, num_out % rows == 0, num_in % step == 0), (problem, name))
    return list(found.values())


def compile_ahead(task: tuple[tuple[int, int, int, str], str]) -> None:
    """In a process of its own: for the chip of this machine, which it does not touch."""
    problem, name = task
    there = Problem(*problem, "cpu")
    with contextlib.suppress(OutOfResources, RuntimeError):
        hopper = json.loads(name)["kernel"] == GEMM_HOPPER
        compile_launch(lambda: there.launches(hopper=hopper)[name](there.weights[0]), CHIPS[arch()])


def measured(problem: Problem, *, hopper: bool) -> list[tuple[float, str]]:
    """Microseconds and name of each way, fastest first. What is wrong or fails is printed."""
    expected = problem.expected()
    results = []
    for name, launch in {**problem.launches(hopper=hopper), **problem.library()}.items():
        problem.out.fill_(torch.nan)
        try:
            got = launch(problem.weights[0])
            time_s = seconds(launch, problem.weights)
        except (OutOfResources, RuntimeError) as error:
            print("FAILED", *problem.shape, name, repr(error)[:160])
            continue
        got = got if name == "library" and isinstance(got, torch.Tensor) else problem.out
        error = float((got.float() - expected).norm() / expected.norm())
        if not error < 5e-3:
            print("WRONG", *problem.shape, name, error)
            continue
        results.append((time_s * 1e6, name))
    return sorted(results)


def arch() -> str:
    properties = torch.cuda.get_device_properties(0)
    is_hip = torch.version.hip is not None
    return str(properties.gcnArchName).split(":")[0] if is_hip else f"sm_{properties.major}{properties.minor}"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=(*SHAPES, *KIND_NAMES), required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--first-shape", type=int, default=0)
    parser.add_argument("--shown", type=int, default=2)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds")
    parser.add_argument("--hopper", action="store_true")
    args = parser.parse_args()
    begun = time.monotonic()
    shapes = SHAPES.get(args.kind, PACKED_SHAPES)[args.first_shape :]
    problems = [(*shape, tokens, args.kind) for shape, tokens in itertools.product(shapes, args.tokens)]
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_ahead, distinct(problems, hopper=args.hopper)))
    print(f"compiled {time.monotonic() - begun:.1f} s", flush=True)
    for num_out, num_in in shapes:
        size = int(num_out * num_in * {"bfloat16": 2, "int4": 0.5, "float4": 0.5}.get(args.kind, 1))
        weights = Problem(num_out, num_in, 1, args.kind, "cuda", 1 + int(CACHE_BYTES / size)).weights
        for tokens in args.tokens:
            if time.monotonic() - begun > args.limit:
                print("out of time")
                return
            problem = Problem(num_out, num_in, tokens, args.kind, "cuda", 0)
            problem.weights = weights
            results = measured(problem, hopper=args.hopper)
            # The library is kept where it wins by more than what overlapping gives our kernels in a row of layers.
            best = results[0]
            library = next((time_us for time_us, name in results if name == "library"), 0.0)
            shown = ", ".join(f"{time_us:.1f} us {name}" for time_us, name in results[: args.shown])
            short = shown.translate(str.maketrans("", "", '"{}'))
            print(f"{num_out}x{num_in} {tokens} library {library:.1f} us | {short}", flush=True)
            if args.hopper:
                others = min(time_us for time_us, name in results if GEMM_HOPPER not in name)
                is_worthwhile = WORTHWHILE * best[0] <= others
                cut = json.loads(best[1]) if is_worthwhile else {}
                cut.pop("kernel", None)
                print("ROW " + json.dumps([GEMM_HOPPER, args.kind, num_out, num_in, tokens, cut]).replace(" ", ""))
                continue
            if best[1] == "library" and len(results) > 1 and results[1][0] < 1.03 * best[0]:
                best = results[1]
            choice = {"kernel": "library"} if best[1] == "library" else json.loads(best[1])
            print("ROW " + json.dumps([args.kind, num_out, num_in, tokens, choice]).replace(" ", ""))


if __name__ == "__main__":
    main()
