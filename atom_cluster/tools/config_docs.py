"""Writes docs/configuration.md from the configuration classes, whose docstrings are its only source.

`python -m atom_cluster.tools.config_docs FILE` writes; with `--check` it only says whether FILE is current.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from atom_cluster.config.base import FrozenConfig
from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.serve_file import ServeFile

_HEAD = """\
# Configuration

*Generated from the docstrings in `atom_cluster/config/` by `scripts/gen-config-docs`; do not edit.*

One YAML file is one Ray Serve configuration; `args:` of its application is what configures atom_cluster. An unknown
key anywhere in the file is an error that names the key and the nearest valid one. `atom-cluster check-config FILE`
checks a file without starting anything and prints every automatic value together with the reason for it, and what each
rank has its memory for. With `--accelerator MI300X`, `MI355X` or `H200` it needs neither GPUs nor the checkpoint.

Environment variables carry secrets and facts about one machine, never behaviour:

| variable | meaning |
|---|---|
| `ATOM_CLUSTER_SECRET` | secret of at least 16 bytes shared by all processes of a cluster; made up when absent |
| `ATOM_CLUSTER_SECRET_FILE` | file that holds the secret, instead of the above |
| `ATOM_CLUSTER_API_KEYS_FILE` | absolute path of the file of API keys, where `api.protection.api_keys_file` is null |
| `ATOM_CLUSTER_CACHE` | absolute path of the directory for fetched models; `~/.cache/atom_cluster` when absent |
"""


def render() -> str:
    """The whole page."""
    parts = [_HEAD, "## The file\n", *_sections(ServeFile, stop_at=ClusterConfig)]
    parts += ["## `args`: one cluster\n", *_sections(ClusterConfig)]
    return "\n".join(parts)


def _sections(root: type[FrozenConfig], stop_at: type[FrozenConfig] | None = None) -> Iterator[str]:
    """One table per class below `root`, under the paths of all keys that hold it."""
    paths_by_class: dict[type[FrozenConfig], list[str]] = {}
    _collect(root, "", stop_at, paths_by_class)
    yield _table(root)
    for config, paths in paths_by_class.items():
        yield f"### {', '.join(f'`{path}`' for path in paths)}\n"
        yield _table(config)


def _collect(
    config: type[FrozenConfig],
    prefix: str,
    stop_at: type[FrozenConfig] | None,
    paths_by_class: dict[type[FrozenConfig], list[str]],
) -> None:
    for name, field in config.model_fields.items():
        for inner in config_classes(field.annotation):
            if inner is not stop_at:
                paths_by_class.setdefault(inner, []).append(prefix + name)
                _collect(inner, f"{prefix}{name}.", stop_at, paths_by_class)


def _table(config: type[FrozenConfig]) -> str:
    rows = [_paragraph(config.__doc__), "", "| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in config.model_fields.items():
        kind, default, meaning = _kind(field), _default(field), _paragraph(field.description)
        rows.append(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{name}`", kind, default, meaning)) + " |"
        )
    return "\n".join(rows) + "\n"


def _paragraph(text: str | None) -> str:
    return " ".join((text or "").split())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, FrozenConfig):
        return ""
    if field.default is None:
        return "`null`"
    # YAML writes most values as JSON does, and text without quotes.
    return f"`{field.default if field.default and isinstance(field.default, str) else json.dumps(field.default)}`"


def _kind(field: FieldInfo) -> str:
    bounds = _bounds(field.metadata)
    return _type_name(field.annotation) + (f" {bounds}" if bounds else "")


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return f"{_type_name(arguments[0])} {_bounds(_constraints(arguments[1:]))}".strip()
    if origin in (Union, UnionType):
        return " or ".join(_type_name(argument) for argument in arguments if argument is not NoneType)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"map of {_type_name(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, FrozenConfig):
        return "section"
    return {int: "integer", float: "number", str: "text", bool: "true or false"}[annotation]


def _constraints(metadata: Sequence[Any]) -> list[Any]:
    return [inner for item in metadata for inner in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _bounds(metadata: Sequence[Any]) -> str:
    found = []
    for item in metadata:
        match item:
            case annotated_types.Ge(bound):
                found.append(f"≥ {bound}")
            case annotated_types.Gt(bound):
                found.append(f"> {bound}")
            case annotated_types.Le(bound):
                found.append(f"≤ {bound}")
            case annotated_types.Lt(bound):
                found.append(f"< {bound}")
            case _:
                continue
    return ", ".join(found)


def config_classes(annotation: Any) -> Iterator[type[FrozenConfig]]:
    """The configuration classes in a field's annotation, however wrapped."""
    if isinstance(annotation, type) and issubclass(annotation, FrozenConfig):
        yield annotation
    for argument in get_args(annotation):
        yield from config_classes(argument)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or with `--check` return 1 when it is not current."""
    parser = argparse.ArgumentParser(prog="gen-config-docs")
    parser.add_argument("file", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    page = render()
    if not options.check:
        options.file.write_text(page, encoding="utf-8")
    elif not options.file.is_file() or options.file.read_text(encoding="utf-8") != page:
        print(f"{options.file} is not current: run scripts/gen-config-docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
