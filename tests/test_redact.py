"""What is never printed: whatever a message holds, the secrets known here are not in it."""

from __future__ import annotations

import pytest

from expo.redact import without_secrets

TOKEN = "hf_" + "Aa0" * 12
TEXTS = [
    (f"token {TOKEN}.", "token hf_…."),
    ("Bearer sk-made-up-0123, sk-made-up-0123", "Bearer sk-…, sk-…"),
    ("a hub-secret-1 b", "a hf_… b"),
    ("a hub-secret-of-old b", "a hf_… b"),
    ("http://me:p@ss:word@host:80/v1?x=a@b", "http://…@host:80/v1?x=a@b"),
    ("https://name@host", "https://…@host"),
    ("https://host/org/name@main and me@host", "https://host/org/name@main and me@host"),
    ("short is no secret", "short is no secret"),
]


@pytest.mark.parametrize(("text", "shown"), TEXTS)
def test_secrets_are_not_in_it(text, shown, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-made-up-0123\n")
    monkeypatch.setenv("HF_TOKEN", "hub-secret-1")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hub-secret-of-old")
    assert without_secrets(text) == shown
    monkeypatch.setenv("HF_TOKEN", "short")
    assert "short is no secret" in without_secrets("short is no secret")
