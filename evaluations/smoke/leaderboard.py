"""The Open LLM Leaderboard from end to end without a network: the real lm-evaluation-harness and vLLM, tiny models.

Six made tasks of the leaderboard's shapes, answered by DPO, by θ(α) through expo's load format, and by a checkpoint of
θ(α) that is written here. That two of them agree says that the loader is right, in every log-likelihood and text; a
plain computation by transformers says that the harness was asked the right thing; and the scores are counted again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from evaluations import leaderboard, pairs
from evaluations.leaderboard import Run, Suite
from evaluations.results import Result
from evaluations.smoke import leaderboard_tasks
from evaluations.smoke.setting import check, models, without_network

ALPHA = 2.0
TOLERANCE = 1e-3
"""Of a log-likelihood, between vLLM and transformers in float32."""
PLAIN = 2
"""Samples of each task that transformers computes, too."""

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "max_model_len": 1024,
    "max_num_batched_tokens": 1024,
    "enable_chunked_prefill": False,  # what is prefilled in chunks ends the engine on a CPU
}
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}
Samples = Mapping[str, list[dict[str, Any]]]
"""lm-evaluation-harness's task → what it logged of each row."""


def run(output_dir: Path) -> int:
    """Run it, and check what comes out; the exit code.

    Raises:
        MissingExtra: lm-evaluation-harness or vLLM is not installed.
        CheckFailed: A score is not what it must be.
    """
    leaderboard.require_modules()
    folder = (output_dir / "smoke_open_llm_leaderboard").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    trio, suite = models(), leaderboard_tasks.write(folder / "tasks")
    words = ["--sft", str(trio / "tiny-sft"), "--dpo", str(trio / "tiny-dpo"), "--alpha", str(ALPHA)]
    words += ["--model-args", json.dumps(ENGINE), "--output-dir", str(folder)]
    given = leaderboard.parser().parse_args(words)
    pair = pairs.pair_of(given)
    dpo, theta = leaderboard.runs(pair, given, suite)
    written = write_theta(pair, folder)
    checkpoint = dataclasses.replace(theta, name="written", model_args={**dpo.model_args, "pretrained": written})
    with without_network(**SETTINGS, HF_HOME=str(folder / "hub")):
        env = with_distribution(folder / "distribution")
        found = {one.name: _evaluated(one, env) for one in (dpo, theta, checkpoint)}
        again = leaderboard.evaluate(theta, env={})  # an environment in which nothing could run
    check("a finished run is left alone", again == found[theta.name])
    samples = {name: read_samples(one.folder) for name, one in zip(found, (dpo, theta, checkpoint), strict=True)}
    check_all(samples, found, suite, Path(written), (dpo.name, theta.name))
    return pairs.show([found[dpo.name], found[theta.name]], leaderboard.COLUMNS, pair, as_json=False)


def write_theta(pair: pairs.Pair, folder: Path) -> str:
    """Write θ(α) as `expo extrapolate` does; its folder."""
    from expo.config import ExtrapolateConfig
    from expo.verbs import extrapolate

    output = str(folder / "written")
    extrapolate.run(ExtrapolateConfig(sft=pair.sft, dpo=pair.dpo, alpha=(pair.alpha,), output=output, fsync=False))
    return output


