"""The cluster's processes as Ray Serve deployments: ingress, router and replicas. Thin: policy and engines live below."""
