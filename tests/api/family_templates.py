"""Chat templates as families write them, cut down to what makes each one special."""

from __future__ import annotations

QWEN3 = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and ns.last_query == messages|length - 1 %}
        {%- set ns.last_query = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > ns.last_query and message.reasoning_content is string %}
            {%- set content = '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA3 = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

DEEPSEEK = """
{%- if not thinking is defined %}{% set thinking = false %}{% endif -%}
{%- set ns = namespace(system_prompt='', is_first_sp=true, is_last_user=false) -%}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}
{%- set ns.is_first_sp = false %}
{%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}
{%- endif %}{%- endfor -%}
{{ bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{%- set ns.is_last_user = true -%}{{ '<｜User｜>' + message['content'] }}{%- endif %}
{%- if message['role'] == 'assistant' %}
{%- if ns.is_last_user %}{{ '<｜Assistant｜>' }}{% if message['prefix'] is defined and message['prefix'] and thinking %}
{{- '<think>' }}{% else %}{{ '</think>' }}{% endif %}{%- endif %}{%- set ns.is_last_user = false -%}
{%- set content = message['content'] -%}
{%- if '</think>' in content %}{%- set content = content.split('</think>', 1)[1] -%}{%- endif %}
{{- content + '<｜end▁of▁sentence｜>' }}{%- endif %}
{%- endfor -%}
{%- if add_generation_prompt and ns.is_last_user %}{{ '<｜Assistant｜>' }}
{%- if not thinking %}{{ '</think>' }}{% else %}{{ '<think>' }}{% endif %}{% endif %}
"""

GPT_OSS = """
{%- macro build_system_message() -%}
    {%- if model_identity is not defined %}
        {%- set model_identity = "You are ChatGPT, a large language model trained by OpenAI." %}
    {%- endif %}
    {{- model_identity + "\\n" }}
    {{- "Knowledge cutoff: 2024-06\\n" }}
    {{- "Current date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}
    {%- if reasoning_effort is not defined %}
        {%- set reasoning_effort = "medium" %}
    {%- endif %}
    {{- "Reasoning: " + reasoning_effort + "\\n\\n" }}
    {{- "# Valid channels: analysis, commentary, final. Channel must be included for every message." }}
{%- endmacro %}
{{- "<|start|>system<|message|>" + build_system_message() + "<|end|>" }}
{%- if messages[0].role == "developer" or messages[0].role == "system" %}
    {{- "<|start|>developer<|message|># Instructions\\n\\n" + messages[0].content + "\\n\\n<|end|>" }}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- for message in loop_messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if "thinking" in message and '<|channel|>analysis<|message|>' in message.thinking %}
            {{- raise_exception("Pass the reasoning without its channel.") }}
        {%- endif %}
        {%- if "thinking" in message and loop.last %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
        {%- endif %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
    {%- elif message.role == 'user' -%}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}
"""

GLM = """[gMASK]<sop>
{%- macro visible_text(content) -%}
    {%- if content is string -%}
        {{- content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}
            {%- if item is mapping and item.type == 'text' -%}{{- item.text }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}<|user|>
{{ visible_text(m.content) }}
{%- set is_plain = enable_thinking is defined and not enable_thinking -%}
{{- '/nothink' if is_plain and not visible_text(m.content).endswith("/nothink") else '' -}}
{%- elif m.role == 'assistant' -%}<|assistant|>
{%- set reasoning_content = m.reasoning_content if m.reasoning_content is string else '' -%}
{{ '\\n<think>' + reasoning_content.strip() + '</think>' }}
{{- '\\n' + visible_text(m.content).strip() if visible_text(m.content).strip() -}}
{%- elif m.role == 'system' -%}<|system|>
{{ visible_text(m.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>
{{- '\\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' -}}
{%- endif -%}
"""

KIMI = """
{%- for message in messages -%}
  {%- if loop.first and messages[0]['role'] != 'system' -%}
<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>
  {%- endif -%}
  {%- set role_name = message.get('name') or message['role'] -%}
  {%- if message['role'] == 'user' -%}
    <|im_user|>{{role_name}}<|im_middle|>
  {%- elif message['role'] == 'assistant' -%}
    <|im_assistant|>{{role_name}}<|im_middle|>
  {%- else -%}
    <|im_system|>{{role_name}}<|im_middle|>
  {%- endif -%}
  {%- if message['role'] == 'assistant' -%}<think>{{ message.get('reasoning_content', '') }}</think>{%- endif -%}
  {{ message['content'] }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
  <|im_assistant|>assistant<|im_middle|>
  {%- if thinking is defined and thinking is false -%}<think></think>{%- else -%}<think>{%- endif -%}
{%- endif -%}
"""

MINIMAX = """
{%- macro build_system_message(system_message) -%}
    {%- if system_message and system_message.content -%}
        {{- system_message.content }}
    {%- else -%}
        {%- if model_identity is not defined -%}
            {%- set model_identity = "You are a helpful assistant." -%}
        {%- endif -%}
        {{- model_identity }}
    {%- endif -%}
{%- endmacro -%}
{%- set system_message = messages[0] if messages and messages[0].role == "system" else none -%}
{%- set conversation_messages = messages[1:] if system_message else messages -%}
{{- ']~!b[' ~ ']~b]system' ~ '\\n' ~ build_system_message(system_message) ~ '[e~[\\n' }}
{%- for message in conversation_messages -%}
    {%- if message.role == 'assistant' -%}
        {{- ']~b]ai' ~ '\\n' }}
        {%- if message.reasoning_content is string and loop.index0 > 2 -%}
            {{- '<think>' ~ '\\n' ~ message.reasoning_content ~ '\\n' ~ '</think>' ~ '\\n\\n' }}
        {%- endif -%}
        {{- message.content ~ '[e~[\\n' }}
    {%- elif message.role == 'user' -%}
        {{- ']~b]user' ~ '\\n' ~ message.content ~ '[e~[' ~ '\\n' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- ']~b]ai' ~ '\\n' ~ '<think>' ~ '\\n' }}
{%- endif -%}
"""

GEMMA = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {{- message['content'] | trim }}
    {{- '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""

MISTRAL = """
{%- set loop_messages = messages[1:] if messages[0]["role"] == "system" else messages %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {{- "[INST]" }}
        {%- if message == user_messages[-1] and messages[0]["role"] == "system" %}
            {{- messages[0]["content"] + "\\n\\n" }}
        {%- endif %}
        {{- message["content"] + "[/INST]" }}
    {%- elif message["role"] == "assistant" %}
        {{- message["content"] + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, got " + message["role"] + ".") }}
    {%- endif %}
{%- endfor %}
"""

TEMPLATES = {
    "qwen3": QWEN3,
    "llama3": LLAMA3,
    "deepseek": DEEPSEEK,
    "gpt-oss": GPT_OSS,
    "glm": GLM,
    "kimi": KIMI,
    "minimax": MINIMAX,
    "gemma": GEMMA,
    "mistral": MISTRAL,
}

ANSWER_STARTS = {
    ("qwen3", None): "<|im_start|>assistant\n",
    ("qwen3", "enable_thinking=false"): "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ("qwen3", "enable_thinking=true"): "<|im_start|>assistant\n",
    ("llama3", None): "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ("llama3", 'date_string="1 May 2025"'): "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ("deepseek", None): "<｜Assistant｜></think>",
    ("deepseek", "thinking=true"): "<｜Assistant｜><think>",
    ("gpt-oss", None): "<|start|>assistant",
    ("gpt-oss", 'reasoning_effort="high"'): "<|start|>assistant",
    ("glm", None): "<|assistant|>",
    ("glm", "enable_thinking=false"): "<|assistant|>\n<think></think>",
    ("kimi", None): "<|im_assistant|>assistant<|im_middle|><think>",
    ("kimi", "thinking=false"): "<|im_assistant|>assistant<|im_middle|><think></think>",
    ("minimax", None): "]~b]ai\n<think>\n",
    ("gemma", None): "<start_of_turn>model\n",
    ("mistral", None): "[/INST]",
}
"""How a prompt ends, by template and the one switch that a request sets: name=JSON."""
