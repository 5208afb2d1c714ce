"""What is never printed and never written to a file: access tokens, keys, and passwords in URLs."""

from __future__ import annotations

import os
import re

ACCESS_TOKEN = r"hf_[A-Za-z0-9]{30,}"
"""Of the hub; it may stand in a path, a URL or an exception."""
VARIABLES = {"HF_TOKEN": "hf_…", "HUGGING_FACE_HUB_TOKEN": "hf_…", "OPENAI_API_KEY": "sk-…"}
"""Environment variables that hold a secret, and what is shown in its place."""
MIN_SECRET_CHARACTERS = 8
"""A shorter value is no secret, and hiding it would make text unreadable."""
URL_USER = r"(?<=://)[^/?#\s]+@"
"""The user and password of a URL."""


def without_secrets(text: str) -> str:
    """Text that came from anywhere, without the secrets known here."""
    text = re.sub(ACCESS_TOKEN, "hf_…", text)
    for variable, stand_in in VARIABLES.items():
        secret = os.environ.get(variable, "").strip()
        text = text.replace(secret, stand_in) if len(secret) >= MIN_SECRET_CHARACTERS else text
    return re.sub(URL_USER, "…@", text)
