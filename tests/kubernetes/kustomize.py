"""As much of kustomize as the manifests in `kubernetes/` use, so that they can be checked without it.

Resources, images by name, JSON patches, merge patches of maps, generated ConfigMaps. `test_kustomize_agrees` compares
the result with kubectl's where there is one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]

_KEYS = {"apiVersion", "kind", "resources", "images", "patches", "configMapGenerator", "generatorOptions"}


def render(directory: Path) -> list[Document]:
    """What `kubectl kustomize DIRECTORY` prints, in some order."""
    kustomization = yaml.safe_load((directory / "kustomization.yaml").read_text())
    assert set(kustomization) <= _KEYS, "this renderer does not know them all"
    documents: list[Document] = []
    for name in kustomization.get("resources", ()):
        path = directory / name
        documents += render(path) if path.is_dir() else load_all(path)
    for generator in kustomization.get("configMapGenerator", ()):
        documents.append(_config_map(directory, generator))
    for patch in kustomization.get("patches", ()):
        target = patch.get("target", {})
        for document in documents:
            if _is_target(document, target):
                _apply(document, _patch(directory, patch))
    for image in kustomization.get("images", ()):
        for document in documents:
            for container in _containers(document):
                name, _, _ = container["image"].partition(":")
                if name == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    return documents


def load_all(path: Path) -> list[Document]:
    """All documents of a file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def files_of(directory: Path) -> set[Path]:
    """Every file that a kustomization takes, itself included."""
    kustomization = yaml.safe_load((directory / "kustomization.yaml").read_text())
    found = {directory / "kustomization.yaml"}
    for name in kustomization.get("resources", ()):
        path = (directory / name).resolve()
        found |= files_of(path) if path.is_dir() else {path}
    found |= {directory / patch["path"] for patch in kustomization.get("patches", ()) if "path" in patch}
    return {path.resolve() for path in found}


def _config_map(directory: Path, generator: Document) -> Document:
    data = {Path(name).name: (directory / name).read_text() for name in generator["files"]}
    metadata = {"name": generator["name"], "labels": generator.get("options", {}).get("labels", {})}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _is_target(document: Document, target: Document) -> bool:
    return document["kind"] == target["kind"] and document["metadata"]["name"] == target["name"]


def _patch(directory: Path, patch: Document) -> Any:
    return yaml.safe_load((directory / patch["path"]).read_text() if "path" in patch else patch["patch"])


def _apply(document: Document, patch: Any) -> None:
    if isinstance(patch, dict):
        _merge(document, patch)
        return
    for operation in patch:
        *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:])
        found: Any = document
        for part in parents:
            found = found[int(part)] if isinstance(found, list) else found[part]
        key: Any = int(last) if isinstance(found, list) else last
        if operation["op"] != "add":
            assert key in found or isinstance(found, list), f"nothing to {operation['op']} at {operation['path']}"
        if operation["op"] == "remove":
            del found[key]
        else:
            found[key] = copy.deepcopy(operation["value"])


def _merge(document: Document, patch: Document) -> None:
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(document.get(key), dict):
            _merge(document[key], value)
        else:
            assert not isinstance(value, list), "lists are merged by rules that this renderer does not know"
            document[key] = value


def _containers(value: Any) -> Iterator[Document]:
    """Every container, however deep: kustomize finds them in resources of any kind, too."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("containers", "initContainers"):
                yield from inner
            else:
                yield from _containers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _containers(inner)
