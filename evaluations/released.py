"""What the paper's authors released of their evaluations, read from a folder; the tables are in `tables.py`.

The folder is a clone of chujiezheng/LLM-Extrapolation, or one with `alpaca_eval/`, `mt_bench/` and `lm_eval/`. To read
another layout, add its folder to `FOLDERS`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from expo.errors import InputError
from expo.files import name_problem, read_json, read_rows, repeated, shown

REPOSITORY = "https://github.com/chujiezheng/LLM-Extrapolation"

FOLDERS = {
    "alpaca_eval": ("alpaca_eval", "results_alpaca"),
    "mt_bench": ("mt_bench/model_answer", "results_mtbench/mt_bench/model_answer"),
    "lm_eval": ("lm_eval", "results_lmeval"),
}
"""Where each evaluation lies; the last name is the repository's."""

MMLU_SUBJECTS = 57


@dataclass(frozen=True)
class HarnessTask:
    """One of the six tasks of the Open LLM Leaderboard, in the file that lm-evaluation-harness before 0.4 wrote."""

    file: str
    heading: str
    result: str
    """The task's name under `results`; for MMLU, the plain mean of its subjects, how their names begin."""
    metric: str
    shots: int

    @property
    def subjects(self) -> int:
        """How many results the score is the mean of."""
        return MMLU_SUBJECTS if self.file == "mmlu" else 1


HARNESS = (
    HarnessTask("arc", "ARC", "arc_challenge", "acc_norm", 25),
    HarnessTask("hellaswag", "HellaSwag", "hellaswag", "acc_norm", 10),
    HarnessTask("truthfulqa", "TruthfulQA", "truthfulqa_mc", "mc2", 0),
    HarnessTask("mmlu", "MMLU", "hendrycksTest-", "acc", 5),
    HarnessTask("winogrande", "Winogrande", "winogrande", "acc", 5),
    HarnessTask("gsm8k", "GSM8K", "gsm8k", "acc", 5),
)


@dataclass(frozen=True)
class AlpacaScores:
    """One model on AlpacaEval 2.0."""

    win_rate: float
    """In percent."""
    length_controlled: float
    """In percent."""
    length: int
    """Mean characters of an output, as the leaderboard has it."""
    recomputed_length: int | None
    """The same from the outputs; None where they are not there."""
    judged_win_rate: float | None
    """The win rate in percent from the judge's own verdicts; None where they are not there."""


@dataclass(frozen=True)
class HarnessScores:
    """One model on the Open LLM Leaderboard."""

    scores: Mapping[str, float]
    """In percent, by file."""
    remarks: tuple[str, ...]
    """What is missing, and settings that are not the leaderboard's."""

    @property
    def mean(self) -> float | None:
        """The mean of the six tasks in percent; None where one is missing."""
        return math.fsum(self.scores.values()) / len(HARNESS) if len(self.scores) == len(HARNESS) else None


@dataclass(frozen=True)
class Answers:
    """One model's answers to MT-Bench."""

    file: Path
    questions: int
    lengths: tuple[float, ...]
    """Mean characters of an answer, by turn."""


def find(root: Path) -> dict[str, Path]:
    """The folders of the evaluations that are there.

    Raises:
        InputError: There is none.
    """
    if not root.is_dir():
        raise InputError(f"no such folder: {root}; get the files with `git clone {REPOSITORY}`")
    known = {name: [root / folder for folder in folders] for name, folders in FOLDERS.items()}
    found = {name: next((one for one in places if one.is_dir()), None) for name, places in known.items()}
    if not any(found.values()):
        names = ", ".join(f"{folders[-1]}/ or {folders[0]}/" for folders in FOLDERS.values())
        raise InputError(f"{root} has none of {names}; get them with `git clone {REPOSITORY}`")
    return {name: folder for name, folder in found.items() if folder is not None}


# --- AlpacaEval ----------------------------------------------------------------------------------------------------


def alpaca_eval(folder: Path, wanted: Collection[str]) -> dict[str, AlpacaScores]:
    """Those of some models that a folder's `leaderboard.csv` has; of others nothing is read.

    Raises:
        InputError: That file is missing or has none of them, a model is there twice, or a file is not what its name
            says.
    """
    file = folder / "leaderboard.csv"
    if not file.exists():
        raise InputError(f"{file} is missing; copy results_alpaca/leaderboard.csv from {REPOSITORY}")
    rows = [row for row in read_rows(file) if row.get("") in wanted]
    if not rows:
        raise InputError(f"{file} has none of the paper's models: the first column should name them")
    if (twice := repeated(str(row[""]) for row in rows)) is not None:
        raise InputError(f"{file} has {shown(twice)} more than once")
    return {str(row[""]): _alpaca_scores(file, row) for row in rows}


def _alpaca_scores(file: Path, row: Mapping[str, Any]) -> AlpacaScores:
    name = str(row.get(""))

    def number(column: str, highest: float = math.inf) -> float:
        try:
            value = float(row[column])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file}: {column} of {shown(name)} is no number: {shown(row.get(column))}") from error
        if not (math.isfinite(value) and 0 <= value <= highest):
            which = "0 or more" if highest == math.inf else f"from 0 to {highest:g}"
            raise InputError(f"{file}: {column} of {shown(name)} should be {which}, not {shown(row[column])}")
        return value

    return AlpacaScores(
        win_rate=number("win_rate", 100),
        length_controlled=number("length_controlled_winrate", 100),
        length=int(number("avg_length")),
        recomputed_length=_mean_length(file.with_name(f"{name}.json")),
        judged_win_rate=_judged_win_rate(file.parent / name / "annotations.json"),
    )


