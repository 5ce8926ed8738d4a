"""Texts of a given number of tokens. The tokenizer is the server's; without one, prompts are token ids."""

from __future__ import annotations

import numpy as np

from atom_cluster.api.text.chat_template import ChatTemplate
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.config.model_path import resolve_model_path
from atom_cluster.errors import ConfigError

_MAX_TRIES = 10


class PromptText:
    """Makes prompts as text with a model's tokenizer."""

    def __init__(self, tokenizer: Tokenizer, *, template: ChatTemplate | None = None) -> None:
        """template: put around every prompt; None: prompts are sent as they are."""
        self.tokenizer = tokenizer
        self._template = template
        self.num_template_tokens = 0
        """Tokens that the template adds to a prompt."""
        if template is not None:
            self.num_template_tokens = max(0, self.count(self.wrap("a")) - 1)

    @classmethod
    def load(cls, model: str, *, use_chat_template: bool) -> PromptText:
        """From a directory, demo:NAME, or a hub id: its weights are not fetched. Raises ValueError naming the flag."""
        try:
            directory = resolve_model_path(model, with_weights=False)
            tokenizer = Tokenizer.from_directory(directory)
        except ConfigError as exc:
            raise ValueError(f"--tokenizer: {exc}") from exc
        if not use_chat_template:
            return cls(tokenizer)
        template = ChatTemplate.from_directory(directory, special_tokens=tokenizer.special_tokens)
        if template is None:
            raise ValueError(f"--use-chat-template: {model} has no chat template")
        return cls(tokenizer, template=template)

    def count(self, text: str) -> int:
        """Tokens of a text, without those that the model puts around it."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def wrap(self, text: str) -> str:
        """A user's message as the template has it; the text itself without one."""
        return text if self._template is None else self._template.render([{"role": "user", "content": text}])

    def of_length(self, token_ids: list[int], rng: np.random.Generator) -> str:
        """A text that begins like these tokens' and has as many.

        Text of tokens drawn at random has other tokens than those when it is read again, so it is cut or filled up
        until the number is right. After ten tries it is taken as it is; the server's usage has the true number.
        """
        wanted = len(token_ids)
        text = self.tokenizer.decode(token_ids)
        for _ in range(_MAX_TRIES):
            found = self.tokenizer.encode(text, add_special_tokens=False)
            if len(found) == wanted:
                break
            missing = wanted - len(found)
            more = rng.integers(0, self.tokenizer.vocab_size, size=max(0, missing)).tolist()
            text = self.tokenizer.decode(found[:wanted] + more)
        return text
