"""Rows of a captured step need nothing from the host, however many drafts are configured."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import pytest
import torch

from atom_cluster.config.speculative import SpeculativeConfig
from atom_cluster.ops.triton import attention, mla, runtime
from tests.ops.test_attention_contract import Layer, check, scattered_rows
from tests.ops.test_mla_contract import DIMS
from tests.ops.test_mla_contract import check as check_mla

pytestmark = pytest.mark.skipif(not runtime.INTERPRETED, reason="tensors of the CPU need the interpreter")

MOST_DRAFTS = next(bound.le for bound in SpeculativeConfig.model_fields["num_tokens"].metadata if hasattr(bound, "le"))
ROWS = [(40, 1 + MOST_DRAFTS), (1 + MOST_DRAFTS, 1 + MOST_DRAFTS), (300, 1 + MOST_DRAFTS)]


def refuse(*_: object, **__: object) -> NoReturn:
    raise AssertionError("the host lists this work, or makes room for it")


@pytest.mark.parametrize("window", [None, 7])
def test_attention(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    monkeypatch.setattr(attention, "TiledAttention", refuse)
    check("triton", ROWS, Layer(window=window))


def test_latent_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla, "plan_expanded_rows", refuse)
    check_mla("triton", ROWS, DIMS, torch.float32, is_sparse=False)
    metadata, _ = scattered_rows(ROWS, None)
    bound = replace(metadata, context_len_cpu=(1 << 20,) * len(ROWS))
    dims = replace(DIMS, num_heads=128, latent_dim=512, nope_dim=128, rope_dim=64, value_dim=128)
    assert [run.is_expanded for run in mla.plan_mla(bound, dims)._runs] == [False]
