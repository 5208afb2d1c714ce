"""The table of tasks. To add one, write its functions in a module of this folder and add one line to `TASKS`."""

from __future__ import annotations

from pathlib import Path

from expo.errors import InputError
from expo.tasks import mtbench, single
from expo.tasks.files import SUFFIXES
from expo.tasks.prompts import Source, Task

TASKS = {
    "ultrafeedback": Task(
        "ultrafeedback",
        Source("HuggingFaceH4/ultrafeedback_binarized", "test_gen"),
        ".jsonl",
        single.read_ultrafeedback,
        single.write_jsonl,
        single.outputs,
    ),
    "alpaca": Task(
        "alpaca",
        Source("tatsu-lab/alpaca_eval", "eval", file="alpaca_eval.json"),
        ".json",
        single.read_alpaca,
        single.write_alpaca,
        single.outputs,
    ),
    "mtbench": Task(
        "mtbench",
        # FastChat's own copy: FastChat's judge finds questions by the ids in this file.
        Source("lmsys/mt-bench", file="data/mt_bench/question.jsonl", kind="space"),
        ".jsonl",
        mtbench.read,
        mtbench.write,
        mtbench.outputs,
        temperatures=mtbench.TEMPERATURES,
        by_id=True,
    ),
}


def find_task(name: str) -> Task:
    """The task of that name, or the one a prompt file makes.

    Raises:
        InputError: Neither, or a file whose outputs would lie among those of a task.
    """
    if name in TASKS:
        return TASKS[name]
    path = Path(name)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"no task {name!r}: give {', '.join(TASKS)}, or a {'/'.join(SUFFIXES)} file of prompts")
    if path.stem in TASKS:
        raise InputError(
            f"outputs of {name} would lie among those of the task {path.stem}: rename the file, or use "
            f"`{path.stem} --dataset {name}`"
        )
    return Task(path.stem, path, ".jsonl", single.read_file_row, single.write_jsonl, single.outputs)
