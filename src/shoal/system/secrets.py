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
from urllib.parse import urlsplit

# Names of secret variables: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, SHOAL_WEBHOOK, ...
_NAME: Final = re.compile(r"(^|_)(TOKEN|API_?KEY|PASSWORD|PASSWD|SECRET|SECRET_ACCESS_KEY|PRIVATE_KEY|WEBHOOK)$")
_SHORTEST: Final = 8  # shorter values occur in too much ordinary text
_IN_ADDRESS: Final = re.compile(r"(?<=://)[^/\s@]+@")  # user:password@ or token@
# Parameters of a signed URL, or with a token: who knows the URL may read the file.
_SECRET_PARAMETER: Final = re.compile(
    r"^(x-(amz|goog|ms)-.*|sig|signature|token|access_?token|auth|api_?key|key|password|secret|policy|expires|key-pair-id|"
    r"awsaccesskeyid|googleaccessid|se|sp|sv|sr|st|spr|skoid|sktid|skt|ske|sks|skv)$",
    re.IGNORECASE,
)
_SIGNED: Final = re.compile(
    r"://\S*[?&](x-amz-signature|x-amz-security-token|x-goog-signature|sig|signature|token|access_?token|api_?key|password|secret)=",
    re.IGNORECASE,
)
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
    if _SIGNED.search(text):
        return (
            "it contains a signed URL, or one with a token, and would be stored with the run; download the file yourself and "
            "set the path of the copy"
        )
    if _SHAPE.search(text):
        return "it contains a Hugging Face token and would be stored with the run; remove it and set HF_TOKEN"
    return ""


def without_password(address: str) -> str:
    """Return a URL without user name and password."""
    return _IN_ADDRESS.sub("", address)


def without_secrets(address: str) -> str:
    """Return a URL without user name and password, and without the parameters of a signed URL or a token."""
    parts = urlsplit(without_password(address))
    kept = [p for p in parts.query.split("&") if p and not _SECRET_PARAMETER.match(p.partition("=")[0])]
    return parts._replace(query="&".join(kept)).geturl()


def redacted(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return another program's message without the secrets that this one knows: keys in the environment, passwords in URLs."""
    for name, value in environment.items():
        if len(value) >= _SHORTEST and _NAME.search(name.upper()):
            text = text.replace(value, f"[{name}]")
    return _SHAPE.sub("[a token]", without_password(text))
