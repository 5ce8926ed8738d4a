"""Whoever comes from ATOM finds every name in a table, and what the tables name here exists."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.serve_file import ServeFile
from atom_cluster.observability.metrics import ALL_METRICS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "from_atom.md").read_text()


def atom_names(section: str) -> list[str]:
    lines = Path(__file__).with_name("atom_names.txt").read_text().splitlines()
    begin = lines.index(f"[{section}]") + 1
    return list(itertools.takewhile(lambda line: not line.startswith("["), lines[begin:]))


def first_column(page: str) -> str:
    return "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| "))


@pytest.mark.parametrize("section", ["server", "environment"])
def test_every_flag_and_variable_is_in_the_first_column(section: str) -> None:
    names = atom_names(section)
    assert len(names) > 50
    column = first_column(PAGE)
    assert [name for name in names if f"`{name}`" not in column and f"`{name} " not in column] == []


def test_every_flag_of_the_benchmark_client_is_in_its_table() -> None:
    names = atom_names("benchmark")
    assert len(names) > 40
    column = first_column((DOCS / "benchmarking.md").read_text())
    assert [name for name in names if f"`{name}`" not in column] == []


def keys_of(model: type[BaseModel], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, field in model.model_fields.items():
        found.add(prefix + name)
        for part in _models_in(field.annotation):
            found |= keys_of(part, f"{prefix}{name}.")
    return found


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def test_the_keys_that_it_names_exist() -> None:
    keys = keys_of(ClusterConfig)
    keys |= keys_of(ServeFile)
    roots = {key.partition(".")[0] for key in keys}
    second = "\n".join(line.split("|")[2] for line in PAGE.splitlines() if line.startswith("| "))
    named = {key for key in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)", second) if key.partition(".")[0] in roots}
    assert len(named) > 40
    assert named - keys == set()


def test_the_metrics_that_it_names_exist() -> None:
    named = set(re.findall(r"`(atom_[a-z_]+)`", PAGE))
    assert named and named <= {metric.name for metric in ALL_METRICS}
