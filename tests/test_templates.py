"""templates: which messages a chat template ignores, judged by what it renders; template files; clocks."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from sizes import sized

from expo.engines.templates import (
    after_answer,
    asks_for_time,
    known_roles,
    left_out,
    read_template,
    with_clock_of,
)
from expo.errors import InputError

LONG = "Name three rivers in Europe and say where they end."
ALL = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
TWO = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|{{ m.role }}|>{{ m.content }}</s>{% endif %}"
    "{% endfor %}"
)
TRIMMED = ALL.replace("m.content", "m.content | trim")
ESCAPED = ALL.replace("m.content", "m.content | e")
JSON = ALL.replace("m.content", "m.content | tojson")
UPPER = ALL.replace("m.content", "m.content | upper")
FIRST_TURN = "<|user|>{{ messages[0].content }}"
LAST_TURN = "<|user|>{{ messages[-1].content }}"
SYSTEM_IN_USER = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content ~ '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ 1 / 0 }}{% endif %}<|{{ m.role }}|>"
    "{{ first if loop.WHERE }}{{ m.content }}</s>{% endfor %}"
)
SYSTEM_IN_FIRST = SYSTEM_IN_USER.replace("WHERE", "first")
SYSTEM_IN_LAST = SYSTEM_IN_USER.replace("WHERE", "last")
WITHOUT_THOUGHTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
)
SWITCH = (
    "{% if '/no_think' in messages[0].content %}<|quick|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.replace('/no_think', '') }}</s>{% endfor %}"
)
DEFAULT_SYSTEM = "<|system|>You are a helpful assistant.</s>" + TWO


def talk(*turns: str) -> list[dict[str, str]]:
    """Messages written as `role: text`."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


def renderer(template: str):
    compiled = ImmutableSandboxedEnvironment().from_string(template)

    def render(messages) -> str | None:
        try:
            return compiled.render(messages=messages)
        except (TemplateError, ZeroDivisionError):
            return None

    return render


KEPT = {
    "as it is": (ALL, talk("system: Be terse.", f"user: {LONG}")),
    "any role": (ALL, talk("human: My name is Zoe.", "gpt: Hi.", "developer: x", "tool: {}", "user: a")),
    "white space around it": (TRIMMED, talk(f"user:   \n{LONG}\n\n ", f"assistant: {LONG}   ", "user: \ta ")),
    "html escapes": (
        ESCAPED,
        talk("user: is a < b && 'c' > d really true?", "assistant: <b>no, it is not</b>", "user: &"),
    ),
    "json strings": (
        JSON,
        talk('user: a "quoted" text\nof two long lines', "assistant: tab\tand é and more text", "user: x"),
    ),
    "other letters": (UPPER, talk(f"user: {LONG}", "assistant: a", "user: b")),
    "system in the first turn": (
        SYSTEM_IN_FIRST,
        talk("system: Be terse.", f"user: {LONG}", "assistant: a", "user: b"),
    ),
    "system in the last turn": (SYSTEM_IN_LAST, talk("system: Be terse.", f"user: {LONG}", "assistant: a", "user: b")),
    "thoughts of earlier turns": (
        WITHOUT_THOUGHTS,
        talk(
            f"user: {LONG}", "assistant: <think>\nHm, rivers.\n</think>\n\nRhine, Danube and Rhone.", "user: And lakes?"
        ),
    ),
    "thoughts alone": (
        WITHOUT_THOUGHTS,
        talk(f"user: {LONG}", "assistant: <think>Hm, rivers.</think>\n", "user: Go on."),
    ),
    "thoughts cut short": (WITHOUT_THOUGHTS, talk(f"user: {LONG}", "assistant: <think>Hm, rivers", "user: Go on.")),
    "a switch in a message": (SWITCH, talk("system: /no_think", f"user: {LONG}")),
    "empty texts": (TWO, talk("system: ", "user: a", "assistant:   ", "user: b")),
    "equal texts": (ALL, talk(f"user: {LONG}", f"assistant: {LONG}", f"user: {LONG}")),
    "one text in another": (ALL, talk("system: Be terse, please do.", "user: Be terse, please do. Which rivers?")),
    "a text that is a marker": (ALL, talk("user: another00001text", "assistant: another00000text", "user: a")),
    "a text of braces": (ALL, talk("system: {{ bos }} {% if %}", "user: {{ messages }}")),
}  # fmt: skip


