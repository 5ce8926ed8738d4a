"""A Serve YAML file becomes checked configuration; every problem of the file is named at once, with its path and a
near valid key. Knows nothing of Ray: what Serve then does with the file is Serve's."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.serve_file import ServeFile
from atom_cluster.errors import ConfigError


def load_file(path: Path) -> ServeFile:
    """Read and check a whole Serve YAML file, `args` included.

    Raises ConfigError listing every problem as `applications[0].args.prefil: unknown key; did you mean ...`.
    """
    data = read_yaml(path)
    try:
        return ServeFile.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_report(str(path), problems(error, data))) from None


def load_args(data: object, *, name: str = "args") -> ClusterConfig:
    """Check the `args:` of a recipe alone, for instance when they do not come from a file. Raises ConfigError."""
    try:
        return ClusterConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_report(name, problems(error, data))) from None


def read_yaml(path: Path) -> object:
    """The content of a YAML file. Raises ConfigError if it cannot be read, is no YAML, or names a key twice."""
    try:
        with path.open(encoding="utf-8") as file:
            # _UniqueKeyLoader is a SafeLoader: it builds plain values only.
            return yaml.load(file, Loader=_UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def problems(error: ValidationError, data: object) -> list[str]:
    """One line per wrong value of `data`, in the order of the checks: `cache.block_size: ...`."""
    messages_by_path: dict[str, list[str]] = {}
    for line in error.errors(include_url=False, include_input=False):
        message = line["msg"].removeprefix("Value error, ")
        messages_by_path.setdefault(_dotted(line["loc"], data), []).append(message)
    # A value that may be one of several types has one message per type.
    return [
        f"{path}: {', or: '.join(messages)}" if path else ", or: ".join(messages)
        for path, messages in messages_by_path.items()
    ]


def _dotted(location: tuple[int | str, ...], data: object) -> str:
    """`applications[0].args.model`, without pydantic's names for the alternatives of a union."""
    path = ""
    for part in location:
        if isinstance(data, dict):
            path += f".{part}" if path else str(part)
            data = data.get(part)
        elif isinstance(data, (list, tuple)) and isinstance(part, int):
            path += f"[{part}]"
            data = data[part] if part < len(data) else None
        else:
            break
    return path


def _report(name: str, lines: list[str]) -> str:
    count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
    return f"{name} has {count}:\n" + "\n".join(f"  {line}" for line in lines)


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key `{key_node.value}` twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)
