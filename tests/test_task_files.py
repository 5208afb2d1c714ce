"""Prompt files as people have them: every odd way to hold rows is read as meant, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from expo.config import GenerateConfig
from expo.errors import InputError
from expo.generate.requests import require_one_system_message
from expo.tasks import Prompt, find_task, load_prompts, read_rows

USER = {"role": "user", "content": "a?"}
ASSISTANT = {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
SEPARATORS = "one\u2028two\u2029three\u0085four\x0bfive\rsix"


def prompts_in(folder: Path, name: str, content: bytes | str) -> list[Prompt]:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_prompts(find_task(str(file)))


READ = {
    "a byte order mark": ("q.jsonl", b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "b"}\n', ["a", "b"]),
    "a byte order mark in json": ("q.json", b'\xef\xbb\xbf[{"prompt": "a"}]', ["a"]),
    "a byte order mark in csv": ("q.csv", b"\xef\xbb\xbfprompt\na\n", ["a"]),
    "CRLF": ("q.jsonl", '{"prompt": "a"}\r\n{"prompt": "b"}\r\n', ["a", "b"]),
    "CRLF in csv": ("q.csv", 'prompt,n\r\n"a\r\nb",1\r\nc,2\r\n', ["a\r\nb", "c"]),
    "blank lines and no last line end": ("q.jsonl", '\n{"prompt": "a"}\n \t\n\n{"prompt": "b"}', ["a", "b"]),
    "line separators inside a row": ("q.jsonl", json.dumps({"prompt": SEPARATORS}, ensure_ascii=False), [SEPARATORS]),
    "new lines inside a field": ("q.csv", 'id,prompt\n1,"a\n\nb, ""c"""\n2,d\n', ['a\n\nb, "c"', "d"]),
    "a field above csv's own limit": ("q.csv", "prompt\n" + "x" * 200_000 + "\n", ["x" * 200_000]),
    "columns of several kinds": (
        "q.jsonl",
        '{"prompt": "a"}\n{"instruction": "b"}\n{"prompt": null, "messages": [{"role": "user", "content": "c"}]}\n',
        ["a", "b", "c"],
    ),
    "an ending in capitals": ("q.JSONL", '{"prompt": "a"}\n', ["a"]),
    "one line of 20 MB": ("q.jsonl", json.dumps({"prompt": "x " * 10_000_000}), ["x " * 10_000_000]),
}


@pytest.mark.parametrize(("name", "content", "texts"), READ.values(), ids=READ)
def test_files_that_are_read(tmp_path, name, content, texts):
    assert [prompt.messages[-1]["content"] for prompt in prompts_in(tmp_path, name, content)] == texts


