"""`atom-cluster check-config`: what a configuration file comes to, and why: on this machine, or on named accelerators.

Needs neither the hardware nor the checkpoint: see `tools/model_source.py` for where a model's config.json is from.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from atom_cluster.config.accelerators import Accelerator, accelerator_named
from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.facts import ModelFacts, PlatformFacts
from atom_cluster.config.load import load_file
from atom_cluster.config.resolve import ResolvedConfig, resolve
from atom_cluster.errors import ConfigError
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.platform.detect import detect_platform
from atom_cluster.platform.device import device_memory, select_device
from atom_cluster.platform.facts import local_platform_facts
from atom_cluster.tools.memory_table import describe_groups, plan_groups
from atom_cluster.tools.model_source import ModelSource, find_model


def explain_file(path: Path, *, accelerator: str | None = None, model_config: Path | None = None) -> str:
    """The resolved configuration of every application in a Serve YAML, the reason for each automatic choice, and what
    each rank has its memory for.

    accelerator: hardware to plan for; None: that of this machine. model_config: the model's config.json.
    Raises ConfigError with all problems of the file, and for a group that does not fit.
    """
    named = None if accelerator is None else accelerator_named(accelerator)
    sections = []
    for application in load_file(path).applications:
        config = application.args
        model = find_model(config.model, config.model_options.revision, file=model_config)
        resolved, planned = resolve_for(config, model, named)
        lines = [f"# application {application.name}, model {model.where}", describe(resolved)]
        if config.simulation is None:
            groups = plan_groups(resolved.config, HfConfig(model.values), planned)
            lines += ["#", *(f"# {line}" for line in describe_groups(groups).splitlines())]
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def resolve_for(
    config: ClusterConfig, model: ModelSource, accelerator: Accelerator | None
) -> tuple[ResolvedConfig, Accelerator | None]:
    """The configuration resolved for as many accelerators as it asks for, or for this machine; and its accelerator."""
    facts = ModelFacts.from_config(model.values)
    if accelerator is None:
        platform, accelerator = local_platform_facts(), _local_accelerator()
        if platform.num_gpus == 0 and any(group.device == "cuda" for group in config.groups().values()):
            raise ConfigError(
                "a group computes on GPUs, and this machine has none: --accelerator says which to plan for"
            )
        return resolve(config, platform, facts), accelerator
    num_gpus = sum(group.max_ranks for group in config.groups().values())
    platform = PlatformFacts(
        vendor=accelerator.vendor,
        num_gpus=num_gpus,
        num_cores=local_platform_facts().num_cores,
        is_single_host=num_gpus <= accelerator.gpus_per_node,
    )
    return resolve(config, platform, facts), accelerator


def _local_accelerator() -> Accelerator | None:
    """This machine's first GPU; None if it has none."""
    platform = detect_platform()
    if platform.vendor == "cpu":
        return None
    return Accelerator(
        name=platform.arch,
        vendor=platform.vendor,
        memory_bytes=device_memory(select_device(platform)).total_bytes,
        gpus_per_node=platform.num_devices,
    )


def describe(resolved: ResolvedConfig) -> str:
    """YAML of a resolved configuration, each automatic choice with its reason in a comment behind it."""
    lines: list[str] = []
    _append(lines, resolved.config.model_dump(exclude_none=True), resolved, prefix="")
    return "\n".join(lines)


def _append(lines: list[str], values: dict[str, object], resolved: ResolvedConfig, prefix: str) -> None:
    indent = "  " * prefix.count(".")
    for key, value in values.items():
        path = prefix + key
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{key}:")
            _append(lines, value, resolved, prefix=f"{path}.")
            continue
        reason = resolved.reasons.get(path)
        comment = f"  # auto: {reason}" if reason else ""
        lines.append(f"{indent}{key}: {_scalar(value)}{comment}")


def _scalar(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1_000_000)
    return text.removesuffix("\n").removesuffix("\n...")
