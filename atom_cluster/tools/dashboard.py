"""Writes the Grafana dashboard, as `scripts/gen-dashboard` does: `python -m atom_cluster.tools.dashboard > FILE`.

What is on it is said in `dashboard_panels.py`. Knows no metric but those that its variables list values of.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from atom_cluster.observability.metrics import HTTP_REQUESTS, PROCESS_RESIDENT
from atom_cluster.tools.dashboard_panels import Panel, rows

COLUMNS = 24
HEIGHT = 7
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> dict[str, Any]:
    """The whole of it, as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, members in rows().items():
        panels.append(
            {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": _place(0, top, COLUMNS, 1)}
        )
        top += 1
        left = bottom = 0
        for panel in members:
            height = 4 if panel.kind == "stat" else HEIGHT
            if left + panel.width > COLUMNS:
                top, left, bottom = top + bottom, 0, 0
            panels.append(_panel(panel, _place(left, top, panel.width, height)))
            left, bottom = left + panel.width, max(bottom, height)
        top += bottom
    for number, entry in enumerate(panels, 1):
        entry["id"] = number
    return {
        "title": "atom_cluster",
        "uid": "atom-cluster",
        "tags": ["llm", "ray", "atom_cluster"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _place(left: int, top: int, width: int, height: int) -> dict[str, int]:
    return {"x": left, "y": top, "w": width, "h": height}


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "noValue": "none" if panel.is_quiet else "no data"}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.is_stacked else "none", "group": "A"}
        defaults["custom"] = {"fillOpacity": 20 if panel.is_stacked else 5, "stacking": stacking, "showPoints": "never"}
        options: dict[str, Any] = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    else:
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area", "colorMode": "value"}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": query.expr, "legendFormat": query.legend}
            for index, query in enumerate(panel.queries)
        ],
    }


def _variables() -> list[dict[str, Any]]:
    def choice(name: str, label: str, query: str) -> dict[str, Any]:
        return {
            "name": name,
            "label": label,
            "type": "query",
            "datasource": _SOURCE,
            "query": {"query": query, "refId": name},
            "definition": query,
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"]},
        }

    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    processes, routes = PROCESS_RESIDENT.name, HTTP_REQUESTS.name
    return [
        source,
        choice("role", "Role", f"label_values({processes}, role)"),
        choice("replica", "Replica", f'label_values({processes}{{role=~"$role"}}, replica)'),
        choice("route", "Route", f"label_values({routes}, route)"),
    ]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dashboard(), indent=1) + "\n")
