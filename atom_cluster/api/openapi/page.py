"""The OpenAPI document as one HTML page for people: no scripts, nothing from elsewhere, so that it works anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from atom_cluster.api.openapi.schemas import reference_name

Json = Mapping[str, Any]

CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
code, pre { font: 13px/1.45 ui-monospace, monospace; }
pre { background: #8881; overflow-x: auto; padding: .7rem; }
table { border-collapse: collapse; width: 100%; }
td, th { border-top: 1px solid #8884; padding: .25rem .6rem .25rem 0; text-align: left; vertical-align: top; }
summary { cursor: pointer; padding: .3rem 0; }
.method { display: inline-block; font-weight: 600; min-width: 4rem; }
:root { color-scheme: light dark; }
"""


def html_page(document: Json) -> str:
    """The page."""
    info = document["info"]
    body = [f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>", f"<p>{_text(info['description'])}</p>"]
    body.append('<p>As data: <a href="openapi.json">openapi.json</a></p>')
    for tag in _tags(document):
        body.append(f"<h2>{escape(tag)}</h2>")
        body += [_operation(*entry) for entry in _operations(document) if entry[2]["tags"] == [tag]]
    body.append("<h2>Schemas</h2><p><code>?</code> marks fields that may be left out.</p>")
    body += [_schema(name, schema) for name, schema in sorted(document["components"]["schemas"].items())]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(info["title"])}: API</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>"
    )


def _operations(document: Json) -> list[tuple[str, str, Json]]:
    return [(path, method, entry) for path, item in document["paths"].items() for method, entry in item.items()]


def _tags(document: Json) -> list[str]:
    return list(dict.fromkeys(entry["tags"][0] for _, _, entry in _operations(document)))


def _operation(path: str, method: str, operation: Json) -> str:
    parts = [f"<p>{_text(operation.get('description', ''))}</p>"]
    rows = [(f"{it['name']} ({it['in']})", _kind(it["schema"]), it["description"]) for it in operation["parameters"]]
    parts.append(_table(("Parameter", "Type", ""), rows))
    if "requestBody" in operation:
        parts.append(_content("Request", operation["requestBody"]["content"]))
    parts.append(_content("Answer", operation["responses"]["200"]["content"]))
    errors = [(status, it["description"]) for status, it in operation["responses"].items() if status != "200"]
    parts.append(_table(("Status", ""), errors))
    title = f'<span class="method">{method.upper()}</span> <code>{escape(path)}</code> {_text(operation["summary"])}'
    return f'<details id="{escape(operation["operationId"])}"><summary>{title}</summary>{"".join(parts)}</details>'


def _content(title: str, content: Json) -> str:
    parts = []
    for media_type, entry in content.items():
        kinds = " | ".join(map(_kind, entry.get("x-event-data", [entry["schema"]])))
        parts.append(f"<h4>{title}: <code>{escape(media_type)}</code> {kinds}</h4>")
        for example in entry.get("examples", {}).values():
            value = example["value"]
            text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
            parts.append(f"<p>{_text(example['summary'])}</p><pre>{escape(text)}</pre>")
    return "".join(parts)


def _schema(name: str, schema: Json) -> str:
    required = schema.get("required", ())
    rows = [
        (f"{key}{'' if key in required else ' ?'}", _kind(entry), entry.get("description", ""))
        for key, entry in schema.get("properties", {}).items()
    ]
    text = f"<p>{_text(schema.get('description', ''))}</p>"
    return f'<h3 id="{escape(name)}">{escape(name)}</h3>{text}{_table(("Field", "Type", ""), rows)}'


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """The first column is code, the second of three is markup already, the last is text."""
    if not rows:
        return ""
    lines = ["<tr>" + "".join(f"<th>{escape(it)}</th>" for it in head) + "</tr>"]
    for first, *between, last in rows:
        cells = [f"<code>{escape(first)}</code>", *between, _text(last)]
        lines.append("<tr>" + "".join(f"<td>{it}</td>" for it in cells) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _kind(schema: Json) -> str:
    """A schema in a few words, with links, as markup."""
    if "$ref" in schema:
        name = escape(reference_name(schema["$ref"]))
        return f'<a href="#{name}">{name}</a>'
    cases = schema.get("anyOf") or schema.get("oneOf")
    if cases:
        return " | ".join(map(_kind, cases))
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " | ".join(f"<code>{escape(json.dumps(value, ensure_ascii=False))}</code>" for value in values)
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    kind = schema.get("type", "anything")
    bounds = [f"{sign} {schema[key]}" for key, sign in _BOUNDS.items() if key in schema]
    return escape(" ".join([" or ".join(kind) if isinstance(kind, list) else str(kind), *bounds]))


_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _text(text: str) -> str:
    """Text with its backquoted words as code."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))
