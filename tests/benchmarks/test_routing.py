import pytest
import torch

from atom_cluster.layers.router import Router
from atom_cluster.ops.moe import RoutingRule
from atom_cluster.ops.torch_ref.routing import route
from benchmarks import offline_throughput, routing
from tests.tiny_models import tiny_model_dir

DEEPSEEK = RoutingRule(experts_per_token=8, score="sigmoid", num_groups=8, topk_groups=4)


def test_every_token_gets_the_favoured_experts_whatever_its_scores() -> None:
    favoured = routing.favoured_experts(DEEPSEEK, 256)
    assert favoured == [0, 1, 32, 33, 64, 65, 96, 97]
    bias = torch.randn(256)
    bias[favoured] += routing.ADVANTAGE
    experts, weights = route(torch.randn(5, 256), bias, DEEPSEEK)
    assert experts.sort().values.tolist() == [favoured] * 5
    assert (weights > 0).all()


def test_a_router_without_a_bias_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Router, "finish_loading", Router.finish_loading)  # put back afterwards
    settings = ["--model", str(tiny_model_dir("qwen3_moe")), "--workload", "1x4x2", "--dtype", "float32"]
    with pytest.raises(ValueError, match="no bias"):
        offline_throughput.main([*settings, "--same-experts"])
