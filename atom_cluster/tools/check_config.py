"""`atom-cluster check-config`: what a configuration file comes to on this machine, and why."""

from __future__ import annotations

from pathlib import Path

import yaml

from atom_cluster.config.facts import read_model_facts
from atom_cluster.config.load import load_file
from atom_cluster.config.model_path import resolve_model_path
from atom_cluster.config.resolve import ResolvedConfig, resolve
from atom_cluster.platform.facts import local_platform_facts


def explain_file(path: Path) -> str:
    """The resolved configuration of every application in a Serve YAML and the reason for each automatic choice.

    Hardware is that of this machine. Raises ConfigError with all problems of the file.
    """
    platform = local_platform_facts()
    sections = []
    for application in load_file(path).applications:
        config = application.args
        model_dir = resolve_model_path(config.model, config.model_options.revision)
        resolved = resolve(config, platform, read_model_facts(model_dir))
        sections.append(f"# application {application.name}, model in {model_dir}\n{describe(resolved)}")
    return "\n\n".join(sections)


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
