"""What must hold of the repository as a whole: its documents, configurations and files agree with each other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from atom_cluster.config.base import FrozenConfig
from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.load import load_file
from atom_cluster.config.serve_file import ServeFile
from atom_cluster.models.registry import ARCHITECTURES
from atom_cluster.tools.config_docs import config_classes

ROOT = Path(__file__).resolve().parent.parent
TOP_DIRECTORIES = "atom_cluster|benchmarks|configs|deployments|docs|kubernetes|scripts|tests"
MAX_LINES = 500
MAX_MODEL_LINES = 300
NUM_STOPS = 14

LIBRARY = sorted((ROOT / "atom_cluster").rglob("*.py"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def all_config_classes(root: type[FrozenConfig]) -> Iterator[type[FrozenConfig]]:
    yield root
    for field in root.model_fields.values():
        for inner in config_classes(field.annotation):
            yield from all_config_classes(inner)


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_shipped_configuration_loads_and_names_an_existing_recipe(path: Path) -> None:
    for application in load_file(path).applications:
        module, _, function = application.import_path.partition(":")
        assert function in definitions(ROOT / (module.replace(".", "/") + ".py"))


def test_every_configuration_field_says_what_it_means() -> None:
    silent = {
        f"{config.__name__}.{name}"
        for config in all_config_classes(ServeFile)
        for name, field in config.model_fields.items()
        if not field.description
    }
    assert not silent


def test_every_configuration_class_is_reached_from_the_root() -> None:
    assert {"SchedulerConfig", "SimulationConfig"} <= {config.__name__ for config in all_config_classes(ClusterConfig)}


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_library_files_stay_readable_in_one_sitting(path: Path) -> None:
    limit = MAX_MODEL_LINES if "models" in path.parts else MAX_LINES
    assert len(path.read_text().splitlines()) <= limit


def test_every_architecture_that_can_be_served_is_described() -> None:
    described = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "models.md").read_text()))
    assert set(ARCHITECTURES) <= described


def test_the_run_for_a_ray_cluster_collects_all_tests_that_need_one() -> None:
    (command,) = re.findall(r"^python -m pytest -m ray (.+)$", (ROOT / "scripts" / "test").read_text(), re.MULTILINE)
    marked = [path for path in (ROOT / "tests").rglob("*.py") if re.search(r"\bmark\.ray\b", path.read_text())]
    assert {name_of(path.parent) for path in marked} == set(command.split())


def test_only_config_env_reads_environment_variables() -> None:
    readers = {name_of(path) for path in LIBRARY if re.search(r"\bos\.(environ|getenv)\b", path.read_text())}
    assert readers == {"atom_cluster/config/env.py"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_paths_named_in_documents_exist(path: Path) -> None:
    """Backticked words such as `docs/glossary.md` or `tests/**/test_env.py`; <angle brackets> mark placeholders."""
    words = re.findall(r"`([^`\s]+)`", path.read_text())
    named = [word for word in words if re.match(rf"\.?({TOP_DIRECTORIES})/", word) and "<" not in word]
    assert [word for word in named if not any(ROOT.glob(word))] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


def definitions(path: Path) -> set[str]:
    """Names that a file defines: functions and classes, methods as `Class.method` too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            inner = (item for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)))
            found |= {f"{node.name}.{item.name}" for item in inner}
    return found


def stops() -> dict[int, tuple[list[str], list[str]]]:
    """Rows `| 7 | files | names | ...` of the walk: stop -> (files, functions and classes in them)."""
    text = (ROOT / "docs" / "life_of_a_request.md").read_text()
    rows = re.findall(r"^\| *(\d+) *\|([^|]*)\|([^|]*)\|", text, flags=re.MULTILINE)
    return {
        int(stop): (re.findall(r"`([^`]+)`", files), re.findall(r"`([^`]+)`", names)) for stop, files, names in rows
    }


def test_the_walk_has_all_stops_and_its_files_define_what_it_names() -> None:
    walk = stops()
    assert sorted(walk) == list(range(1, NUM_STOPS + 1))
    for stop, (files, names) in walk.items():
        assert files, f"stop {stop} names no file"
        assert names, f"stop {stop} names no function or class"
        defined = set().union(*(definitions(ROOT / file) for file in files))
        assert set(names) <= defined, f"stop {stop}"


@pytest.mark.parametrize("name", ["reliability.md", "protection.md"])
def test_tests_that_show_what_is_promised_exist(name: str) -> None:
    rows = re.findall(r"^\|.*`tests/.*`.*\|$", (ROOT / "docs" / name).read_text(), flags=re.MULTILINE)
    assert len(rows) > 10
    for row in rows:
        defined = set().union(*(definitions(ROOT / file) for file in re.findall(r"`(tests/[^`]+)`", row)))
        named = set(re.findall(r"`(test_[^`]+)`", row))
        assert named and named <= defined, row


def test_each_stop_of_the_walk_says_so_in_its_first_line() -> None:
    for stop, (files, _) in stops().items():
        docstring = ast.get_docstring(ast.parse((ROOT / files[0]).read_text())) or ""
        assert docstring.startswith(f"Stop {stop} of {NUM_STOPS}"), files[0]
