"""What a chat template does with a conversation: which messages it leaves out, whether it asks for the time.

Here: reading a template's file, judging a template by what it renders, and a clock for it that stands. Token ids are in
`chat.py`.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

from expo.errors import InputError
from expo.tasks import Message

ROLES = ("system", "user", "assistant", "developer", "tool")
"""The roles that templates know, of which a message may name those that one does."""

SURE_CHARACTERS = 16
"""A text of this length that is found is the message's own, not a word of the template's."""

THOUGHT_END = "</think>"
"""Templates leave out what an assistant thought before its answer."""

CLOCK = """\
{%- macro strftime_now(format) -%}
{%- set begun = namespace(directive='') -%}
{%- for one in format -%}
{%- set directive = begun.directive ~ one -%}
{%- if directive in expo_moment -%}
{{- expo_moment[directive] -}}{%- set begun.directive = '' -%}
{%- elif directive in ('%', '%-', '%_', '%0', '%^', '%#') -%}
{%- set begun.directive = directive -%}
{%- else -%}
{{- directive -}}{%- set begun.directive = '' -%}
{%- endif -%}
{%- endfor -%}
{{- begun.directive -}}
{%- endmacro %}
"""
"""A clock that stands: `expo_moment` has the parts of its time by their directives, with the C library's flags."""

Render = Callable[[Sequence[Message]], str | None]
"""A conversation's text; None where the template rejects it."""


def read_template(path: Path) -> str:
    """The text of a Jinja file, without a byte order mark.

    Raises:
        InputError: It cannot be read, is empty, or is JSON, which may hold a template but is none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the chat template {path} cannot be read: {error}") from error
    if not text.strip():
        raise InputError(f"the chat template {path} is empty")
    if path.suffix == ".json" or _is_json(text):
        raise InputError(
            f"the chat template {path} is JSON: write the text of its key chat_template to a file of its own, and pass "
            "that"
        )
    return text


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def asks_for_time(template: str) -> bool:
    """Whether a template calls `strftime_now`, the one clock that transformers gives it."""
    return "strftime_now" in re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)


def with_clock_of(template: str, moment: datetime) -> dict[str, object]:
    """A template whose clock stands, and its variables, as arguments of `apply_chat_template`.

    Transformers lets templates call its own clock only, and gives them plain values: so the clock is a macro before the
    template, which puts the parts of the time in the place of their directives (`%Y`, `%-d`).
    """
    directives = [f"%{flag}{letter}" for flag in ("", *"-_0^#") for letter in string.ascii_letters]
    return {
        "chat_template": CLOCK + template,  # jinja drops the newline after the macro, and none of the template's
        "expo_moment": {"%%": "%", **{directive: moment.strftime(directive) for directive in directives}},
    }


def left_out(messages: Sequence[Message], text: str, render: Render) -> list[int]:
    """The numbers of the messages that a template ignores: whatever they say, it renders the same.

    Almost always all texts are found in order, which is quick. Otherwise templates may have changed them (white space,
    escapes) or their order, and each message is tried with another text.

    Args:
        messages: The conversation.
        text: What the template renders.
        render: The template.
    """
    if _are_found(messages, text):
        return []
    said = [number for number, message in enumerate(messages) if _own_text(message)]
    others = {number: f"another{number:05d}text" for number in said}
    seen = (render(_replaced(messages, others)) or "").casefold()
    return [
        number
        for number in said
        if others[number] not in seen and render(_replaced(messages, {number: others[number]})) == text
    ]


def _replaced(messages: Sequence[Message], texts: dict[int, str]) -> list[Message]:
    return [
        {**message, "content": texts[number]} if number in texts else message for number, message in enumerate(messages)
    ]


def _own_text(message: Message) -> str:
    """What a template should render of a message."""
    content = message["content"]
    return (content.rpartition(THOUGHT_END)[2] if message["role"] == "assistant" else content).strip()


def _are_found(messages: Sequence[Message], text: str) -> bool:
    """Whether the texts of all messages are in the rendering, one after the other."""
    end = 0
    for wanted in filter(None, map(_own_text, messages)):
        start = text.find(wanted, end) if len(wanted) >= SURE_CHARACTERS else -1
        if start < 0:
            return False
        end = start + len(wanted)
    return True


def known_roles(render: Render) -> Iterator[str]:
    """The roles whose messages a template renders, as far as it can be seen."""
    for role in ROLES:
        tried = {"role": role, "content": "another00000text"}
        asked = {"role": "user", "content": "."}
        for messages in ([tried, asked], [asked, tried, asked], [tried]):
            if "another00000text" in (render(messages) or "").casefold():
                yield role
                break


def after_answer(render: Render) -> str:
    """What a template writes after an assistant's answer at the end of a conversation."""
    marker = "another00000text"
    text = render([{"role": "user", "content": "."}, {"role": "assistant", "content": marker}]) or ""
    return text.rpartition(marker)[2] if marker in text else ""