def _mean_length(file: Path) -> int | None:
    """The mean characters of the outputs in a file, cut to an integer as `alpaca_eval.main` cuts it."""
    if not file.exists():
        return None
    outputs = [row.get("output") for row in read_rows(file)]
    lengths = [len(output) for output in outputs if isinstance(output, str)]
    if not lengths or len(lengths) < len(outputs):
        raise InputError(f"{file} has rows without an `output`: it is not what `alpaca_eval --model_outputs` takes")
    return int(sum(lengths) / len(lengths))


def _judged_win_rate(file: Path) -> float | None:
    """The win rate in percent from `annotations.json`, as alpaca_eval counts.

    A preference lies between 1 (the reference is better) and 2 (the model is); 0 is a draw; others do not count.
    """
    if not file.exists():
        return None
    preferences = [row.get("preference") for row in read_rows(file)]
    numbers = [one or 1.5 for one in preferences if isinstance(one, int | float) and (one == 0 or 1 <= one <= 2)]
    if not numbers:
        raise InputError(f"{file} has no `preference`: it is not what alpaca_eval writes as annotations.json")
    return 100 * (math.fsum(numbers) / len(numbers) - 1)


# --- the Open LLM Leaderboard --------------------------------------------------------------------------------------


def lm_eval(folder: Path) -> dict[str, HarnessScores]:
    """The models that have a folder of their own with something in it, by name; hidden folders are none.

    Raises:
        InputError: There is none, or a file or folder is not what its name says.
    """
    folders = [one for one in sorted(folder.iterdir()) if one.is_dir() and not one.name.startswith(".")]
    models = {one.name: _harness_scores(_named(one)) for one in folders if any(one.glob("*.json"))}
    if not models:
        raise InputError(f"{folder} has no folder of a model with its files; copy results_lmeval from {REPOSITORY}")
    return models


def _named(path: Path) -> Path:
    """A path whose name is a model's.

    Raises:
        InputError: It cannot be one, nor stand in a table.
    """
    if (problem := name_problem(path.name)) is not None:
        raise InputError(f"{path.parent} has {shown(path.name)}, a name that {problem}")
    return path


def _harness_scores(folder: Path) -> HarnessScores:
    scores: dict[str, float] = {}
    remarks = []
    for task in HARNESS:
        file = folder / f"{task.file}.json"
        if not file.exists():
            place = f"results_lmeval/{folder.name}/{file.name}"
            remarks.append(f"{folder.name}: {file.name} is missing; copy {place} from {REPOSITORY}")
            continue
        content = read_json(file)
        scores[task.file] = _score(file, task, content)
        remarks += _unusual(f"{folder.name}: {file.name}", task, content)
    return HarnessScores(MappingProxyType(scores), tuple(remarks))


def _score(file: Path, task: HarnessTask, content: Mapping[str, Any]) -> float:
    """A task's score in percent."""
    results = content.get("results")
    names = [name for name in results if name.startswith(task.result)] if isinstance(results, dict) else []
    if len(names) != task.subjects:
        what = f"{task.subjects} results {task.result}*" if task.subjects > 1 else f"a result {task.result}"
        raise InputError(f"{file} should have {what}, and has {len(names)}: it is not that task's file of the harness")
    values = [_metric(file, task.metric, name, content["results"][name]) for name in names]
    return 100 * math.fsum(values) / len(values)


def _metric(file: Path, metric: str, name: str, result: object) -> float:
    value = result.get(metric) if isinstance(result, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"{file}: {metric} of {name} should be between 0 and 1, not {shown(value)}")
    return value


def _unusual(which: str, task: HarnessTask, content: Mapping[str, Any]) -> list[str]:
    """Settings in a file that are not the leaderboard's."""
    config = content.get("config")
    if not isinstance(config, dict):
        return [f"{which} does not say its settings"]
    shots, limit = config.get("num_fewshot"), config.get("limit")
    return [
        *([f"{which} has {shown(shots)} examples in the prompt, the leaderboard {task.shots}"] * (shots != task.shots)),
        *([f"{which} has only the first {shown(limit)} questions"] * (limit is not None)),
    ]


# --- MT-Bench ------------------------------------------------------------------------------------------------------


def mt_bench(folder: Path) -> dict[str, Answers]:
    """The models of which a folder has answers, by name.

    Raises:
        InputError: A file is not what its name says.
    """
    files = sorted(file for file in folder.glob("*.jsonl") if not file.name.startswith("."))
    return {file.stem: _answers(_named(file)) for file in files}


def _answers(file: Path) -> Answers:
    rows = read_rows(file)
    turns = [_turns(file, number, row) for number, row in enumerate(rows)]
    by_turn = list(zip(*turns, strict=False))
    if not by_turn or any(len(one) != len(by_turn) for one in turns):
        raise InputError(f"{file} should have a row for every question, and the same number of turns in all")
    return Answers(file, len(rows), tuple(sum(map(len, one)) / len(one) for one in by_turn))


def _turns(file: Path, number: int, row: Mapping[str, Any]) -> list[str]:
    try:
        turns = row["choices"][0]["turns"]
    except (KeyError, IndexError, TypeError):
        turns = None
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise InputError(f"{file}: row {number} has no choices[0].turns: it is not a FastChat file of answers")
    return turns