def with_distribution(folder: Path) -> dict[str, str]:
    """An environment in which a distribution called vllm is found, for lm-evaluation-harness asks for its version.

    The build for CPUs is called otherwise. vLLM takes itself for that build where its version says so.
    """
    try:
        version("vllm")
    except PackageNotFoundError:
        number = version("vllm-cpu") + "+cpu"
        info = folder / f"vllm-{number}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
    root = Path(__file__).parents[2]
    paths = [str(folder), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _evaluated(one: Run, env: Mapping[str, str]) -> Result:
    found = leaderboard.evaluate(one, env=env)
    assert found is not None  # it is no dry run
    return found


def read_samples(folder: Path) -> Samples:
    """What lm-evaluation-harness logged in the one run that a folder holds."""
    (report,) = leaderboard.result_files(folder)
    moment = report.stem.removeprefix("results_")
    files = report.parent.glob(f"samples_*_{moment}.jsonl")
    return {
        file.stem.removeprefix("samples_").removesuffix(f"_{moment}"): [
            json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()
        ]
        for file in sorted(files)
    }


def check_all(
    samples: Mapping[str, Samples],
    found: Mapping[str, Result],
    suite: Suite,
    written: Path,
    names: tuple[str, str],
) -> None:
    """Check samples and scores.

    Args:
        samples: The samples of DPO, θ(α) and the written checkpoint, by the runs' names.
        found: Their records.
        suite: The tasks.
        written: The checkpoint of θ(α).
        names: DPO's name and that of θ(α).

    Raises:
        CheckFailed: Something does not hold.
    """
    dpo, theta = names
    same = first_difference(samples[theta], samples["written"])
    rows = sum(map(len, samples[theta].values()))
    check(f"θ(α) through the loader equals its written checkpoint, in all of {rows} samples", not same, same)
    other = [task for task in samples[dpo] if samples[dpo][task] != samples[theta][task]]
    check(f"θ(α) answers otherwise than DPO, in {len(other)} of {len(samples[dpo])} tasks", bool(other))
    pairs_of_texts = list(asked(samples["written"]))
    off = max(abs(value - plain) for value, plain in zip(*log_likelihoods(pairs_of_texts, written), strict=True))
    what = f"{len(pairs_of_texts)} log-likelihoods are transformers', within {TOLERANCE}"
    check(f"{what} (the largest difference is {off:.1e})", off < TOLERANCE, off)
    for name in names:
        counted = count_again(samples[name], suite)
        reported = {key: found[name].scores[key] for key in counted}
        close = all(math.isclose(counted[key], reported[key] or 0.0, abs_tol=1e-9) for key in counted)
        check(f"{name}: six scores and two more, counted again from the samples", close, (counted, reported))
        mean = fmean(counted[key] for key in leaderboard.METRICS)
        check(f"{name}: mean of six, {mean:.2f}", math.isclose(mean, found[name].scores["mean"] or 0.0, abs_tol=1e-9))


def first_difference(left: Samples, right: Samples) -> str:
    """Where two runs' samples differ first; empty where they are equal."""
    if left.keys() != right.keys():
        return f"tasks {sorted(left)} and {sorted(right)}"
    for task, rows in left.items():
        for one, other in zip(rows, right[task], strict=True):
            if one != other:
                return f"{task}, row {one['doc_id']}: {one['resps']} and {other['resps']}"
    return ""


def asked(samples: Samples) -> list[tuple[str, str, float]]:
    """Context, continuation and log-likelihood of some samples of each task that has them."""
    found = []
    for rows in samples.values():
        for row in rows[:PLAIN]:
            for (_, one), (response,) in zip(sorted(row["arguments"].items()), row["resps"], strict=True):
                if not isinstance(response, str):
                    found.append((one["arg_0"], one["arg_1"], float(response[0])))
    return found


def log_likelihoods(texts: list[tuple[str, str, float]], checkpoint: Path) -> tuple[list[float], list[float]]:
    """What the harness found, and what plain transformers finds in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    plain = []
    for context, continuation, _ in texts:
        ids = tokenizer(context + continuation, return_tensors="pt").input_ids  # (1, T)
        start = len(tokenizer(context).input_ids)
        with torch.inference_mode():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)  # (T - 1, vocabulary)
        plain.append(float(log_probs.gather(-1, ids[0, 1:, None])[start - 1 :].sum()))
    return [value for *_, value in texts], plain


def count_again(samples: Samples, suite: Suite) -> dict[str, float]:
    """The scores in %, from log-likelihoods, texts and rows alone."""
    named = {key: samples.get(task, []) for key, task in suite.tasks.items()}
    subjects = [samples[subject] for subject in leaderboard_tasks.SUBJECTS]
    texts = {row["doc_id"]: row for row in named["gsm8k"]}.values()  # each is there once for each filter
    return {
        "arc_challenge": _percent(_normalised, named["arc_challenge"]),
        "hellaswag": _percent(_normalised, named["hellaswag"]),
        "truthfulqa_mc2": _percent(_true_mass, named["truthfulqa_mc2"]),
        "mmlu": fmean(_percent(_likeliest, rows) for rows in subjects),
        "winogrande": _percent(_gap, named["winogrande"]),
        "gsm8k": _percent(lambda row: _found(leaderboard_tasks.FIRST, 0, row), texts),
        "gsm8k_flexible": _percent(lambda row: _found(leaderboard_tasks.LAST, -1, row), texts),
        "mmlu_by_question": _percent(_likeliest, [row for rows in subjects for row in rows]),
    }


Row = dict[str, Any]


def _percent(score: Callable[[Row], float], rows: Any) -> float:  # noqa: ANN401 - an iterable of rows
    return 100 * fmean(map(score, rows))


def _values(row: Row) -> list[float]:
    return [float(response[0]) for (response,) in row["resps"]]


def _largest(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _likeliest(row: Row) -> float:
    return float(_largest(_values(row)) == row["doc"]["label"])


def _normalised(row: Row) -> float:
    lengths = map(len, row["doc"]["choices"])
    return float(
        _largest([one / length for one, length in zip(_values(row), lengths, strict=True)]) == row["doc"]["label"]
    )


def _true_mass(row: Row) -> float:
    masses = [math.exp(value) for value in _values(row)]
    labels = row["doc"]["mc2_targets"]["labels"]
    return sum(mass for mass, label in zip(masses, labels, strict=True) if label) / sum(masses)


def _gap(row: Row) -> float:
    return float(str(1 + _largest(_values(row))) == row["doc"]["answer"])


def _found(pattern: str, which: int, row: Row) -> float:
    found = re.findall(pattern, row["resps"][0][0])
    return float(bool(found) and found[which] == row["doc"]["thing"])
