"""Stop 4 of 14: chat messages become the prompt text the model was trained on. Next: api/text/tokenizer.py.

Templates come with checkpoints, so they are untrusted code: they run in jinja2's immutable sandbox. What a template can
use (filters, globals, block trimming) is what Hugging Face documents for chat templates, so that one written for
`transformers` renders the same text here. Knows nothing of tokens or HTTP.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from atom_cluster.api.text.model_files import read_json
from atom_cluster.errors import ConfigError, InvalidRequest

RESERVED_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Variables of every template that `chat_template_kwargs` may not replace."""

_ERRORS_OF_TEMPLATES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template that does not fit the messages raises: its own complaint, or a wrong operation on their values."""


_TESTS_CONTENT_FOR_NONE = re.compile(r"content['\"]?\]?\s+is\s+(not\s+)?none", re.IGNORECASE)


class ChatTemplate:
    """A model's compiled template with its special tokens, and perhaps another one for tools. Thread-safe."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str], tool_source: str | None = None) -> None:
        """`tool_source`: the template for requests with tools, where a model has two.

        Raises `ConfigError` when a template does not compile.
        """
        self._template = _compile(source)
        self._tool_template = self._template if tool_source is None else _compile(tool_source)
        self._special_tokens = dict(special_tokens)
        self.source = source if tool_source is None else tool_source
        """What tells how the model writes reasoning and calls: the template for tools, where there are two."""
        self.knows_tools = "tools" in jinja2.meta.find_undeclared_variables(_environment().parse(self.source))
        """Whether the template shows a request's tools to the model."""
        self.distinguishes_none = _TESTS_CONTENT_FOR_NONE.search(self.source) is not None
        """Whether content that is none means something to the template."""

    @classmethod
    def from_directory(
        cls, directory: str | Path, *, special_tokens: Mapping[str, str], file: str | Path | None = None
    ) -> ChatTemplate | None:
        """The template in `file`, or else that of a model directory; None when it has none.

        There, `chat_template.jinja` wins over `chat_template` in `tokenizer_config.json`, and that over the one in
        `chat_template.json`; either is a template or named ones, of which `default` is taken, and `tool_use` for
        requests with tools. Raises `ConfigError`.
        """
        own = Path(directory) / "chat_template.jinja"
        if file is not None or own.is_file():
            return cls(_read(Path(file or own)), special_tokens=special_tokens)
        for name in ("tokenizer_config.json", "chat_template.json"):
            sources = _configured_sources(read_json(Path(directory) / name, default={}), name)
            if "default" in sources:
                return cls(sources["default"], special_tokens=special_tokens, tool_source=sources.get("tool_use"))
        return None

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Prompt text that ends where the assistant's answer begins.

        `tools` are in OpenAI's form. `variables` are the request's `chat_template_kwargs`. Raises `InvalidRequest` when
        the template refuses the messages or the variables.
        """
        variables = variables or {}
        if reserved := sorted(RESERVED_VARIABLES & variables.keys()):
            raise InvalidRequest(f"`{reserved[0]}` cannot be set here", param=f"chat_template_kwargs.{reserved[0]}")
        context = {**self._special_tokens, **variables}
        try:
            return (self._tool_template if tools else self._template).render(
                messages=[_as_templates_know_it(message) for message in messages],
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=True,
                **context,
            )
        except _ERRORS_OF_TEMPLATES as exc:
            raise InvalidRequest(f"the model's chat template refused the messages: {exc}", param="messages") from exc


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"chat template {file}: {exc}") from exc


def _compile(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as exc:
        raise ConfigError(f"chat template, line {exc.lineno}: {exc.message}") from exc


def _configured_sources(config: dict[str, object], file_name: str) -> dict[str, str]:
    """Templates by name; the only one is the default."""
    value = config.get("chat_template")
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    named = value if isinstance(value, dict) else {"default": value}
    found = {name: named[name] for name in ("default", "tool_use") if named.get(name) is not None}
    sources = {name: source for name, source in found.items() if isinstance(source, str)}
    if sources.keys() != found.keys():
        raise ConfigError(f"{file_name}: `chat_template` is neither a template nor a list of named ones")
    return sources


def _as_templates_know_it(message: Mapping[str, object]) -> dict[str, object]:
    """Some families' templates call the reasoning of an earlier turn `thinking`."""
    if "reasoning_content" in message:
        return {"thinking": message["reasoning_content"], **message}
    return dict(message)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_make_dict, namespace=_Namespace
    )
    return environment


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; when serving, its body is output as it is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Replace the block by its body."""
        next(parser.stream)
        body: list[jinja2.nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [jinja2.nodes.Scope(body, lineno=body[0].lineno)] if body else []


class _Namespace(jinja2.utils.Namespace):
    """jinja2's `namespace` without names that reach into Python's own attributes."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} starts with an underscore")
        super().__setitem__(name, value)


def _to_json(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001 - templates may pass these by position
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001
) -> str:
    """Plain JSON: jinja2's own filter escapes `<`, `>` and `&` for HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """`dict(...)` as a function: the class itself would hand templates its attributes."""
    return dict(*args, **kwargs)
