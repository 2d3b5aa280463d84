"""Chat templates that shoal has itself, in Jinja, for tokenizers without one. No torch."""

from __future__ import annotations

from typing import Final

# The prompts of Stanford Alpaca: no line end after "### Response:", and the end token after the answer. Alpaca records have
# `instruction` and `input` beside `content`. A system message replaces the first sentence; later turns follow after a blank line.
_ALPACA = r"""
{%- set task = 'Below is an instruction that describes a task' -%}
{%- set context = ', paired with an input that provides further context' -%}
{%- set request = '. Write a response that appropriately completes the request.\n\n' -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'system' and loop.first -%}
        {{- message.content + '\n\n' -}}
    {%- elif message.role == 'user' -%}
        {%- if loop.first -%}
            {{- task + (context if message.input else '') + request -}}
        {%- elif loop.previtem.role == 'assistant' -%}
            {{- '\n\n' -}}
        {%- endif -%}
        {{- '### Instruction:\n' + (message.instruction or message.content) + '\n\n' -}}
        {%- if message.input -%}
            {{- '### Input:\n' + message.input + '\n\n' -}}
        {%- endif -%}
    {%- elif message.role == 'assistant' -%}
        {{- '### Response:' + message.content + eos_token -}}
    {%- else -%}
        {{- raise_exception('the Alpaca prompt has no place for a message of role ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '### Response:' -}}
{%- endif -%}
"""

_CHATML = r"""
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""

_LLAMA3 = r"""
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
"""

NAMED: Final = {"chatml": _CHATML, "alpaca": _ALPACA, "llama3": _LLAMA3}
