"""The Ray Serve keys that our YAML files may use, checked strictly.

Serve's own schema drops keys it does not know, so a typo there would silently change nothing. These classes only check:
Serve reads the file itself. Keys of Serve that make no sense here (gRPC, autoscaling by HTTP load) are left out on
purpose. Knows nothing of Ray's classes; a test compares the key names with the installed Serve.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from atom_cluster.config.base import FrozenConfig
from atom_cluster.config.cluster import ClusterConfig

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


class HttpOptions(FrozenConfig):
    """Where Serve's HTTP proxy listens."""

    host: str
    """Address to listen on. Required: Serve would listen on all interfaces otherwise."""
    port: int = Field(8000, ge=1, le=65535)
    """TCP port."""
    root_path: str = ""
    """Prefix that a reverse proxy strips before requests get here."""
    request_timeout_s: float | None = Field(None, gt=0)
    """Serve ends a request after this; None leaves it to `serving.request_timeout_s`."""
    keep_alive_timeout_s: int = Field(90, ge=1)
    """Idle connections are closed after this."""
    ssl_keyfile: str | None = None
    """Private key for HTTPS."""
    ssl_certfile: str | None = None
    """Certificate for HTTPS."""
    ssl_keyfile_password: str | None = None
    """Password of the private key."""
    ssl_ca_certs: str | None = None
    """Authorities that client certificates must come from."""


class LoggingOptions(FrozenConfig):
    """Serve's own logs."""

    encoding: Literal["TEXT", "JSON"] = "TEXT"
    """Format of a line."""
    log_level: LogLevel = "INFO"
    """Least severe level that is written."""
    logs_dir: str | None = None
    """Directory of the log files; None is Ray's session directory."""
    enable_access_log: bool = True
    """One line per HTTP request."""


class RuntimeEnv(FrozenConfig):
    """What Ray sets up on every node before it starts processes of the application."""

    working_dir: str | None = None
    """URI of an archive with the code, for clusters whose nodes do not share it."""
    py_modules: tuple[str, ...] = ()
    """URIs of further packages."""
    env_vars: dict[str, str] = {}
    """Environment variables of the processes."""


class ActorOptions(FrozenConfig):
    """Ray resources of one replica of a deployment. Engine replicas reserve those of their ranks themselves."""

    num_cpus: float | None = Field(None, ge=0)
    """Ray CPUs."""
    num_gpus: float | None = Field(None, ge=0)
    """Ray GPUs."""
    memory: float | None = Field(None, ge=0)
    """Bytes of memory that Ray reserves."""
    resources: dict[str, float] = {}
    """Custom Ray resources, for instance to pin a deployment to nodes."""
    accelerator_type: str | None = None
    """Ray's name of a GPU type."""
    label_selector: dict[str, str] | None = None
    """Labels that a node must have."""
    runtime_env: RuntimeEnv = RuntimeEnv()
    """Replaces the application's for this deployment."""


class DeploymentOptions(FrozenConfig):
    """Overrides for one deployment of the application. Needed rarely: `args` already sets what depends on it."""

    name: str
    """Deployment to override; Serve refuses a name that the application does not have."""
    num_replicas: int | None = Field(None, ge=1)
    """Number of replicas."""
    max_ongoing_requests: int | None = Field(None, ge=1)
    """Requests that Serve hands to one replica at a time."""
    max_queued_requests: int | None = Field(None, ge=-1)
    """Requests that wait for a replica before Serve answers 503; -1 is no limit."""
    max_surge_percent: int | None = Field(None, ge=0, le=100)
    """Percentage of replicas that may start before old ones are stopped, when the application is deployed anew. For
    engines only where devices are free for so many more: else new ones are waited for, and nothing changes."""
    graceful_shutdown_wait_loop_s: float | None = Field(None, ge=0)
    """How often Serve asks whether a stopping replica is done."""
    graceful_shutdown_timeout_s: float | None = Field(None, ge=0)
    """A stopping replica is killed after this."""
    health_check_period_s: float | None = Field(None, gt=0)
    """How often Serve checks a replica."""
    health_check_timeout_s: float | None = Field(None, gt=0)
    """A check that takes longer has failed."""
    max_replicas_per_node: int | None = Field(None, ge=1)
    """Most replicas on one node."""
    ray_actor_options: ActorOptions = ActorOptions()
    """Ray resources of a replica."""
    logging_config: LoggingOptions | None = None
    """Replaces the application's."""


class ServeApplication(FrozenConfig):
    """One application: one model served by one cluster of replicas."""

    name: str = "default"
    """Name in `serve status` and the dashboard."""
    route_prefix: str | None = "/"
    """HTTP path under which the application answers."""
    import_path: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    """Recipe, such as `deployments.disaggregated:build`."""
    args: ClusterConfig
    """Argument of the recipe."""
    runtime_env: RuntimeEnv = RuntimeEnv()
    """What Ray sets up on every node."""
    deployments: tuple[DeploymentOptions, ...] = ()
    """Overrides by deployment."""
    logging_config: LoggingOptions | None = None
    """Serve's logs of this application."""


class ServeFile(FrozenConfig):
    """A whole file for `serve run`."""

    http_options: HttpOptions
    """HTTP proxy."""
    proxy_location: Literal["Disabled", "HeadOnly", "EveryNode"] = "EveryNode"
    """Nodes that run an HTTP proxy."""
    logging_config: LoggingOptions | None = None
    """Serve's logs."""
    target_capacity: float | None = Field(None, ge=0, le=100)
    """Percentage of all replica counts to run, used while two clusters are swapped."""
    applications: tuple[ServeApplication, ...]
    """What is served."""

    @field_validator("applications")
    @classmethod
    def _serves_something(cls, applications: tuple[ServeApplication, ...]) -> tuple[ServeApplication, ...]:
        # Not `min_length`, which also complains when all applications of the file have problems of their own.
        if not applications:
            raise ValueError("give at least one application")
        return applications
