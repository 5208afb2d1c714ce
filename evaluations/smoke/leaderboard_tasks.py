"""Six tasks for lm-evaluation-harness that mirror the leaderboard's, made from the demo's small talk: JSON and YAML.

Each has the shape of its model: few shots from a train split, `acc_norm`, the probability mass of `mc2`, a group of
subjects of different sizes, two contexts and one ending, text that is generated and searched for what was asked.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo import task
from evaluations.leaderboard import METRICS, Suite

GROUP = "made_leaderboard"
ROWS = 12
SHOTS = 8
"""Rows of the train splits."""
SUBJECTS = {"made_things": 10, "made_places": 5}
"""Of mmlu's mirror, with their rows."""

MODULE = """from lm_eval.tasks.truthfulqa.utils import process_results_mc2
from lm_eval.tasks.winogrande.preprocess_winogrande import doc_to_choice, doc_to_target, doc_to_text
"""
"""The leaderboard's own functions, as YAML's `!function` finds them."""

ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
ACC_NORM = {**ACC, "metric": "acc_norm"}
Rows = list[dict[str, Any]]


def write(folder: Path) -> Suite:
    """Write the tasks into a new folder."""
    folder.mkdir(parents=True)
    (folder / "functions.py").write_text(MODULE)
    tasks = {key: f"made_{key}" for key in METRICS}
    _task(folder, tasks["arc_challenge"], _choices(ROWS, 1), _choices(SHOTS, 2), metric_list=[ACC, ACC_NORM])
    _task(folder, tasks["hellaswag"], _choices(ROWS, 3), _choices(SHOTS, 4), metric_list=[ACC, ACC_NORM])
    _task(
        folder,
        tasks["truthfulqa_mc2"],
        [{**row, "mc2_targets": {"labels": [1, 0, 1, 0]}} for row in _choices(ROWS, 5)],
        doc_to_target=0,
        process_results="!function functions.process_results_mc2",
    )
    for number, (subject, rows) in enumerate(SUBJECTS.items()):
        few = {"fewshot_config": {"sampler": "first_n"}}
        _task(folder, subject, _facts(rows, 6 + number), _facts(SHOTS, 8 + number), **few)
    _write_yaml(folder, {"group": tasks["mmlu"], "task": list(SUBJECTS), "aggregate_metric_list": [MEAN]})
    _task(
        folder,
        tasks["winogrande"],
        _gaps(ROWS, 10),
        _gaps(SHOTS, 11),
        **{key: f"!function functions.{key}" for key in ("doc_to_text", "doc_to_target", "doc_to_choice")},
    )
    _task(folder, tasks["gsm8k"], _asked(ROWS, 12), _asked(SHOTS, 13), **GENERATED)
    shots = {"arc_challenge": 3, "hellaswag": 2, "truthfulqa_mc2": 0, "mmlu": 2, "winogrande": 2, "gsm8k": 2}
    kinds = {"mmlu": "group"}
    members = [{kinds.get(key, "task"): tasks[key], "num_fewshot": number} for key, number in shots.items()]
    _write_yaml(folder, {"group": GROUP, "task": members})
    return Suite(folder, GROUP, tasks)


MEAN = {"metric": "acc", "weight_by_size": True}
EXACT = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "regexes_to_ignore": [" is$"]}
FIRST, LAST = r"^ ?(\w+) is", r"(?:^|the) ?(\w+) is"
"""What is searched for in a text: the thing that it begins with (`strict-match`), and the last that it speaks of."""
REGEXES: dict[str, dict[str, Any]] = {
    "strict-match": {"regex_pattern": FIRST},
    "flexible-extract": {"regex_pattern": LAST, "group_select": -1},
}
GENERATED = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}} the",
    "doc_to_choice": None,
    "doc_to_target": "{{thing}} is",
    "generation_kwargs": {"until": ["?", "</s>"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 24},
    "metric_list": [EXACT],
    "filter_list": [
        {"name": name, "filter": [{"function": "regex", **regex}, {"function": "take_first"}]}
        for name, regex in REGEXES.items()
    ],
}


def _task(folder: Path, name: str, rows: Rows, train: Sequence[dict[str, Any]] = (), **more: object) -> None:
    """A multiple-choice task, unless `more` says another thing; None takes a key out."""
    files = {"test": rows, **({"train": train} if train else {})}
    paths = {split: str((folder / f"{name}_{split}.json").resolve()) for split in files}
    for split, content in files.items():
        Path(paths[split]).write_text(json.dumps(content))
    config: dict[str, object] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": paths},
        "output_type": "multiple_choice",
        **({"training_split": "train", "fewshot_split": "train"} if train else {}),
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [ACC],
        "metadata": {"version": 1.0},
        **more,
    }
    _write_yaml(folder, {key: value for key, value in config.items() if value is not None})


def _write_yaml(folder: Path, config: dict[str, Any]) -> None:
    """JSON is YAML, but for the tag that names a function."""
    name = config.get("task") if "group" not in config else config["group"]
    lines = [f"{key}: {_yaml(value)}" for key, value in config.items()]
    (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")


def _yaml(value: object) -> str:
    return value if isinstance(value, str) and value.startswith("!function ") else json.dumps(value)


def _choices(rows: int, seed: int) -> Rows:
    """A question and four answers; the best is the one about the thing that was asked."""
    rng = random.Random(seed)
    found: Rows = []
    for question in task.prompts(rows, seed):
        choices = [task.write_answer(question, rng) for _ in range(4)]
        best = max(range(4), key=lambda one: task.quality(question, choices[one]))
        found.append({"question": question, "choices": choices, "label": best})
    return found


def _facts(rows: int, seed: int) -> Rows:
    """A question, and the same said of four things; right is the one that was asked about."""
    rng = random.Random(seed)
    found: Rows = []
    for question in task.prompts(rows, seed):
        asked, trait = task.asked_thing(question), rng.choice(task.TRAITS)
        things = [asked, *rng.sample([one for one in task.THINGS if one != asked], 3)]
        rng.shuffle(things)
        choices = [f"the {thing} is {trait} ." for thing in things]
        found.append({"question": question, "choices": choices, "label": things.index(asked)})
    return found


def _gaps(rows: int, seed: int) -> Rows:
    """A sentence with a gap and two words for it, as winogrande has them."""
    rng = random.Random(seed)
    found: Rows = []
    for row in range(rows):
        right, wrong = rng.sample(task.THINGS, 2)
        options = [right, wrong] if row % 2 else [wrong, right]
        sentence = f"tell me about the {right} in the {rng.choice(task.PLACES)} the _ is {rng.choice(task.TRAITS)} ."
        found.append({"sentence": sentence, "option1": options[0], "option2": options[1], "answer": "12"[1 - row % 2]})
    return found


def _asked(rows: int, seed: int) -> Rows:
    """A question, and the thing that it asks about."""
    return [{"question": one, "thing": task.asked_thing(one)} for one in task.prompts(rows, seed)]
