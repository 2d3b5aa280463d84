"""
What must not be written down: passwords in addresses, and the values of variables that hold a secret. No torch.

A config is kept with its run, a command line is seen by every user of the machine, and messages go into logs. So a value
that holds a secret is refused before anything is made of it, and not quoted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final

# Of a variable that holds a secret: HF_TOKEN, HUGGING_FACE_HUB_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, ...
_NAME: Final = re.compile(r"(^|_)(TOKEN|API_?KEY|PASSWORD|PASSWD|SECRET|SECRET_ACCESS_KEY|PRIVATE_KEY)$")
_SHORTEST: Final = 8  # a shorter value is part of too many honest words
_IN_ADDRESS: Final = re.compile(r"(?<=://)[^/\s@]+@")  # user:password@, or a token@
_SHAPE: Final = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")  # a token of Hugging Face's


def secret_in(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """What secret `text` holds and where it may be instead, without a word of it; "" where it holds none."""
    for name, value in environment.items():
        if len(value) >= _SHORTEST and value in text and _NAME.search(name.upper()):
            return f"it holds the value of {name}, and would be written down with it; leave it out, {name} is read from the environment"
    if _IN_ADDRESS.search(text):
        return (
            "it holds a user or password in an address, and would be written down with it; leave that out: a token for a hub goes "
            "into HF_TOKEN, a password of a proxy into HTTPS_PROXY"
        )
    if _SHAPE.search(text):
        return "it holds a token of Hugging Face's, and would be written down with it; leave it out and set HF_TOKEN"
    return ""


def without_password(address: str) -> str:
    """An address as it may be shown: without a user or password."""
    return _IN_ADDRESS.sub("", address)