@pytest.mark.parametrize(("template", "messages"), KEPT.values(), ids=KEPT)
def test_no_message_that_the_template_uses_is_said_to_be_ignored(template, messages):
    render = renderer(template)
    assert left_out(messages, render(messages), render) == []


IGNORED = {
    "system": (TWO, talk("system: Answer in French only.", f"user: {LONG}"), [0]),
    "developer": (TWO, talk("developer: Be terse.", f"user: {LONG}"), [0]),
    "human and gpt": (TWO, talk("human: I am Zoe.", "gpt: Hi.", "developer: Be terse.", f"user: {LONG}"), [0, 1, 2]),
    "tool": (TWO, talk(f"user: {LONG}", "assistant: a", 'tool: {"rivers": ["Rhine"]}', "user: b"), [2]),
    "every message": (TWO, talk(f"human: {LONG}"), [0]),
    "a short text": (TWO, talk("system: a", "user: assistant"), [0]),
    "a word of the template": (TWO, talk("system: user", f"user: {LONG}"), [0]),
    "another message's text": (TWO, talk(f"system: {LONG}", f"user: {LONG}"), [0]),
    "part of a later message": (TWO, talk("system: Name three rivers", f"user: {LONG}"), [0]),
    "part of an earlier message": (TWO, talk(f"user: {LONG}", "assistant: a", "tool: three rivers", "user: b"), [2]),
    "all turns but the first": (FIRST_TURN, talk(f"user: {LONG}", "assistant: Rhine and Rhone.", "user: b"), [1, 2]),
    "all turns but the last": (LAST_TURN, talk(f"user: {LONG}", "assistant: Rhine and Rhone.", "user: b"), [0, 1]),
    "a second system message": (
        ALL.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' or loop.first %}")
        .replace("loop.first", "m == messages[0]"),
        talk("system: Be terse.", f"user: {LONG}", "assistant: a", "system: Be polite.", "user: b"),
        [3],
    ),
    "with escapes": (TWO.replace("m.content", "m.content | e"), talk("system: a < b", "user: is it so, a < b?"), [0]),
    "a template that takes only its roles": (
        SYSTEM_IN_FIRST.replace("{{ first if loop.first }}", ""),
        talk("system: Be terse.", f"user: {LONG}", "assistant: a", "user: b"),
        [0],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("template", "messages", "expected"), IGNORED.values(), ids=IGNORED)
def test_messages_that_change_nothing_are_ignored(template, messages, expected):
    render = renderer(template)
    assert left_out(messages, render(messages), render) == expected


def test_found_texts_cost_no_rendering():
    def render(messages):
        raise AssertionError

    messages = talk(
        f"user: {LONG}", "assistant: The Rhine, the Danube and the Rhone.", "user: And which lakes are there?"
    )
    assert left_out(messages, renderer(ALL)(messages), render) == []


ROLES = {
    "all": (ALL, ["system", "user", "assistant", "developer", "tool"]),
    "two": (TWO, ["user", "assistant"]),
    "others refused": ("{% if messages[0].role == 'tool' %}{{ 1 / 0 }}{% endif %}" + TWO, ["user", "assistant"]),
}


@pytest.mark.parametrize(("template", "expected"), ROLES.values(), ids=ROLES)
def test_the_roles_that_a_template_knows(template, expected):
    assert list(known_roles(renderer(template))) == expected


ENDINGS = {
    "a token": (ALL, "</s>"),
    "a token and a line": (ALL.replace("</s>", "<|end|>\n") + "<|x|>", "<|end|>\n<|x|>"),
    "nothing": (ALL.replace("</s>", ""), ""),
    "no answer in it": (LAST_TURN.replace("-1", "0"), ""),
    "roles refused": ("{{ 1 / 0 }}", ""),
}


@pytest.mark.parametrize(("template", "expected"), ENDINGS.values(), ids=ENDINGS)
def test_what_is_written_after_an_answer(template, expected):
    assert after_answer(renderer(template)) == expected


CLOCKS = {
    "called": ("{{ strftime_now('%d %b %Y') }}", True),
    "where it is defined": ("{% if strftime_now is defined %}{% set d = strftime_now('%d') %}{% endif %}", True),
    "in a macro": ("{% macro day() %}{{ strftime_now('%d') }}{% endmacro %}{{ day() }}", True),
    "in a comment": ("{# strftime_now('%d')\n is not used #}{{ messages }}", False),
    "a fixed date": ("{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}", False),
    "none": (ALL, False),
}


@pytest.mark.parametrize(("template", "expected"), CLOCKS.values(), ids=CLOCKS)
def test_which_templates_ask_for_the_time(template, expected):
    assert asks_for_time(template) is expected


HERE = settings(deadline=None, database=None, max_examples=sized(ci=60, full=1000))
DIRECTIVES = [f"%{flag}{letter}" for flag in ("", "-", "0", "^") for letter in "aAbBcdFHIjmMpSTuUwWxXyYfzZe"]


@HERE
@given(
    st.lists(st.sampled_from([*DIRECTIVES, "%%", " ", ", ", "the ", "\n", "is 100%% ", "%"])),
    st.datetimes(min_value=datetime(1900, 1, 1)),
    st.sampled_from(["", "\n", "  ", "\n  {% if true %}x{% endif %}\n"]),
)
def test_a_clock_that_stands_writes_what_strftime_does(parts: list[str], moment: datetime, begin: str) -> None:
    said = "".join(parts).removesuffix("%")
    text = (
        begin + "{{ strftime_now(f) }}{% set day = strftime_now('%d') | int %} {{ day }}{{ strftime_now(format='%Y') }}"
    )
    variables = with_clock_of(text, moment)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as transformers makes it
    rendered = environment.from_string(str(variables.pop("chat_template"))).render(f=said, **variables)
    plain = environment.from_string(begin).render() if begin.strip() else begin
    assert rendered == f"{plain}{moment.strftime(said)} {moment.day}{moment.strftime('%Y')}"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a byte order mark"])
def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path, mark):
    (tmp_path / "t.jinja").write_bytes(mark + ALL.encode())
    assert read_template(tmp_path / "t.jinja") == ALL


