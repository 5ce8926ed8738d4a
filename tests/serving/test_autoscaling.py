"""The number of replicas follows the requests that engines report."""

from __future__ import annotations

import pytest
from ray.serve.config import AutoscalingContext

from atom_cluster.config.parallel import AutoscalingConfig
from atom_cluster.serving.autoscaling import REQUESTS, requests_policy, serve_autoscaling


def context_of(metrics: object, *, num_replicas: int = 2, target_requests: float = 10.0) -> AutoscalingContext:
    return AutoscalingContext(
        deployment_id="d",
        deployment_name="Decode",
        app_name="atom",
        current_num_replicas=num_replicas,
        target_num_replicas=num_replicas,
        running_replicas=[],
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics=metrics,
        raw_metrics=None,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=9,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=serve_autoscaling(AutoscalingConfig(max_replicas=9, target_requests=target_requests)),
    )


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        ({"a": 10.0, "b": 10.0}, 2),
        ({"a": 10.0, "b": 10.5}, 3),
        ({"a": 95.0, "b": 0.0}, 10),
        ({"a": 1.0, "b": 0.0}, 1),
        ({"a": 0.0, "b": 0.0}, 0),  # Serve applies the lower bound
    ],
)
def test_as_many_replicas_as_the_requests_need(reported: dict[str, float], expected: int) -> None:
    assert requests_policy(context_of({REQUESTS: reported})) == (expected, {})
    assert requests_policy(context_of(lambda: {REQUESTS: reported})) == (expected, {})


@pytest.mark.parametrize("metrics", [None, {}, {REQUESTS: {}}, {"other": {"a": 1.0}}])
def test_nothing_changes_while_nobody_reports(metrics: object) -> None:
    assert requests_policy(context_of(metrics, num_replicas=4)) == (4, {})


def test_serve_gets_our_bounds_delays_and_policy() -> None:
    ours = AutoscalingConfig(
        min_replicas=2, max_replicas=5, target_requests=7.5, upscale_delay_s=3.0, downscale_delay_s=40.0
    )
    serves = serve_autoscaling(ours)
    assert (serves.min_replicas, serves.max_replicas, serves.initial_replicas) == (2, 5, 2)
    assert (serves.get_target_ongoing_requests(), serves.upscale_delay_s, serves.downscale_delay_s) == (7.5, 3.0, 40.0)
    # Serve looks the policy up by its name, in the controller's process.
    assert serves.policy.get_policy()(context_of({REQUESTS: {"a": 25.0}})) == (3, {})
