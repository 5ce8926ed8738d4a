"""Reference hyper-connections, written out. Any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atom_cluster.ops.streams import StreamRule


def connect_streams(
    streams_TND: torch.Tensor, fn_JI: torch.Tensor, scale_3: torch.Tensor, bias_J: torch.Tensor, rule: StreamRule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(block input, w, mix)"""
    dtype, num = streams_TND.dtype, streams_TND.shape[1]
    sizes = [num, num, num * num]
    logits = torch.split(_project(streams_TND, fn_JI, rule), sizes, dim=-1)
    factors_and_biases = zip(logits, scale_3.unbind(), torch.split(bias_J, sizes))
    read_TN, write_TN, mix_TM = (logit * scale + bias for logit, scale, bias in factors_and_biases)
    x_TD = _read(streams_TND, read_TN, rule)
    mix_TNN = _doubly_stochastic(mix_TM.view(-1, num, num).softmax(dim=-1) + rule.eps, rule)
    return x_TD, (2 * write_TN.sigmoid()).to(dtype), mix_TNN.to(dtype)


def write_streams(
    streams_TND: torch.Tensor, output_TD: torch.Tensor, write_TN: torch.Tensor, mix_TNN: torch.Tensor
) -> torch.Tensor:
    """The output by w, and the mixed streams."""
    wide = torch.promote_types(streams_TND.dtype, torch.float32)
    mixed_TND = torch.matmul(mix_TNN.to(wide).transpose(1, 2), streams_TND.to(wide))
    return (write_TN[..., None] * output_TD[:, None].to(wide) + mixed_TND).to(streams_TND.dtype)


def join_streams(
    streams_TND: torch.Tensor, fn_NI: torch.Tensor, scale_1: torch.Tensor, bias_N: torch.Tensor, rule: StreamRule
) -> torch.Tensor:
    """sum_n r_n S_n"""
    return _read(streams_TND, _project(streams_TND, fn_NI, rule) * scale_1 + bias_N, rule)


def _project(streams_TND: torch.Tensor, fn_JI: torch.Tensor, rule: StreamRule) -> torch.Tensor:
    flat_TI = streams_TND.flatten(1).to(fn_JI.dtype)
    return F.linear(flat_TI * torch.rsqrt(flat_TI.square().mean(-1, keepdim=True) + rule.norm_eps), fn_JI)


def _read(streams_TND: torch.Tensor, logit_TN: torch.Tensor, rule: StreamRule) -> torch.Tensor:
    read_TN = logit_TN.sigmoid() + rule.eps
    return (read_TN[..., None] * streams_TND).sum(dim=1).to(streams_TND.dtype)


def _doubly_stochastic(mix_TNN: torch.Tensor, rule: StreamRule) -> torch.Tensor:
    """Sinkhorn's iterations."""
    mix_TNN = mix_TNN / (mix_TNN.sum(dim=-2, keepdim=True) + rule.eps)
    for _ in range(rule.num_iterations - 1):
        mix_TNN = mix_TNN / (mix_TNN.sum(dim=-1, keepdim=True) + rule.eps)
        mix_TNN = mix_TNN / (mix_TNN.sum(dim=-2, keepdim=True) + rule.eps)
    return mix_TNN
