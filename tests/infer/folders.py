"""Small folders of weights, with an end of text, a chat template, and embedding rows that only pad the vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from shoal.data.tokens.tokenize import byte_tokenizer

from ..hub.small import save

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURN_END = 258


def talker(folder: Path, kind: str = "llama", *, bos: bool = False) -> Path:
    """Save a model with 272 embedding rows and 259 tokens: bytes, <|endoftext|>, <|im_start|> and <|im_end|>, which ends a turn."""
    save(kind, folder)
    tokenizer = tokenizers.Tokenizer.from_str(byte_tokenizer().to_json())
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": TEMPLATE,
    }  # fmt: skip
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 257)]
        )
        described["bos_token"] = "<|im_start|>"
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [TURN_END, 256]}), encoding="utf-8")
    return folder
