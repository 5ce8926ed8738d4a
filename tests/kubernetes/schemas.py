"""What a manifest is checked against: KubeRay's RayService, kept as data, and the kinds of Kubernetes itself."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

KUBERNETES_VERSION = "1.34"
RAY_SERVICE = Path(__file__).with_name("data") / "rayservice_kuberay_1.7.0.json"
OPERATOR_KINDS = {"PodMonitor", "PrometheusRule"}
"""Kinds of the Prometheus operator, which `tests/monitoring` is about."""


def problems(document: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest: unknown keys too, which a cluster may drop without a word."""
    if document["kind"] == "RayService":
        found = [f"{'.'.join(map(str, error.path))}: {error.message}" for error in _ray_service().iter_errors(document)]
        return found + [problem for template in templates(document) for problem in _kubernetes(_as_document(template))]
    return [] if document["kind"] in OPERATOR_KINDS else _kubernetes(document)


def templates(ray_service: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates of a RayService: the head's, then the workers'."""
    config = ray_service["spec"]["rayClusterConfig"]
    return [config["headGroupSpec"]["template"], *(group["template"] for group in config["workerGroupSpecs"])]


def _as_document(template: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "template"}, "template": template}


def _kubernetes(document: dict[str, Any]) -> list[str]:
    try:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


@cache
def _ray_service() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(_closed(json.loads(RAY_SERVICE.read_text())))


def _closed(schema: Any) -> Any:
    """The schema refusing unknown keys, which Kubernetes prunes, wherever it lists the known ones."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    is_open = closed.get("x-kubernetes-preserve-unknown-fields", False) or "additionalProperties" in closed
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not is_open:
        closed["additionalProperties"] = False
    return closed
