"""Conversations, a small tokenizer with chat tokens, and chat templates with the habits of real ones."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from shoal.config.data_options import Data
from shoal.data.prepare import Prepared
from shoal.data.tokens.tokenize import train_bpe

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
WORDS = (
    "Hello",
    "there",
    "what is",
    "più",
    "漢字",
    "🐟",
    "1 + 1?",
    "\n\n",
    "  two",
    "def f(x):\n    return x",
    "<brief>",
    ".",
)

# ChatML with tools, and with marks of the answers, from which transformers finds them itself.
CHATML = """{% if tools %}<|im_start|>tools
{{ tools | tojson }}<|im_end|>
{% endif %}{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}\
{% generation %}{{ message.content }}{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}\
{{ '<|im_end|>\\n' }}{% endgeneration %}{% else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# As Qwen3's: an empty thought before the last answer only.
THINKING = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}\
{% if loop.last and message.role == 'assistant' %}{{ '<think></think>' }}{% endif %}\
{{ message.content + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# As the first one of Llama 3: the start of an answer at the end, asked or not; and a token at the beginning.
ALWAYS_OPEN = """{{ bos_token }}{% for message in messages %}\
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}{% endfor %}{{ '<|im_start|>assistant\\n' }}"""

# As Mistral's and Gemma's: no system message, strict alternation.
STRICT = """{{ bos_token }}{% for message in messages %}\
{% if message.role not in ['user', 'assistant'] %}{{ raise_exception('only users and assistants speak') }}{% endif %}\
{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\
{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}{% else %}{{ message.content + eos_token }}\
{% endif %}{% endfor %}"""


@cache
def _tokenizer_json() -> str:
    tokenizer = train_bpe(iter([" ".join(WORDS), "### Instruction:\n### Response:The", ":The" * 9] * 9), 400)
    tokenizer._tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer.to_json()


def chat_folder(folder: Path, template: str | None = None) -> Path:
    """Write a tokenizer's folder, as Hugging Face has it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def say(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 9))).lstrip() + "!"


def conversations(count: int, turns: int = 3, seed: int = 0) -> list[list[dict[str, Any]]]:
    """Return different conversations of one to `turns` questions and answers, some with a system message."""
    draw, found = random.Random(seed), []
    for number in range(count):
        messages = [{"role": "system", "content": say(draw)}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, turns)):
            messages += [
                {"role": "user", "content": f"{number} {say(draw)}"},
                {"role": "assistant", "content": say(draw)},
            ]
        found.append(messages)
    return found


def alpaca_records(count: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    return [
        {"instruction": f"{number} {say(draw)}", "input": say(draw) if number % 3 == 0 else "", "output": say(draw)}
        for number in range(count)
    ]


def chat_data(tmp_path: Path, records: Iterable[Any], **changes: Any) -> Data:
    """Return the `data` section for records in a file."""
    path = write_lines(tmp_path / "chats.jsonl", records)
    options: dict[str, Any] = {
        "corpus": "jsonl", "paths": (str(path),), "tokenizer": "bytes", "val_fraction": 0.2, "seq_len": 32,
        "folder": str(tmp_path / "prepared"), "shard_tokens": 1024, "document_mask": True, "format": "messages",
    }  # fmt: skip
    return Data(**{**options, **changes})


def documents(prepared: Prepared) -> dict[tuple[int, ...], list[tuple[int, int]]]:
    """Return each conversation's ids with its learned spans, over both splits."""
    found = {}
    for stream in prepared.streams.values():
        if not stream.num_tokens:
            continue
        starts = [*stream.starts(0, stream.num_tokens).tolist(), stream.num_tokens]
        for first, stop in pairwise(starts):
            answers = stream.answers(first, stop)
            assert answers is not None
            spans = [(a - first, b - first) for a, b in answers.tolist()]
            found[tuple(stream.read(first, stop).tolist())] = spans
    return found


def learned_texts(prepared: Prepared) -> list[str]:
    """Return the text of each learned span, sorted."""
    return sorted(
        prepared.tokenizer.decode(list(ids[first:stop]))
        for ids, spans in documents(prepared).items()
        for first, stop in spans
    )
