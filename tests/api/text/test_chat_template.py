"""Chat templates render what `transformers` renders, refuse what they should, and stay in their sandbox."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atom_cluster.api.text.chat_template import ChatTemplate
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.errors import ConfigError, InvalidRequest
from atom_cluster.tools.demo_model import demo_model_dir
from tests.api.tiny_tokenizers import TEMPLATE, byte_level

CONVERSATION = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "Grüße 😀\n\n"},
    {"role": "assistant", "content": " hello "},
    {"role": "user", "content": "{{ messages }}"},
]

TEMPLATES = {
    "chatml": TEMPLATE,
    "block trimming": "  {% for m in messages %}\n    {{ m.role }}: {{ m.content | trim }}\n  {% endfor %}\nend",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}"
    "{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=True) }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "generation block": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    "{{ dict(a=1).items() | list }}",
    "undefined": "{{ bos_token }}|{{ eos_token }}|{{ nothing }}|{{ tools is none }}|{{ documents is none }}",
    "macro": "{% macro turn(m) %}[{{ m['role'] | upper }}] {{ m['content'] }}{% endmacro %}"
    "{%- for m in messages[1:] -%}{{ turn(m) }}{%- endfor -%}{{ add_generation_prompt }}",
    "variables": "{{ 'think' if enable_thinking is defined and enable_thinking else 'plain' }}{{ messages | length }}",
}


def rendered_by_transformers(template: str, **variables: object) -> str:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<|im_start|>", eos_token="<|im_end|>")
    text = reference.apply_chat_template(
        CONVERSATION, chat_template=template, tokenize=False, add_generation_prompt=True, **variables
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": True}], ids=["plain", "with_variables"])
def test_templates_render_as_in_transformers(name: str, variables: dict[str, object]) -> None:
    special_tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    template = ChatTemplate(TEMPLATES[name], special_tokens=special_tokens)
    expected = rendered_by_transformers(TEMPLATES[name], **variables)
    assert template.render(CONVERSATION, variables=variables) == expected


@pytest.mark.demo_model
def test_the_demo_model_sees_the_tokens_transformers_makes() -> None:
    directory = demo_model_dir()
    if not (directory / "tokenizer.json").is_file():
        pytest.skip("the demo model is not here; `atom-cluster get-demo-model` fetches it")
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_directory(directory)
    template = ChatTemplate.from_directory(directory, special_tokens=tokenizer.special_tokens)
    assert template is not None
    reference = AutoTokenizer.from_pretrained(str(directory))
    for messages in (CONVERSATION, CONVERSATION[1:]):
        text = template.render(messages)
        assert text == reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=False) == ids


def test_date_of_today_is_available() -> None:
    text = ChatTemplate("{{ strftime_now('%Y') }}", special_tokens={}).render([])
    assert text.isdecimal() and len(text) == 4


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content.missing.deeper }}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_a_template_raises_is_the_request_s_fault(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(source, special_tokens={}).render(CONVERSATION)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ dict.__subclasses__() }}",
        "{% set ns = namespace(_x=1) %}{{ ns._x }}",
    ],
)
def test_templates_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequest):
        print(ChatTemplate(source, special_tokens={}).render(CONVERSATION))


def test_variables_cannot_replace_the_messages() -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(TEMPLATE, special_tokens={}).render(CONVERSATION, variables={"messages": []})
    assert caught.value.param == "chat_template_kwargs.messages"


def test_a_template_that_does_not_compile_is_a_start_up_error() -> None:
    with pytest.raises(ConfigError, match="line 1"):
        ChatTemplate("{% for %}", special_tokens={})


def test_template_is_found_in_a_file_then_in_the_tokenizer_s_config(tmp_path: Path) -> None:
    def found() -> str | None:
        template = ChatTemplate.from_directory(tmp_path, special_tokens={})
        return None if template is None else template.render([])

    config = tmp_path / "tokenizer_config.json"
    assert found() is None
    config.write_text(json.dumps({"chat_template": "one"}))
    assert found() == "one"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert found() == "named"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert found() == "file"
    (tmp_path / "chat_template.jinja").unlink()
    config.write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(ConfigError, match="chat_template"):
        found()


def test_a_file_may_take_the_place_of_the_model_s_own_template(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("own")
    (tmp_path / "other.jinja").write_text("other")
    template = ChatTemplate.from_directory(tmp_path, special_tokens={}, file=tmp_path / "other.jinja")
    assert template is not None and template.render([]) == "other"
    with pytest.raises(ConfigError, match="none.jinja"):
        ChatTemplate.from_directory(tmp_path, special_tokens={}, file=tmp_path / "none.jinja")