FILES = {
    "tokenizer_config.json": (
        "tokenizer_config.json",
        json.dumps({"chat_template": ALL}),
        "is JSON: write the text of",
    ),
    "JSON of another name": ("t.jinja", json.dumps({"chat_template": ALL}), "is JSON: write the text of"),
    "JSON after a mark": ("t.jinja", "\ufeff" + json.dumps({"chat_template": ALL}), "is JSON: write the text of"),
    "a list of templates": ("t", json.dumps([{"name": "default", "template": ALL}]), "is JSON: write the text of"),
    "text named .json": ("t.json", ALL, "is JSON: write the text of"),
    "empty": ("t.jinja", " \n", "is empty"),
    "not UTF-8": ("t.jinja", b"\xff\xfe{", "cannot be read"),
    "a folder": ("", "", "cannot be read"),
}


@pytest.mark.parametrize(("name", "content", "message"), FILES.values(), ids=FILES)
def test_template_files_that_are_none(tmp_path: Path, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        read_template(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{{ messages[0].content }}", "{%- for m in messages %}{{ m.content }}{% endfor %}", "7"]
)
def test_templates_that_only_look_like_json(tmp_path, text):
    (tmp_path / "t.jinja").write_text(text)
    assert read_template(tmp_path / "t.jinja") == text
