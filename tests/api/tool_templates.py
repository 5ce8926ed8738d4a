"""How families' chat templates show tools, earlier calls and their results: cut down to what makes each one special."""

from __future__ import annotations

_CHATML_TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}"
)
_CHATML_TURNS = """
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant\\n' + message.content }}
        {%- for tool_call in message.tool_calls %}
            {%- set call = tool_call.function %}
            CALL
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def _chatml(hint: str, call: str) -> str:
    return _CHATML_TOOLS + "{{- '" + hint + "<|im_end|>\\n' }}{%- endif %}" + _CHATML_TURNS.replace("CALL", call)


QWEN3 = _chatml(
    "within <tool_call></tool_call>",
    """{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- (call.arguments if call.arguments is string else call.arguments | tojson) + '}\\n</tool_call>' }}""",
)
QWEN3_CODER = _chatml(
    "<tool_call>\\n<function=example>\\n<parameter=one>\\nvalue\\n</parameter>\\n</function>\\n</tool_call>",
    """{{- '<tool_call>\\n<function=' + call.name + '>\\n' }}
            {%- for name, value in call.arguments | items %}
                {{- '<parameter=' + name + '>\\n' }}
                {{- (value if value is string else value | tojson) + '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}""",
)
DEEPSEEK_V3 = """
{%- if tools %}{{- tools | tojson }}{% endif %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- '<｜User｜>' + message['content'] }}{% endif %}
    {%- if message['role'] == 'tool' %}
        {{- '<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}
    {%- endif %}
    {%- if message['role'] == 'assistant' and message['content'] is none %}
        {{- '<｜Assistant｜><｜tool▁calls▁begin｜>' }}
        {%- for tool in message['tool_calls'] %}
            {{- '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] }}
            {{- '\\n```json\\n' }}
            {{- tool['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' }}
        {%- endfor %}
        {{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<｜Assistant｜>' + message['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor %}
{{- '<｜Assistant｜><think>\\n' }}
"""
DEEPSEEK_V31 = """
{%- if tools %}{{- tools | tojson }}{% endif %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- '<｜User｜>' + message['content'] }}{% endif %}
    {%- if message['role'] == 'assistant' and message['tool_calls'] %}
        {{- '<｜Assistant｜></think>' + (message['content'] or '') + '<｜tool▁calls▁begin｜>' }}
        {%- for tool in message['tool_calls'] %}
            {{- '<｜tool▁call▁begin｜>' + tool['function']['name'] + '<｜tool▁sep｜>' }}
            {{- tool['function']['arguments'] | tojson }}{{- '<｜tool▁call▁end｜>' }}
        {%- endfor %}
        {{- '<｜tool▁calls▁end｜>' }}
    {%- endif %}
{%- endfor %}
{{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}
"""
GLM = """[gMASK]<sop>
{%- if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<arg_key>{key}</arg_key>{% endif -%}
{%- for m in messages -%}
    {%- if m.role == 'user' %}<|user|>{{ m.content }}{% endif -%}
    {%- if m.role == 'assistant' -%}
        <|assistant|></think>{{ m.content }}
        {%- for tc in m.tool_calls -%}
            {{ '<tool_call>' + tc.function.name }}
            {%- for k, v in tc.function.arguments.items() -%}
                <arg_key>{{ k }}</arg_key><arg_value>{{ v if v is string else v | tojson }}</arg_value>
            {%- endfor -%}
            </tool_call>
        {%- endfor -%}
    {%- endif -%}
    {%- if m.role == 'tool' %}<|observation|><tool_response>{{ m.content }}</tool_response>{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|assistant|>{{- '</think>' if (enable_thinking is defined and not enable_thinking) else '<think>' -}}
{%- endif -%}
"""
KIMI_K2 = """
{%- if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        <|im_system|>tool<|im_middle|>## Return of {{ message.tool_call_id }}\n{{ message.content }}<|im_end|>
    {%- else -%}
        <|im_{{ message.role }}|>{{ message.role }}<|im_middle|>{{ message.content }}
        {%- if message.tool_calls -%}
            <|tool_calls_section_begin|>
            {%- for call in message.tool_calls -%}
                <|tool_call_begin|>{{ call['id'] }}<|tool_call_argument_begin|>
                {%- if call['function']['arguments'] is string -%}{{ call['function']['arguments'] }}
                {%- else -%}{{ call['function']['arguments'] | tojson }}{%- endif -%}
                <|tool_call_end|>
            {%- endfor -%}
            <|tool_calls_section_end|>
        {%- endif -%}<|im_end|>
    {%- endif -%}
{%- endfor -%}
<|im_assistant|>assistant<|im_middle|>
"""
MINIMAX_M2 = """
{%- if tools %}{{ ']~!b[]~b]system\\n<tools>' ~ (tools | tojson) ~ '</tools>\\n<minimax:tool_call>' }}{% endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{{ ']~b]user\\n' ~ message.content ~ '[e~[\\n' }}{%- endif -%}
    {%- if message.role == 'assistant' -%}
        {{ ']~b]ai\\n' ~ message.content }}
        {%- if message.tool_calls -%}
            {{ '\\n<minimax:tool_call>\\n' }}
            {%- for tool_call in message.tool_calls -%}
                {{ '<invoke name="' + tool_call.function.name + '">\\n' }}
                {%- for k, v in tool_call.function.arguments.items() -%}
                    {{ '<parameter name="' + k + '">' }}{{ v if v is string else v | tojson }}{{ '</parameter>\\n' }}
                {%- endfor -%}
                {{ '</invoke>\\n' }}
            {%- endfor -%}
            {{ '</minimax:tool_call>' }}
        {%- endif -%}
        {{ '[e~[\\n' }}
    {%- endif -%}
    {%- if message.role == 'tool' -%}{{ ']~b]tool\\n<response>' ~ message.content ~ '</response>[e~[\\n' }}{%- endif -%}
{%- endfor -%}
{{ ']~b]ai\\n<think>\\n' }}{# </think> #}
"""
GPT_OSS = """
{%- if tools %}
    {{- "<|start|>developer<|message|># Tools\\n\\n## functions\\n" + (tools | tojson) + "<|end|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- "<|start|>user<|message|>" + message.content + "<|end|>" }}{% endif %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- "<|start|>assistant to=functions." + tool_call.name + "<|channel|>commentary json<|message|>" }}
        {{- tool_call.arguments | tojson + "<|call|>" }}
    {%- endif %}
    {%- if message.role == 'tool' %}
        {{- "<|start|>functions.x to=assistant<|channel|>commentary<|message|>" }}
        {{- message.content | tojson + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{{- "<|start|>assistant" }}{# analysis #}
"""
LLAMA3 = """
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + message.content + "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
        {%- if tools and loop.first %}
            {{- 'Respond in the format {"name": function name, ' }}
            {{- '"parameters": dictionary of argument name and its value}.' }}
            {%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}
        {%- endif %}
        {{- message.content + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
"""
MISTRAL = """
{%- if tools %}{{- "[AVAILABLE_TOOLS]" + (tools | tojson) + "[/AVAILABLE_TOOLS]" }}{% endif %}
{%- for message in messages %}
    {%- if message["role"] == "user" %}{{- "[INST]" + message["content"] + "[/INST]" }}{% endif %}
    {%- if message.tool_calls %}
        {{- "[TOOL_CALLS][" }}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.id | length != 9 %}{{- raise_exception("Tool call IDs have 9 characters") }}{% endif %}
            {{- (tool_call.function | tojson)[:-1] + ', "id": "' + tool_call.id + '"}' }}
            {{- ", " if not loop.last else "]" }}
        {%- endfor %}
    {%- endif %}
    {%- if message["role"] == "tool" %}{{- "[TOOL_RESULTS]" + message.content + "[/TOOL_RESULTS]" }}{% endif %}
{%- endfor %}
"""

TEMPLATES = {
    "hermes": QWEN3,
    "qwen3_coder": QWEN3_CODER,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v31": DEEPSEEK_V31,
    "glm": GLM,
    "kimi_k2": KIMI_K2,
    "minimax_m2": MINIMAX_M2,
    "harmony": GPT_OSS,
    "llama3_json": LLAMA3,
    "mistral": MISTRAL,
}
"""By the format of calls that they show. DeepSeek's V3.2 and V4 have no template: their prompts are made by code."""
REASONING = {
    "hermes": "think",
    "qwen3_coder": "think",
    "deepseek_v3": "think",
    "deepseek_v31": "think",
    "glm": "think",
    "minimax_m2": "interleaved_think",
    "harmony": "harmony",
}
ANSWER_BEGINS = {
    "hermes": "<|im_start|>assistant\n",
    "qwen3_coder": "<|im_start|>assistant\n",
    "deepseek_v3": "<｜Assistant｜>",
    "deepseek_v31": "<｜Assistant｜></think>",
    "glm": "<|assistant|></think>",
    "kimi_k2": "<|im_assistant|>assistant<|im_middle|>",
    "minimax_m2": "]~b]ai\n",
    "harmony": "<|start|>assistant",
    "llama3_json": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "[/INST]",
}
"""What stands in front of the assistant's turn in a prompt."""
