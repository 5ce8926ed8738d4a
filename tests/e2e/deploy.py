"""`serve deploy` to the Ray cluster at an address, wherever its dashboard listens.

python -m tests.e2e.deploy ADDRESS FILE
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def serve_deploy(ray_address: str, file: Path) -> None:
    """In a process of its own: Ray reads when it is imported how to prove who it is, and there is one connection."""
    subprocess.run(
        [sys.executable, "-m", __name__, ray_address, str(file)],
        check=True,
        timeout=60,
        env={**os.environ, "RAY_AUTH_MODE": "token"},
    )


def _deploy(ray_address: str, file: str) -> None:
    import ray
    import yaml
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    with ray.init(address=ray_address, log_to_driver=False, logging_level="warning") as context:
        client = ServeSubmissionClient(f"http://{context.dashboard_url}")
        client.deploy_applications(yaml.safe_load(Path(file).read_text()))


if __name__ == "__main__":
    _deploy(*sys.argv[1:])
