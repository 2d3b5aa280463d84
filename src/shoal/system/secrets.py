"""
Detects secrets that must not be stored: passwords in URLs, and values of secret environment variables. No torch.

A config is stored with its run, every user of the machine can see a command line, and messages go into logs. So a value
with a secret is rejected before use, and never quoted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final

# Names of secret variables: HF_TOKEN, HUGGING_FACE_HUB_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, ...
_NAME: Final = re.compile(r"(^|_)(TOKEN|API_?KEY|PASSWORD|PASSWD|SECRET|SECRET_ACCESS_KEY|PRIVATE_KEY)$")
_SHORTEST: Final = 8  # shorter values occur in too much ordinary text
_IN_ADDRESS: Final = re.compile(r"(?<=://)[^/\s@]+@")  # user:password@ or token@
_SHAPE: Final = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")  # a Hugging Face token


def secret_in(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return what secret `text` contains and where to put it instead, without quoting it; "" if there is none."""
    for name, value in environment.items():
        if len(value) >= _SHORTEST and value in text and _NAME.search(name.upper()):
            return f"it contains the value of {name} and would be stored with the run; remove it: {name} is read from the environment"
    if _IN_ADDRESS.search(text):
        return (
            "it contains a user name or password in a URL and would be stored with the run; remove that: set a hub's token in "
            "HF_TOKEN, a proxy's password in HTTPS_PROXY"
        )
    if _SHAPE.search(text):
        return "it contains a Hugging Face token and would be stored with the run; remove it and set HF_TOKEN"
    return ""


def without_password(address: str) -> str:
    """Return a URL without user name and password."""
    return _IN_ADDRESS.sub("", address)
