"""The cluster's processes as Ray Serve deployments: ingress, router, replicas. Thin: policy is elsewhere."""
