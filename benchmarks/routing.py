"""Dummy weights that send every token to the same experts. Knows no engine.

Some loaders' dummy weights do: where the router's weights are tiny, its bias decides alone, which is the same for every
token. A step of theirs then reads eight experts of a layer where one of ours, whose logits are as spread as a trained
router's, reads most of them. To compare with such figures, ours has to do the same.
"""

from __future__ import annotations

import torch

from atom_cluster.layers.router import Router
from atom_cluster.ops.moe import RoutingRule

ADVANTAGE = 100.0
"""More than any score."""


def favoured_experts(rule: RoutingRule, num_experts: int) -> list[int]:
    """As many experts as a token has, spread evenly over as many groups as it may have them from."""
    group_size = num_experts // rule.num_groups
    per_group = -(-rule.experts_per_token // rule.topk_groups)
    experts = [group * group_size + index for index in range(per_group) for group in range(rule.topk_groups)]
    return sorted(experts[: rule.experts_per_token])


def favour_some_experts() -> None:
    """Of every model that is loaded in this process from now on, tokens go to `favoured_experts`.

    Only of routers with a bias for the choice; those without raise ValueError.
    """
    finish = Router.finish_loading

    def finish_loading(self: Router) -> None:
        finish(self)
        bias, rule = self._bias_E, self._spec
        if bias is None:
            raise ValueError("--same-experts: the model's router has no bias that could favour experts")
        bias[torch.tensor(favoured_experts(rule, len(bias)), device=bias.device)] += ADVANTAGE

    Router.finish_loading = finish_loading  # type: ignore[method-assign]
