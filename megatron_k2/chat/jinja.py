"""The canonical (0905) template as Jinja, for exports: what ``transformers`` and servers render.

Written here; its output equals ``template.render_text`` byte for byte (``tests/chat``). It sorts
the keys of declarations itself, which the release leaves to its tokenizer's code. An engine whose
``tojson`` knows no ``separators`` (llama.cpp's) prints declarations with spaces.

A server tokenizes the rendered text, so there a control token's name in a user's text becomes the
token; a server that cares must take ids from ``template.Renderer``.
"""

from megatron_k2.chat.template import DEFAULT_SYSTEM

_TEMPLATE = """\
{%- macro text_of(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content -%}
    {%- for part in content -%}{{- part.text -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- macro answer(message) -%}
  {{- text_of(message.content) -}}
  {%- if message.tool_calls -%}
    {{- '<|tool_calls_section_begin|>' -}}
    {%- for call in message.tool_calls -%}
      {{- '<|tool_call_begin|>' + call.id + '<|tool_call_argument_begin|>' -}}
      {%- if call.function.arguments is string -%}
        {{- call.function.arguments -}}
      {%- else -%}
        {{- call.function.arguments | tojson -}}
      {%- endif -%}
      {{- '<|tool_call_end|>' -}}
    {%- endfor -%}
    {{- '<|tool_calls_section_end|>' -}}
  {%- endif -%}
  {{- '<|im_end|>' -}}
{%- endmacro -%}
{%- if tools -%}
  {{- '<|im_system|>tool_declare<|im_middle|>' -}}
  {{- tools | tojson(separators=(',', ':'), sort_keys=True) -}}
  {{- '<|im_end|>' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if loop.first and message.role != 'system' -%}
    {{- '<|im_system|>system<|im_middle|>@DEFAULT_SYSTEM@<|im_end|>\\n' -}}
  {%- endif -%}
  {%- set title = message.name or message.role -%}
  {%- if message.role == 'assistant' -%}
    {{- '<|im_assistant|>' + title + '<|im_middle|>' -}}
    {%- if message.weight is defined and message.weight == 0 -%}
      {{- answer(message) -}}
    {%- else -%}
      {%- generation -%}{{- answer(message) -}}{%- endgeneration -%}
    {%- endif -%}
  {%- else -%}
    {{- '<|im_user|>' if message.role == 'user' else '<|im_system|>' -}}
    {{- title + '<|im_middle|>' -}}
    {%- if message.role == 'tool' -%}
      {{- '## Return of ' + message.tool_call_id + '\\n' -}}
    {%- endif -%}
    {{- text_of(message.content) -}}
    {{- '<|im_end|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_assistant|>assistant<|im_middle|>' -}}
{%- endif -%}
"""


def jinja_template(*, has_generation_marks: bool = False) -> str:
    """The template's text.

    Args:
        has_generation_marks: With ``{% generation %}`` around what is trained, from which
            ``apply_chat_template(return_assistant_tokens_mask=True)`` of transformers makes a mask.
            Other readers of Jinja do not know the mark, so exports go without.
    """
    text = _TEMPLATE.replace("@DEFAULT_SYSTEM@", DEFAULT_SYSTEM)
    if not has_generation_marks:
        text = text.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    return text
