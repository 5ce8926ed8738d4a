"""gpt-oss: an answer is a sequence of messages, each with a channel and perhaps a recipient. Not nested in anything.

`<|channel|>analysis<|message|>...<|end|>` is reasoning, `final` the answer, `commentary` what the user may read between
calls; a message `to=functions.NAME` is a call of that tool. The prompt ends with `<|start|>assistant`.
"""

from __future__ import annotations

import re

from atom_cluster.api.parsers.answer import ReasoningFormat
from atom_cluster.api.parsers.calls import CallContext, NotACallError, ToolFormat
from atom_cluster.api.parsers.reader import Script

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>", _START)
_MARKS = (_CHANNEL, _MESSAGE, *_ENDS, "<|constrain|>")

_HEADER_STARTS = (_CHANNEL, _START, "assistant", " to=", "to=", _MESSAGE)
_CALLED = re.compile(r"to=functions\.([\w.\-]{1,256})")
_CHANNEL_NAME = re.compile(re.escape(_CHANNEL) + r"\s*(\w+)")


def read_harmony(context: CallContext, *, has_tools: bool, has_reasoning: bool = True) -> Script[None]:
    """The whole output. Without `has_tools` a call is content, as nobody asked for one; without `has_reasoning`
    reasoning is content."""
    reader, out = context.reader, context.out
    while (yield from reader.peek()):
        reader.record()
        mark = yield from reader.accept(*_HEADER_STARTS)
        if mark is None:
            # A model that forgets the form altogether still answers.
            yield from reader.until(_ENDS, out.text)
            continue
        header = mark
        if mark != _MESSAGE:
            rest, end = yield from reader.take_until(_MESSAGE)
            if end is None:
                if reader.is_exhausted and _looks_cut_off(header + rest):
                    return
                out.text(reader.recorded())
                return
            header += rest
        yield from _read_message(context, header, has_tools=has_tools, has_reasoning=has_reasoning)


def _looks_cut_off(header: str) -> bool:
    """Whether a header that never ended is one: it has nothing of the answer in it."""
    return header.startswith((_CHANNEL, _START)) and "\n" not in header


def _read_message(context: CallContext, header: str, *, has_tools: bool, has_reasoning: bool) -> Script[None]:
    reader, out = context.reader, context.out
    called = _CALLED.search(header)
    channel = _CHANNEL_NAME.search(header)
    if called and has_tools:
        context.begin(called.group(1))
        if (yield from reader.until(_ENDS, out.arguments)) is not None:
            context.end()
    elif has_reasoning and channel and channel.group(1) == "analysis":
        out.begin_reasoning()
        if (yield from reader.until(_ENDS, out.reasoning)) is not None:
            out.end_reasoning()
    else:
        out.end_reasoning()
        yield from reader.until(_ENDS, out.text)


def _refuse(context: CallContext, opener: str) -> Script[None]:
    raise NotACallError  # `read_harmony` reads calls itself
    yield


CALLS = ToolFormat(name="harmony", read=_refuse, marks=_MARKS)
REASONING = ReasoningFormat(name="harmony", opener=_CHANNEL + "analysis" + _MESSAGE, closer="<|end|>", marks=_MARKS)
