"""Prompt files as people have them: every odd way to hold rows is read as meant, or refused in one line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from expo.config import GenerateConfig
from expo.errors import InputError
from expo.tasks import Answer, Prompt, find_task, load_prompts, read_conversations, read_rows
from expo.verbs.generate.requests import require_one_system_message

USER = {"role": "user", "content": "a?"}
ASSISTANT = {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
IMAGE = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]}
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
    "lines in json": ("q.json", '{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n', ["a", "b"]),
    "lines in json after a byte order mark": ("q.json", b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "b"}', ["a", "b"]),
    "one line in json": ("q.json", '{"prompt": "a"}\n', ["a"]),
    "one object in json": ("q.json", json.dumps({"prompt": "a", "tags": ["b"]}, indent=2), ["a"]),
    "an array in jsonl": ("q.jsonl", '[{"prompt": "a"}, {"prompt": "b"}]\n', ["a", "b"]),
    "an array over lines in jsonl": ("q.jsonl", json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=2), ["a", "b"]),
    "one object over lines in jsonl": ("q.jsonl", json.dumps({"prompt": "a"}, indent=2), ["a"]),
    "an instruction without input": (
        "q.jsonl",
        '{"instruction": "a", "input": ""}\n{"instruction": "b", "input": null}\n{"instruction": "c", "input": NaN}\n',
        ["a", "b", "c"],
    ),
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
    "half of a surrogate pair": ("q.jsonl", '{"prompt": "\\ud83d"}', "row 0 of {} holds half of a surrogate pair"),
    "lines that are no objects": (
        "q.jsonl",
        '{"prompt": "a"}\n"b"\n',
        "does not contain a list of objects: row 1 is 'b'",
    ),
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
    "an image in the messages": (
        "q.jsonl",
        json.dumps({"prompt": "a", "messages": [USER]}) + "\n" + json.dumps({"prompt": "a", "messages": [IMAGE]}),
        "row 1 of {} has a messages column whose turn 0 contains 'image_url': only text is supported; leave the row "
        "out",
    ),
    "an image in the prompt": (
        "q.jsonl",
        json.dumps({"prompt": [IMAGE]}),
        "row 0 of {} has a prompt column whose turn 0",
    ),
    "a part of no type": (
        "q.jsonl",
        json.dumps({"prompt": [{"role": "user", "content": ["a"]}]}),
        "row 0 of {} has a prompt column whose turn 0 has no text: give every turn a content of text",
    ),
    "no parts": ("q.jsonl", json.dumps({"prompt": [{"role": "user", "content": []}]}), "turn 0 has no text"),
    "a turn without content": (
        "q.jsonl",
        json.dumps({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}, USER]}),
        "row 0 of {} has a messages column whose turn 1 has no text",
    ),
    "a turn that is none": (
        "q.jsonl",
        json.dumps({"messages": ["a", USER]}),
        "whose item 0 is not a turn with role and",
    ),
    "token ids": (
        "q.jsonl",
        '{"prompt": [1, 2]}',
        "row 0 of {} has a prompt column with a list of token ids: give text",
    ),
    "a list of texts": ("q.jsonl", '{"prompt": ["a", "b"]}', "row 0 of {} has a prompt column with a list of texts"),
    "an empty list": (
        "q.jsonl",
        '{"prompt": []}',
        "row 0 of {} has no prompt, instruction or messages column with text",
    ),
    "an answer last in the prompt": (
        "q.jsonl",
        json.dumps({"prompt": [USER, ASSISTANT]}),
        "row 0 of {} has a prompt of messages that end with a turn of role 'assistant'; the last must be the user's",
    ),
    "half of a surrogate pair in a part": (
        "q.jsonl",
        '{"prompt": [{"role": "user", "content": [{"type": "text", "text": "\\ud83d"}]}]}',
        "row 0 of {} holds half of a surrogate pair",
    ),
    "Python's lists in csv": (
        "q.csv",
        "prompt,messages\na,\"[{'role': 'user'}]\"\n",
        "row 0 of {} has a messages column with",
    ),
    "a torn array": (
        "q.jsonl",
        '[{"prompt": "a"},\n{"prompt": "b"}',
        "is not a valid jsonl file: Expecting ',' delimiter",
    ),
    "torn lines in json": ("q.json", '{"prompt": "a"}\n{"prompt": "b', "line 2: Unterminated string"),
    "white space in json": ("q.json", " \n", "is not a valid json file"),
    "the assistant's turn last": (
        "q.jsonl",
        json.dumps({"messages": [USER]}) + "\n" + json.dumps({"messages": [USER, ASSISTANT]}),
        "row 1 of {} has messages that end with a turn of role 'assistant'; the last must be the user's",
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


PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "?", "image": None}]}
ROWS = {
    "messages before a prompt": ({"prompt": "a?", "messages": [USER, ASSISTANT, USER]}, [USER, ASSISTANT, USER]),
    "messages before an instruction": ({"instruction": "b", "input": "c", "messages": [USER]}, "a?"),
    "a prompt beside messages with an answer": ({"prompt": "c", "messages": [USER, ASSISTANT]}, "c"),
    "an instruction beside messages with an answer": ({"instruction": "c", "messages": [USER, ASSISTANT]}, "c"),
    "no messages": ({"prompt": "c", "messages": []}, "c"),
    "a prompt of messages": ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER]),
    "a prompt of messages and its answers": ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]}, "a?"),
    "a prompt and its answers": ({"prompt": "c", "chosen": "d", "rejected": "e"}, "c"),
    "parts in messages": ({"messages": [SYSTEM, PARTS]}, [SYSTEM, USER]),
    "parts in a prompt": ({"prompt": [PARTS]}, "a?"),
    "other columns of a turn": ({"messages": [{**USER, "name": "n", "info": {"k": 1}}]}, "a?"),
}


@pytest.mark.parametrize(("row", "asked"), ROWS.values(), ids=ROWS)
def test_generate_asks_and_score_reads_one_conversation(tmp_path, row, asked):
    """A row of prompts, the row that expo writes of it, and that read as a prompt again."""
    (first,) = prompts_in(tmp_path, "q.jsonl", json.dumps(row))
    assert first.asked(0) == asked
    task, output = find_task("q.jsonl"), tmp_path / "out.jsonl"
    output.write_text(task.write([Answer(first, "b", 1, "stop")], "g"))
    (again,) = load_prompts(find_task(str(output)))
    (read,) = read_conversations(output, task)
    assert again.messages == first.messages
    assert (read.asked, read.messages) == (asked, (*first.messages, ASSISTANT))
    output.write_text(json.dumps({**row, "output": "b"}))
    assert read_conversations(output, task) == [read], "the row itself with an answer"


CELLS = {
    "a conversation": (json.dumps([USER, ASSISTANT, USER]), [USER, ASSISTANT, USER]),
    "nothing": ("", "p"),
    "no list": ("two", "p"),
}


@pytest.mark.parametrize(("cell", "asked"), CELLS.values(), ids=CELLS)
def test_messages_in_a_cell_of_csv(tmp_path, cell, asked):
    content = io.StringIO()
    csv.writer(content).writerows([["prompt", "messages"], ["p", cell]])
    assert prompts_in(tmp_path, "q.csv", content.getvalue())[0].asked(0) == asked


TASKS = {
    "ultrafeedback: the first message": ("ultrafeedback", {"prompt": "p", "messages": [USER, ASSISTANT]}, "a?"),
    "ultrafeedback: the user's, not the system's": ("ultrafeedback", {"messages": [SYSTEM, USER, ASSISTANT]}, "a?"),
    "ultrafeedback: parts": ("ultrafeedback", {"messages": [PARTS, ASSISTANT]}, "a?"),
    "ultrafeedback: a prompt": ("ultrafeedback", {"prompt": "p"}, "p"),
    "ultrafeedback: only the system's": ("ultrafeedback", {"prompt": "p", "messages": [SYSTEM]}, "p"),
    "alpaca": ("alpaca", {"instruction": "p", "prompt": "q", "dataset": "d"}, "p"),
    "alpaca: an empty input": ("alpaca", {"instruction": "p", "input": "", "dataset": "d"}, "p"),
    "alpaca: an input of null": ("alpaca", {"instruction": "p", "input": None}, "p"),
}


@pytest.mark.parametrize(("name", "row", "text"), TASKS.values(), ids=TASKS)
def test_a_tasks_rows_are_asked_and_scored_as_one(tmp_path, name, row, text):
    task, file = find_task(name), tmp_path / "rows.json"
    file.write_text(json.dumps([{**row, "output": "b"}]))
    (prompt,) = load_prompts(task, str(file))
    (read,) = read_conversations(file, task)
    assert prompt.asked(0) == read.asked == text
    file.write_text(task.write([Answer(prompt, "b", 1, "stop")], "g"))
    assert read_conversations(file, task) == [read]


def test_half_of_a_surrogate_pair_in_what_was_asked_is_not_scored(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "output": "b"}\n{"prompt": "\\udc00", "output": "b"}\n')
    with pytest.raises(InputError, match=r"row 1 of .*rows\.jsonl holds half of a surrogate pair"):
        read_conversations(file, find_task("q.jsonl"))


@pytest.mark.parametrize(("name", "column"), [("alpaca", "the instruction"), ("q.jsonl", "a prompt column")])
def test_an_instruction_with_an_input_is_neither_asked_nor_scored(tmp_path, name, column):
    rows = [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "Sum it up", "input": "c", "output": "d"}]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    message = f"row 1 of {file} has both an instruction and an input: combine them in {column}"
    for read in (lambda: load_prompts(find_task(name), str(file)), lambda: read_conversations(file, find_task(name))):
        with pytest.raises(InputError) as caught:
            read()
        assert str(caught.value) == message


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
