"""How boxes that Hopper's bulk copies bring lie in shared memory, worked out once: it takes longer than a launch."""

from __future__ import annotations

from functools import cache

import torch
from triton.experimental.gluon import language as gl

GL_TYPES = {
    torch.float32: gl.float32,
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float8_e4m3fn: gl.float8e4nv,
}


@cache
def box_layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """What matrix units read best."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], GL_TYPES[dtype])
