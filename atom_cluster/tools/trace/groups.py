"""Which group of work a kernel belongs to, by its name. Our own kernels are known by the file that defines them."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

GROUPS = (
    "gemm",
    "attention",
    "moe",
    "norm",
    "rotary/kv",
    "activation",
    "sampling",
    "communication",
    "copy",
    "other",
)
"""In the order of tables and pictures."""

_KERNEL_DIRECTORIES = ("ops/triton", "parallel")

_GROUP_BY_FILE = (
    (r"peer_all_reduce|collectives", "communication"),
    (r"attention_store|mla_store|paged_store|rotary", "rotary/kv"),
    (r"attention|mla|sparse|compress|gated_delta", "attention"),
    (r"moe|routing", "moe"),
    (r"norm", "norm"),
    (r"gem[mv]|linear", "gemm"),
    (r"activation|quantize", "activation"),
    (r"sampling", "sampling"),
)
_GROUP_BY_NAME = (
    (
        r"nccl|rccl|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|broadcast_kernel|cross_device|mori",
        "communication",
    ),
    (r"^mem(cpy|set)\b|^void at::native::.*(copy|cat|index|fill|gather|scatter)", "copy"),
    (r"\bmoe|_moe|fused_moe|expert|topk_softmax|grouped_gemm", "moe"),
    (r"reshape_and_cache|rope|rotary|kv_cache|concat_and_cache", "rotary/kv"),
    (r"flash|fmha|attention|attn|\bmla|_mla|paged", "attention"),
    (r"norm", "norm"),
    (r"gemm|gemv|cublas|cutlass|nvjet|\bcijk|wgmma|xmma|matmul|ck_tile.*gemm|splitk", "gemm"),
    (r"argmax|multinomial|sampl|radix|sort|topk|softmax|exponential|penalt", "sampling"),
    (r"silu|gelu|swiglu|act_and_mul|quant|sigmoid", "activation"),
    (
        r"^aten::(_?addmm|mm|bmm|baddbmm|linear|_scaled_mm|_weight_int\w+)$|^quantized::linear|mkldnn.*linear|onednn",
        "gemm",
    ),
    (
        r"^aten::(copy_|_to_copy|to|clone|cat|index\w*|_index\w*|index_select|gather|scatter\w*|fill_|zero_|contiguous)$",
        "copy",
    ),
    (r"elementwise|reduce_kernel|^aten::", "other"),
)


@functools.lru_cache(maxsize=4096)
def group_of(name: str) -> str:
    """One of `GROUPS`. A name that kernels of several groups share is `other`."""
    own = own_kernels().get(name)
    if own is not None:
        return own
    lowered = name.lower()
    return next((group for pattern, group in _GROUP_BY_NAME if re.search(pattern, lowered)), "other")


@functools.lru_cache(maxsize=1)
def own_kernels() -> dict[str, str]:
    """Group by name of every Triton kernel of this package, read from its sources: Triton need not be there."""
    groups_by_name: dict[str, set[str]] = {}
    root = Path(__file__).resolve().parents[2]
    for directory in _KERNEL_DIRECTORIES:
        for path in sorted((root / directory).glob("*.py")):
            group = next((group for pattern, group in _GROUP_BY_FILE if re.search(pattern, path.stem)), "other")
            for name in _kernel_names(path):
                groups_by_name.setdefault(name, set()).add(group)
    return {name: groups.pop() if len(groups) == 1 else "other" for name, groups in groups_by_name.items()}


def _kernel_names(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(item) for item in node.decorator_list)
    ]
