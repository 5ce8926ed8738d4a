"""How many replicas of a group there should be, from what its engines report.

Serve's own count of ongoing requests is always zero here, since Serve carries none of them; the heads report the
requests of their engines instead (`EngineReplica.record_autoscaling_stats`). Serve applies bounds and delays itself.
"""

from __future__ import annotations

import math

from ray.serve.config import AutoscalingConfig as ServeAutoscaling
from ray.serve.config import AutoscalingContext, AutoscalingPolicy

from atom_cluster.config.parallel import AutoscalingConfig

REQUESTS = "requests"
"""Key of the running plus waiting requests of one replica."""


def requests_policy(context: AutoscalingContext) -> tuple[int, dict[str, object]]:
    """Replicas that the reported requests call for. As many as there are while nobody has reported."""
    reported = (context.aggregated_metrics or {}).get(REQUESTS) or {}
    if not reported:
        return context.target_num_replicas, {}
    num_requests = sum(reported.values())
    return math.ceil(num_requests / context.config.get_target_ongoing_requests()), {}


def serve_autoscaling(config: AutoscalingConfig) -> ServeAutoscaling:
    """Serve's options for our autoscaling configuration."""
    return ServeAutoscaling(
        min_replicas=config.min_replicas,
        max_replicas=config.max_replicas,
        initial_replicas=config.min_replicas,
        target_ongoing_requests=config.target_requests,
        upscale_delay_s=config.upscale_delay_s,
        downscale_delay_s=config.downscale_delay_s,
        policy=AutoscalingPolicy(policy_function=f"{__name__}:requests_policy"),
    )
