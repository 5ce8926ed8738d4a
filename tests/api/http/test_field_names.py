from __future__ import annotations

import pytest

from atom_cluster.api.http.field_names import fields_named
from atom_cluster.errors import ContextLengthExceeded

NAMES = {"max_tokens": "max_output_tokens", "messages": "input", ".function": ""}


@pytest.mark.parametrize(
    ("param", "message", "named", "worded"),
    [
        ("max_tokens", "`max_tokens` is large", "max_output_tokens", "`max_output_tokens` is large"),
        ("messages[3].role", "`messages[3].role`: no", "input", "`input`: no"),
        ("tools[0].name", "`tools[0].name`: no", "tools[0].name", "`tools[0].name`: no"),
        ("tools[0].function.name", "`tools[0].function.name`: no", "tools[0].name", "`tools[0].name`: no"),
        (None, "messages", None, "messages"),
    ],
)
def test_fields_have_the_client_s_names(param: str | None, message: str, named: str | None, worded: str) -> None:
    with pytest.raises(ContextLengthExceeded) as caught, fields_named(NAMES):
        raise ContextLengthExceeded(message, param=param)
    assert (caught.value.param, str(caught.value)) == (named, worded)
    assert caught.value.code == "context_length_exceeded"


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError), fields_named(NAMES):
        raise KeyError("max_tokens")