REFUSED = {
    "an empty file": ("q.jsonl", b"", "contains no prompts"),
    "an empty json file": ("q.json", b"", "is not a valid json file"),
    "an empty csv file": ("q.csv", b"", "contains no prompts"),
    "an empty parquet file": ("q.parquet", b"", "is not a valid parquet file"),
    "UTF-16": ("q.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "it is UTF-16 text; save it as UTF-8"),
    "UTF-16 csv": ("q.csv", "prompt\na\n".encode("utf-16"), "it is UTF-16 text; save it as UTF-8"),
    "Latin-1": ("q.jsonl", '{"prompt": "ä"}\n'.encode("latin-1"), "it is not UTF-8 text (byte 0xe4 at 12)"),
    "a torn line": ("q.jsonl", '{"prompt": "a"}\n{"prompt": "b', "line 2: Unterminated string"),
    "half of a surrogate pair": ("q.jsonl", '{"prompt": "\\ud83d"}', "row 0 of {} contains half of a surrogate pair"),
    "lines that are no objects": (
        "q.jsonl",
        '{"prompt": "a"}\n"b"\n',
        "does not contain a list of objects: row 1 is 'b'",
    ),
    "one object": ("q.json", '{"prompt": "a"}', "does not contain a list of objects, but one object"),
    "rows under a key": (
        "q.json",
        '{"data": [{"prompt": "a"}]}',
        "under its key 'data' belongs in its own file",
    ),
    "an unclosed quote": ("q.csv", 'prompt\n"a\nb\n', "unexpected end of data"),
    "a comma without quotes": ("q.csv", "prompt\na, b\n", "row 0 has more fields than the header"),
    "another delimiter": ("q.csv", "id;prompt\n1;a\n", "row 0 of {} has no prompt, instruction or messages column"),
    "a number for a prompt": ("q.jsonl", '{"prompt": 1}', "row 0 of {} has no prompt, instruction or messages column"),
    "an instruction with an input": (
        "q.jsonl",
        '{"instruction": "a", "input": ""}\n{"instruction": "Sum it up", "input": "b"}',
        "row 1 of {} has both an instruction and an input: combine them in a prompt column",
    ),
    "parts for content": (
        "q.jsonl",
        json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}),
        "row 0 of {} has no prompt, instruction or messages column with text",
    ),
    "the assistant's turn last": (
        "q.jsonl",
        json.dumps({"messages": [USER]}) + "\n" + json.dumps({"messages": [USER, ASSISTANT]}),
        "row 1 of {} has messages that end with a turn of role 'assistant'; the last is the user's",
    ),
    "a git-lfs pointer": ("q.parquet", "version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
    "a web page": ("q.json", "<!DOCTYPE html><html>", "is a web page"),
    "a damaged parquet file": ("q.parquet", b"PAR1" + b"\x00" * 60 + b"PAR1", "is not a valid parquet file"),
    "nested too deep": ("q.json", "[" * 200_000, "is not a valid json file"),
    "a name of a task": (
        "alpaca.jsonl",
        '{"prompt": "a"}',
        "would be mixed with those of the task alpaca: rename the file",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED)
def test_files_that_are_refused_in_one_line(tmp_path, name, content, message):
    with pytest.raises(InputError) as caught:
        prompts_in(tmp_path, name, content)
    assert message.format(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path):
    import os

    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, message in {"folder": "is a folder", "pipe": "is a pipe", "none": "no such file"}.items():
        with pytest.raises(InputError, match=message):
            load_prompts(find_task(str(tmp_path / f"{name}.jsonl")))


def test_parquet_rows_with_structs_lists_and_nulls(tmp_path):
    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool", pa.list_(pa.int64()))])
    rows = [
        {"id": 7, "prompt": None, "messages": [{**SYSTEM, "tool": None}, {**USER, "tool": [1]}]},
        {"id": 8, "prompt": "b", "messages": None},
    ]
    schema = pa.schema([("id", pa.int64()), ("prompt", pa.string()), ("messages", pa.list_(turn))])
    folder = tmp_path / "id=9"  # a name that some readers take for a column
    folder.mkdir()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema), folder / "q.parquet")
    first, second = load_prompts(find_task(str(folder / "q.parquet")))
    assert first.messages == (SYSTEM, USER)
    assert second.messages == ({"role": "user", "content": "b"},)
    assert [first.id, second.id] == ["7", "8"]


def test_a_date_that_python_cannot_hold_is_one_line(tmp_path):
    late = pa.array([1 << 60], pa.timestamp("us"))
    pyarrow.parquet.write_table(pa.table({"prompt": ["a"], "made": late}), tmp_path / "q.parquet")
    with pytest.raises(InputError, match=r"q\.parquet is not a valid parquet file: date value out of range"):
        load_prompts(find_task(str(tmp_path / "q.parquet")))


IDS = {
    "numbers": ([1, 2, 3], ["1", "2", "3"]),
    "kinds that differ": ([1, "b", 2.5], ["1", "b", "2.5"]),
    "none": ([None, None, None], ["0", "1", "2"]),
    "one without": (["a", None, "c"], ["0", "1", "2"]),
    "an empty one": (["a", "", "c"], ["0", "1", "2"]),
    "two alike": (["a", "b", "a"], ["0", "1", "2"]),
    "two alike as text": ([1, "1", 2], ["0", "1", "2"]),
}


@pytest.mark.parametrize(("given", "used"), IDS.values(), ids=IDS)
def test_ids_are_the_rows_own_where_all_differ_else_their_numbers(tmp_path, caplog, given, used):
    content = "".join(json.dumps({"id": name, "prompt": "a"}) + "\n" for name in given)
    with caplog.at_level("WARNING", logger="expo"):
        assert [prompt.id for prompt in prompts_in(tmp_path, "q.jsonl", content)] == used
    alike = len({str(name) for name in given}) < len(given) and None not in given
    assert ("rows are numbered instead" in caplog.text) == alike


def test_a_rows_own_system_message_and_system_are_too_many(tmp_path):
    content = json.dumps({"messages": [USER]}) + "\n" + json.dumps({"messages": [SYSTEM, USER]})
    prompts = prompts_in(tmp_path, "q.jsonl", content)
    config = GenerateConfig(task="q.jsonl", model="m")
    require_one_system_message(prompts, config)
    with pytest.raises(InputError, match="row 1 has its own system message: drop --system"):
        require_one_system_message(prompts, GenerateConfig(task="q.jsonl", model="m", system="s"))


def test_a_file_of_rows_has_an_ending_that_says_so(tmp_path):
    with pytest.raises(InputError, match=r"a file of rows must end in \.jsonl, \.json, \.parquet, \.csv"):
        read_rows(tmp_path / "rows.txt")
