"""The Dockerfiles, as far as they can be checked without building: nothing here can."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "kubernetes" / "docker").glob("*.Dockerfile"))


def name_of(path: Path) -> str:
    return path.name


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, its argument), continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    found = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(words[0], words[1]) for words in found]


def test_there_is_one_for_every_kind_of_device() -> None:
    assert [path.name for path in DOCKERFILES] == ["cpu.Dockerfile", "cuda.Dockerfile", "rocm.Dockerfile"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_what_is_copied_is_in_the_repository(path: Path) -> None:
    sources = [source for kind, rest in instructions(path) if kind == "COPY" for source in rest.split()[:-1]]
    assert {"atom_cluster", "deployments", "configs", "pyproject.toml", "constraints-dev.txt"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_the_context_has_what_is_copied_and_nothing_else(path: Path) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    sources = [source for kind, rest in instructions(path) if kind == "COPY" for source in rest.split()[:-1]]
    assert lines[1] == "*"
    assert {source.partition("/")[0] for source in sources} == kept


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_bases_are_pinned_and_processes_are_not_root(path: Path) -> None:
    found = instructions(path)
    (base,) = [rest for kind, rest in found if kind == "FROM"]
    assert re.search(r":[^:]*\d+\.\d+", base) and "latest" not in base
    assert [rest for kind, rest in found if kind == "USER"][-1] == "1000:1000"


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_python_is_one_that_the_project_supports(path: Path) -> None:
    versions = set(re.findall(r"(?:python|python:|py)(3\.\d+)", path.read_text()))
    assert versions and versions <= {"3.10", "3.11", "3.12", "3.13"}


def test_torch_and_triton_of_the_constraints_go_together() -> None:
    """Builds of torch for CUDA need one version of Triton: 2.11.0 needs 3.6.0, 2.13.0 needs 3.7.1."""
    lines = [line for line in (ROOT / "constraints-dev.txt").read_text().splitlines() if line[:1] != "#"]
    pinned = {(found := Requirement(line)).name: found.specifier for line in lines}
    assert pinned["torch"].contains("2.11.0") and pinned["torch"].contains("2.13.0+cpu")
    assert pinned["triton"].contains("3.6.0") and not pinned["triton"].contains("3.7.1")
    (triton,) = re.findall(r'^cuda = \["(triton.*)"\]$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert Requirement(triton).specifier.contains("3.6.0") and not Requirement(triton).specifier.contains("3.7.1")


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_extras_and_commands_exist(path: Path) -> None:
    project, text = (ROOT / "pyproject.toml").read_text(), path.read_text()
    for extras in re.findall(r"--editable '\.\[([\w,]+)\]'", text):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE)
    for config in re.findall(r"configs/\w+\.yaml", text):
        assert (ROOT / config).exists()
    assert not re.search(r"^(ENV|ARG).*(TOKEN|SECRET|PASSWORD)", text, flags=re.MULTILINE)
