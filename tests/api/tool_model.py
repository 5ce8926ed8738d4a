"""An API over a model that thinks and calls tools, in Hermes' format, and the conversation that its tests have."""

from __future__ import annotations

from pathlib import Path

from atom_cluster.api.text.tokenizer import TokenizerService
from atom_cluster.config.serving import ApiConfig
from tests.api.conftest import Api
from tests.api.tiny_tokenizers import write_model_directory

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call {{ c.id }} {{ c.function.name }} {{ c.function.arguments | tojson }}>"
    "{% endfor %}{% if m.role == 'tool' %}<answers {{ m.tool_call_id }}>{% endif %}<|im_end|>\n{% endfor %}"
    "{% for t in tools or [] %}<tool {{ t.function.name }}>{% endfor %}"
    "{% if enable_thinking is defined %}<thinks {{ enable_thinking }}>{% endif %}"
    "{% if reasoning_effort is defined %}<effort {{ reasoning_effort }}>{% endif %}<|im_start|>assistant\n"
)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALLING = '<think>hm</think>look: <tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


class ToolApi:
    """The app, answering every request with one text; and what its requests were."""

    def __init__(self, directory: Path, text: str) -> None:
        write_model_directory(directory, max_model_len=2048)
        (directory / "chat_template.jinja").write_text(TEMPLATE)
        self.service = TokenizerService.from_directory(directory)
        limits = ApiConfig(tool_parser="hermes", reasoning_parser="think")
        token_ids = self.service.tokenizer.encode(text)
        self.api = Api(
            directory, self.service, lambda request: [*[(token_id,) for token_id in token_ids], "stop"], limits
        )

    def prompt(self) -> str:
        """Of the latest request."""
        token_ids = self.api.generator.requests[-1].token_ids
        return self.service.tokenizer.decode(token_ids, skip_special_tokens=False)
