"""Outputs in the form of each family's own chat template, and the pieces that they consist of, however they are cut."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from atom_cluster.api.answers.pieces import Piece, ReasoningPiece, TextPiece, ToolCallArguments, ToolCallBegun, text_of
from atom_cluster.api.parsers.dialect import REASONING_FORMATS, TOOL_FORMATS
from tests.api.parsers.reading import cut, make_parser, pieces_of


@dataclass(frozen=True)
class Golden:
    tools: str | None
    reasoning: str | None
    text: str
    pieces: tuple[Piece, ...]
    opens: bool = False
    """Whether the prompt ends within reasoning."""


def call(index: int, name: str, arguments: str, call_id: str | None = None) -> tuple[Piece, ...]:
    return (ToolCallBegun(index, call_id or f"id-{index}", name), ToolCallArguments(index, arguments))


WEATHER = '{"city": "Paris", "days": 3}'
HM, OK = ReasoningPiece("hm"), TextPiece("Let me look.")

GOLDENS = {
    # Reasoning.
    "reasoning opened by the model": Golden(None, "think", "<think>\nhm\n</think>\n\nLet me look.", (HM, OK)),
    "reasoning behind a line end": Golden(None, "think", "\n<think>hm</think>\nLet me look.", (HM, OK)),
    "reasoning opened by the prompt": Golden(None, "think", "hm\n</think>\n\nLet me look.", (HM, OK), opens=True),
    "an opener that the prompt has, again": Golden(None, "think", "<think>\nhm</think>Let me look.", (HM, OK), True),
    "reasoning that is cut off": Golden(None, "think", "hm  ", (ReasoningPiece("hm  "),), opens=True),
    "empty reasoning": Golden(None, "think", "<think>\n\n</think>\n\nLet me look.", (OK,)),
    "no reasoning": Golden(None, "think", "  Let me look. </think>\n", (TextPiece("  Let me look. </think>\n"),)),
    "an opener in the content": Golden(None, "think", "a <think> b", (TextPiece("a <think> b"),)),
    "indented content": Golden(None, "think", "</think>\n\n  - a\n", (TextPiece("  - a\n"),), opens=True),
    "interleaved reasoning": Golden(
        None,
        "interleaved_think",
        "hm</think>\na\n<think>again</think>\nb",
        (HM, TextPiece("a"), ReasoningPiece("again"), TextPiece("b")),
        opens=True,
    ),
    "Magistral": Golden(None, "mistral", "[THINK]hm[/THINK]Let me look.", (HM, OK)),
    # JSON between marks.
    "Qwen, Hermes": Golden(
        "hermes",
        "think",
        "<think>\nhm\n</think>\n\nLet me look.\n<tool_call>\n"
        f'{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        (HM, OK, *call(0, "get_weather", WEATHER), *call(1, "now", "{}")),
    ),
    "Hermes: marks within strings": Golden(
        "hermes",
        None,
        '<tool_call>{"arguments": {"city": "}</tool_call>\\"{"}, "name": "get_weather"}</tool_call>',
        call(0, "get_weather", '{"city": "}</tool_call>\\"{"}'),
    ),
    "Hermes: arguments within a string": Golden(
        "hermes", None, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', call(0, "f", '{"a": 1}')
    ),
    "Hermes: no arguments, other keys": Golden(
        "hermes", None, '<tool_call>{"type": "x", "id": 3, "name": "f"}</tool_call>', call(0, "f", "{}")
    ),
    "Hermes: a brace is missing": Golden(
        "hermes", None, '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', call(0, "f", '{"a": 1}')
    ),
    "Hermes: a brace too many, and text": Golden(
        "hermes", None, '<tool_call>{"name": "f"}}</tool_call>ok', (*call(0, "f", "{}"), TextPiece("}ok"))
    ),
    "Hermes: not JSON": Golden(
        "hermes", None, "a <tool_call>get()</tool_call> b", (TextPiece("a <tool_call>get()</tool_call> b"),)
    ),
    "Hermes: cut off before the name": Golden("hermes", None, '<tool_call>{"na', (TextPiece('<tool_call>{"na'),)),
    "Hermes: cut off in the arguments": Golden(
        "hermes", None, '<tool_call>{"name": "f", "arguments": {"a": [1', call(0, "f", '{"a": [1')
    ),
    "DeepSeek V3 and R1": Golden(
        "deepseek_v3",
        "think",
        "hm\n</think>\n\nLet me look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
        f"```json\n{WEATHER}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{{}}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        (HM, OK, *call(0, "get_weather", WEATHER), *call(1, "now", "{}")),
        opens=True,
    ),
    "DeepSeek V3, cut off in the fence": Golden(
        "deepseek_v3",
        None,
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{WEATHER}\n``",
        call(0, "get_weather", WEATHER),
    ),
    "DeepSeek V3.1": Golden(
        "deepseek_v31",
        "think",
        f"Let me look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{WEATHER}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        (OK, *call(0, "get_weather", WEATHER), *call(1, "now", "{}")),
    ),
    "Kimi K2, whose calls end reasoning": Golden(
        "kimi_k2",
        "think",
        "hm <|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        f"{WEATHER}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        (
            HM,
            *call(0, "get_weather", WEATHER, "functions.get_weather:0"),
            *call(1, "now", "{}", "functions.now:1"),
        ),
        opens=True,
    ),
    "Kimi K2 without arguments": Golden(
        "kimi_k2",
        None,
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|><|tool_call_end|>"
        "<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|> \n<|tool_call_end|><|tool_calls_section_end|>",
        (*call(0, "now", "{}", "functions.now:0"), *call(1, "now", "{}", "functions.now:1")),
    ),
    "DeepSeek V3.1 without arguments, cut off behind the second name": Golden(
        "deepseek_v31",
        None,
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜><｜tool▁call▁end｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>",
        (*call(0, "now", "{}"), ToolCallBegun(1, "id-1", "f")),
    ),
    "Mistral, a list": Golden(
        "mistral",
        None,
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {WEATHER}}}, {{"name": "now", "arguments": {{}}}}]',
        (*call(0, "get_weather", WEATHER), *call(1, "now", "{}")),
    ),
    "Mistral, names": Golden(
        "mistral",
        None,
        f"Let me look.[TOOL_CALLS]get_weather[ARGS]{WEATHER}[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{{}}",
        (OK, *call(0, "get_weather", WEATHER), *call(1, "now", "{}", "123456789")),
    ),
    # JSON without marks.
    "Llama 3": Golden(
        "llama3_json",
        None,
        f'{{"name": "get_weather", "parameters": {WEATHER}}}; {{"name": "now", "parameters": {{}}}}',
        (*call(0, "get_weather", WEATHER), *call(1, "now", "{}")),
    ),
    "Llama 3 with its tag": Golden(
        "llama3_json", None, '<|python_tag|>{"name": "now", "parameters": {}}', call(0, "now", "{}")
    ),
    "Llama 3: an answer in JSON": Golden(
        "llama3_json", None, '\n{"name": "Ada", "age": 36}', (TextPiece('\n{"name": "Ada", "age": 36}'),)
    ),
    "Llama 3: an answer that has a name and no more": Golden(
        "llama3_json", None, '{"name": "Ada"} it is', (TextPiece('{"name": "Ada"} it is'),)
    ),
    "Llama 3: an answer that is named as a tool is": Golden(
        "llama3_json", None, '{"name": "now", "age": 36}', (TextPiece('{"name": "now", "age": 36}'),)
    ),
    "Llama 3: code behind the tag": Golden(
        "llama3_json", None, "<|python_tag|>print(1)", (TextPiece("<|python_tag|>print(1)"),)
    ),
    "a list of JSON calls, then text": Golden(
        "json",
        None,
        f'[{{"name": "get_weather", "arguments": {WEATHER}}}, {{"name": "now", "arguments": {{}}}}]\nok',
        (*call(0, "get_weather", WEATHER), *call(1, "now", "{}"), TextPiece("ok")),
    ),
    "JSON that is no call": Golden("json", None, '[{"a": 1}]', (TextPiece('[{"a": 1}]'),)),
    "pythonic": Golden(
        "pythonic",
        None,
        "[get_weather(city='P, (a)\\'s', days=3, where={'x': [1, None]}), now()]",
        (*call(0, "get_weather", '{"city": "P, (a)\'s", "days": 3, "where": {"x": [1, null]}}'), *call(1, "now", "{}")),
    ),
    "a list that is no call": Golden("pythonic", None, "[1, 2, 3] and [a()]", (TextPiece("[1, 2, 3] and [a()]"),)),
    # Elements.
    "Qwen3-Coder": Golden(
        "qwen3_coder",
        None,
        'Let me look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\n12\nNew "York"\n\n</parameter>\n'
        "<parameter=days>\n3\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n<parameter=where>\n"
        "{'x': 1.5}\n</parameter>\n<parameter=units>\nnull\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        (
            OK,
            *call(
                0,
                "get_weather",
                '{"city": "12\\nNew \\"York\\"\\n", "days": 3, "exact": true, "where": {"x": 1.5}, "units": null}',
            ),
            *call(1, "now", "{}"),
        ),
    ),
    "Qwen3-Coder: text for a parameter that the tool does not have": Golden(
        "qwen3_coder",
        None,
        "<tool_call>\n<function=now>\n<parameter=why>\n in time\n\n</parameter>\n</function>\n</tool_call>",
        call(0, "now", '{"why": " in time\\n"}'),
    ),
    "Qwen3-Coder without the outer element": Golden(
        "qwen3_coder", None, "<function=now>\n</function>\n</tool_call>", call(0, "now", "{}")
    ),
    "MiMo: values on the line": Golden(
        "qwen3_coder",
        "think",
        "<think>hm</think><tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n"
        "<parameter=days>3</parameter>\n</function>\n</tool_call>",
        (HM, *call(0, "get_weather", WEATHER)),
    ),
    "Qwen3-Coder: not an element": Golden(
        "qwen3_coder",
        None,
        "<tool_call>\n<function=now>\noops</function>\n</tool_call>",
        (*call(0, "now", "{}"), TextPiece("oops</function>\n</tool_call>")),
    ),
    "Qwen3-Coder: cut off in a name": Golden(
        "qwen3_coder",
        None,
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<param",
        call(0, "get_weather", '{"city": "Paris"'),
    ),
    "MiniMax M2": Golden(
        "minimax_m2",
        "interleaved_think",
        'hm\n</think>\n\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        (HM, *call(0, "get_weather", WEATHER), *call(1, "now", "{}")),
        opens=True,
    ),
    "DeepSeek V3.2": Golden(
        "deepseek_v32",
        "think",
        'hm</think>Let me look.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
        (HM, OK, *call(0, "get_weather", WEATHER), *call(1, "now", "{}")),
        opens=True,
    ),
    "DeepSeek V4, whose calls end reasoning": Golden(
        "deepseek_v4",
        "think",
        'hm\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="days" string="true">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>',
        (HM, *call(0, "get_weather", '{"days": "3"}')),
        opens=True,
    ),
    "GLM-4.5": Golden(
        "glm",
        "think",
        "\n<think>hm</think>\nLet me look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris"
        "</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        (HM, OK, *call(0, "get_weather", WEATHER), *call(1, "now", "{}")),
    ),
    "GLM-4.7 and 5": Golden(
        "glm",
        "think",
        "hm</think><tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value><arg_key>days</arg_key>"
        "<arg_value>3</arg_value></tool_call><tool_call>now</tool_call>",
        (HM, *call(0, "get_weather", WEATHER), *call(1, "now", "{}")),
        opens=True,
    ),
    "GLM: a value is missing": Golden(
        "glm",
        None,
        "<tool_call>now<arg_key>a</arg_key>1</tool_call>",
        (*call(0, "now", "{}"), TextPiece("<arg_key>a</arg_key>1</tool_call>")),
    ),
    # gpt-oss.
    "gpt-oss": Golden(
        "harmony",
        "harmony",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>Let me look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        f"{WEATHER}<|call|>",
        (HM, OK, *call(0, "get_weather", WEATHER)),
    ),
    "gpt-oss: the recipient first, cut before its end": Golden(
        "harmony", "harmony", " to=functions.now<|channel|>commentary json<|message|>{}", call(0, "now", "{}")
    ),
    "gpt-oss: an answer": Golden(
        "harmony",
        "harmony",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Let me look.<|return|>",
        (HM, OK),
    ),
    "gpt-oss: two thoughts, and two messages for the user": Golden(
        "harmony",
        "harmony",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>analysis<|message|>Well.\n<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>Let me look.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>\nIt rains.<|return|>",
        (ReasoningPiece("hm\nWell."), TextPiece("Let me look.\nIt rains.")),
    ),
    "gpt-oss: two calls, one without arguments": Golden(
        "harmony",
        "harmony",
        "<|channel|>commentary to=functions.now <|message|><|call|><|start|>assistant<|channel|>commentary "
        f"to=functions.get_weather <|constrain|>json<|message|>{WEATHER}<|call|>",
        (*call(0, "now", "{}"), *call(1, "get_weather", WEATHER)),
    ),
    "gpt-oss: without the form": Golden("harmony", "harmony", "assistant is here", (TextPiece("assistant is here"),)),
    "gpt-oss: a call that nobody asked for": Golden(
        None,
        "harmony",
        "<|channel|>commentary to=functions.now <|message|>{}<|call|>",
        (TextPiece("{}"),),
    ),
}


def read(golden: Golden, chunks: list[str]) -> list[Piece]:
    parser = make_parser(
        TOOL_FORMATS[golden.tools] if golden.tools else None,
        REASONING_FORMATS[golden.reasoning] if golden.reasoning else None,
        opens=golden.opens,
    )
    return pieces_of(parser, chunks)


@pytest.mark.parametrize("name", GOLDENS)
def test_an_output_of_a_family_has_these_pieces(name: str) -> None:
    golden = GOLDENS[name]
    assert read(golden, [golden.text]) == list(golden.pieces)


@pytest.mark.parametrize("name", GOLDENS)
def test_it_makes_no_difference_where_an_output_is_cut(name: str) -> None:
    """In two at each place, and in single characters."""
    golden = GOLDENS[name]
    text = golden.text
    assert read(golden, list(text)) == list(golden.pieces)
    for place in range(1, len(text)):
        assert read(golden, [text[:place], text[place:]]) == list(golden.pieces), place


def test_every_format_has_a_golden() -> None:
    assert {golden.tools for golden in GOLDENS.values()} >= TOOL_FORMATS.keys()
    assert {golden.reasoning for golden in GOLDENS.values()} >= REASONING_FORMATS.keys()


def fragments(tools: str) -> list[str]:
    """What outputs of a format consist of, and what can go wrong in it."""
    marks = [*TOOL_FORMATS[tools].all_marks, *TOOL_FORMATS[tools].bare_starts]
    own = [
        "<function=now>", "</function>", "<parameter=city>", "</parameter>", '<invoke name="now">', "</invoke>",
        '<parameter name="city">', '<｜DSML｜invoke name="now">', "</｜DSML｜invoke>", "</｜DSML｜parameter>",
        '<｜DSML｜parameter name="city" string="true">', "</｜DSML｜tool_calls>", "to=functions.now", "analysis",
        '{"name": "now", "arguments": {"city": "x"}}', '{"name": "now"', '"arguments": ', "now(city=", "now",
    ]  # fmt: skip
    return [
        *marks,
        *own,
        "<think>",
        "</think>",
        "{",
        "}",
        "[",
        "]",
        '"',
        "\\",
        ",",
        ":",
        "=",
        "(",
        ")",
        " ",
        "\n",
        "é",
        "<",
    ]


@pytest.mark.parametrize("tools", TOOL_FORMATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_a_model_writes_is_read_and_nothing_is_lost(tools: str, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(fragments(tools)), max_size=12)))
    places = data.draw(st.lists(st.integers(0, 200), max_size=6))
    reasoning = "harmony" if tools == "harmony" else data.draw(st.sampled_from(["think", "interleaved_think"]))
    golden = Golden(tools, reasoning, text, (), opens=data.draw(st.booleans()))
    whole = read(golden, [text])
    assert read(golden, cut(text, places)) == whole
    is_plain = tools != "harmony" and not golden.opens and "think>" not in text
    if is_plain and all(isinstance(piece, TextPiece) for piece in whole):
        assert text_of(whole) == text


def test_an_output_is_complete_behind_the_only_call_that_is_wanted() -> None:
    text = '<tool_call>{"name": "now"}</tool_call>'
    parser = make_parser(TOOL_FORMATS["hermes"], one_call=True)
    pieces = [piece for char in text + text + "more" for piece in parser.feed(char)]
    assert parser.is_complete
    assert [*pieces, *parser.finish()] == list(call(0, "now", "{}"))


def test_whether_the_text_is_within_reasoning_is_known_at_each_place() -> None:
    parser = make_parser(reasoning=REASONING_FORMATS["think"])
    states = []
    for chunk in ("\n", "<think>", "hm", "</thi", "nk>", "ok"):
        parser.feed(chunk)
        states.append(parser.in_reasoning)
    assert states == [False, True, True, True, False, False]
    assert make_parser(reasoning=REASONING_FORMATS["think"], opens=True).in_reasoning


@pytest.mark.parametrize(
    ("tools", "text", "arguments"),
    [
        ("pythonic", '[get_weather(city="\\ud800")]', '{"city": "\\ud800"}'),
        ("pythonic", "[get_weather(city='\\ud800')]", '{"city": "\\ud800"}'),
        (
            "glm",
            "<tool_call>now<arg_key>x</arg_key><arg_value>['\\ud800']</arg_value></tool_call>",
            '{"x": ["\\ud800"]}',
        ),
        (
            "hermes",
            '<tool_call>{"name": "now", "arguments": "\\ud800x\\ud83d\\ude00"}</tool_call>',
            "\ufffdx\U0001f600",
        ),
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>', "{}"),
    ],
)
def test_half_a_surrogate_pair_is_written_as_something_that_can_be_sent(tools: str, text: str, arguments: str) -> None:
    begun, *rest = pieces_of(make_parser(TOOL_FORMATS[tools]), [text])
    assert isinstance(begun, ToolCallBegun) and begun.name.encode()
    written = "".join(piece.text for piece in rest if isinstance(piece, ToolCallArguments))
    assert written == arguments and written.encode()
