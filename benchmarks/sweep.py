"""What `expo sweep` costs beside the paper's way, and beside bare generation and scoring; and the curve it finds.

`trio` measures, in turn, with answers of 64 prompts at six α (0 and the paper's five candidates):

- `expo sweep`, with the switch between α proved in it (`EXPO_CACHE` is empty), and with that known, as after the first
  time,
- the paper's way: for each α `expo extrapolate` (none for 0, which is DPO, and −1, which is SFT), `expo generate
  --model` and `expo score`, one process after the other,
- bare generation and scoring of the same rows, one α after the other on all cores: without expo, in a process with
  vLLM on the written checkpoint of each α, and in one with the reward model in the engine and in the batches that
  the sweep had. Only generating and scoring is timed, after a request that warms the engine; and, by itself, the start
  of each process, until its engine is ready.

`large` measures the same with random models of 1.0 billion parameters, which it makes, and three α. `curve` is a sweep
of all held-out prompts with many samples; of the paper's way one α is measured and the others are taken to cost
as much (generating by the token, the rest by the α), or with `--whole-paper` all are measured.

Answers of the sweep, of the paper's way and of bare vLLM have to be equal, or the benchmark fails. Every figure is
appended to figures.jsonl in --work, and the tables are printed anew after each round.

    python benchmarks/sweep.py trio large curve --work /tmp/expo-sweep --picture sweep.png
    python benchmarks/sweep.py trio --work /tmp/expo-sweep --engine transformers    # generating as expo's files tell it
    python benchmarks/sweep.py trio --work /tmp/expo-sweep --rounds 1 --limit 4 --max-tokens 8 --alpha 0.5
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

from extrapolate import ratio
from score import make_large
from switch import make_pair

from expo.cli.program import PROCESS_ENVIRONMENT
from expo.config import GenerateConfig, ScoreConfig
from expo.engines import vllm as vllm_engine, vllm_reward
from expo.engines.batches import tight_batches
from expo.engines.torch_tools import visible_gpus
from expo.engines.transformers_reward import CPU_BATCH_TOKENS
from expo.theta.names import theta_name
from expo.verbs import generate, score

SHARED = Path(__file__).resolve().parents[2] / "shared" / "models"
KINDS: dict[str, dict[str, Any]] = {
    "trio": {"limit": 64, "max_tokens": 96, "n": 1, "alpha": [0.1, 0.2, 0.3, 0.4, 0.5], "rounds": 3},
    "large": {"limit": 4, "max_tokens": 16, "n": 1, "alpha": [0.25, 0.5], "rounds": 1},
    "curve": {"limit": 105, "max_tokens": 112, "n": 16, "alpha": [-1.0, 0.5, 1.0, 1.5, 2.0, 3.0], "rounds": 1},
}
LARGE = {"vocab_size": 2048, "num_hidden_layers": 23}
"""So that every token that is generated is one of the tokenizer's, and there are still 1.0 billion parameters."""
LARGE_BYTES = 12 * 10**9
"""Disk: three models, a checkpoint per α, and one of the paper's way."""

PROCESS = {
    **PROCESS_ENVIRONMENT,
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Of every way alike; what is set already stays."""
BARE_ON_CPU = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""As expo sets them."""

GENERATE = """
import json, sys, time

def main():
    task, result = json.load(open(sys.argv[1])), sys.argv[2]
    from vllm import LLM, SamplingParams

    llm = LLM(**task["arguments"])
    ready = time.time()
    llm.generate([{"prompt_token_ids": [5] * 8}], SamplingParams(max_tokens=1), use_tqdm=False)
    prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
    params = [SamplingParams(**one) for one in task["params"]]
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    rows = [list(one.outputs[0].token_ids) for one in outputs]
    json.dump({"ready": ready, "seconds": seconds, "rows": rows}, open(result, "w"))

if __name__ == "__main__":
    main()
"""

SCORE = """
import json, sys, time

def main():
    task, result = json.load(open(sys.argv[1])), sys.argv[2]
    take = with_vllm(task) if "arguments" in task else with_transformers(task)
    ready = time.time()
    take([[5] * 8], [[0]])
    seconds, rewards = 0.0, []
    for rows, batches in zip(task["rows"], task["batches"]):
        started = time.perf_counter()
        rewards.append(take(rows, batches))
        seconds += time.perf_counter() - started
    json.dump({"ready": ready, "seconds": seconds, "rewards": rewards}, open(result, "w"))

def with_vllm(task):
    from vllm import LLM

    llm = LLM(**task["arguments"])

    def take(rows, _):
        outputs = llm.classify([{"prompt_token_ids": ids} for ids in rows], use_tqdm=False)
        return [one.outputs.probs[0] for one in outputs]
    return take

def with_transformers(task):
    import torch
    from transformers import AutoModelForSequenceClassification

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForSequenceClassification.from_pretrained(task["model"], dtype=task["dtype"]).to(device).eval()
    model.config.pad_token_id = pad = model.config.pad_token_id or 0

    def take(rows, batches):
        rewards = [0.0] * len(rows)
        for batch in batches:
            width = max(len(rows[number]) for number in batch)
            ids = torch.tensor([rows[number] + [pad] * (width - len(rows[number])) for number in batch])
            mask = torch.tensor([[1] * len(rows[number]) + [0] * (width - len(rows[number])) for number in batch])
            with torch.inference_mode():
                logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            for number, reward in zip(batch, logits[:, 0].tolist()):
                rewards[number] = reward
        return rewards
    return take

if __name__ == "__main__":
    main()
"""

Figures = dict[str, float]
"""What one measured run took: seconds, by name."""


@dataclass(frozen=True)
class Took:
    """One process."""

    wall_s: float
    cpu_s: float
    """Of it and of all that it started."""
    began: float
    """Seconds since the epoch."""
    said: str


@dataclass(frozen=True)
class Case:
    """What is measured: models, prompts, settings, and a folder for all that is written."""

    kind: str
    work: Path
    sft: Path
    dpo: Path
    reward_model: Path
    alphas: tuple[float, ...]
    """All that are made, 0 included."""
    asked: argparse.Namespace

    @property
    def prompts(self) -> Path:
        """The task of every command."""
        return self.work / "prompts.jsonl"

    @property
    def swept(self) -> Path:
        """The sweep's folder."""
        return self.work / "sweep"

    def rows(self, folder: Path, name: str, kind: str = "outputs") -> list[Any]:
        """The rows of an output, or of its rewards."""
        file = folder / f"{kind}_{self.prompts.stem}" / f"{name}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    def meta(self, folder: Path, name: str, kind: str) -> dict[str, Any]:
        """A meta file."""
        found: dict[str, Any] = json.loads((folder / f"{kind}_{self.prompts.stem}" / f"{name}.meta.json").read_text())
        return found

    def name(self, alpha: float) -> str:
        """What the sweep calls an α's answers."""
        return theta_name(self.dpo.name, alpha)

    def generating(self) -> dict[str, Any]:
        """The settings of generating, for every way."""
        asked = self.asked
        return {"engine": asked.engine, "dtype": asked.dtype, "n": asked.n, "max_tokens": asked.max_tokens}

    def scoring(self) -> dict[str, Any]:
        """The settings of scoring, for every way."""
        return {"engine": self.asked.reward_engine, "dtype": self.asked.reward_dtype}

    def process(self, *command: object, env: dict[str, str] | None = None) -> Took:
        """Run a process to its end.

        Raises:
            SystemExit: It fails.
        """
        words = [sys.executable, *map(str, command)]
        files = [self.work / "stdout", self.work / "stderr"]
        with files[0].open("wb") as out, files[1].open("wb") as err:
            began, clock = time.time(), time.perf_counter()
            running = Popen(words, stdout=out, stderr=err, env={**PROCESS, **os.environ, **(env or {})})
            try:
                _, status, used = os.wait4(running.pid, 0)
            except BaseException:
                running.terminate()
                running.wait()
                raise
            wall_s = time.perf_counter() - clock
        running.returncode = os.waitstatus_to_exitcode(status)
        if running.returncode:
            sys.exit(f"{shlex.join(words)} failed:\n{files[1].read_text()}")
        return Took(wall_s, used.ru_utime + used.ru_stime, began, files[0].read_text())


def flags(prefix: str = "", **settings: object) -> list[object]:
    """Settings as options."""
    return [word for name, value in settings.items() for word in (f"--{prefix}{name}".replace("_", "-"), value)]


def say(line: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


# --- the ways -----------------------------------------------------------------------------------------------------


def sweep(case: Case) -> Figures:
    """`expo sweep`, with whatever is known of the switch."""
    took, phases = run_sweep(case)
    return {"wall": took.wall_s, "cpu": took.cpu_s, **phases}


def sweep_unproved(case: Case) -> Figures:
    """`expo sweep` where nothing is known of the switch."""
    shutil.rmtree(case.work / "cache", ignore_errors=True)
    return sweep(case)


def run_sweep(case: Case) -> tuple[Took, Figures]:
    """The process, and its seconds before its first token, until its last reward, and after."""
    shutil.rmtree(case.swept, ignore_errors=True)
    alphas = [f"--alpha={alpha!r}" for alpha in case.alphas if alpha]
    sides = flags(sft=case.sft, dpo=case.dpo, reward_model=case.reward_model, task=case.prompts, output=case.swept)
    settings = [*flags(**case.generating()), *flags("reward-", **case.scoring())]
    cache = {"EXPO_CACHE": str(case.work / "cache")}
    took = case.process("-m", "expo", "sweep", *sides, *alphas, *settings, "--any-pair", env=cache)
    stem = case.prompts.stem
    rewarded = [file.stat().st_mtime for file in (case.swept / f"rewards_{stem}").glob("*.meta.json")]
    first = min((case.swept / f"outputs_{stem}").glob("*.meta.json"), key=lambda file: file.stat().st_mtime)
    begin = first.stat().st_mtime - json.loads(first.read_text())["generate_seconds"]
    metas = [case.meta(case.swept, case.name(alpha), "outputs") for alpha in case.alphas]
    scored = [case.meta(case.swept, case.name(alpha), "rewards") for alpha in case.alphas]
    return took, {
        "before the first token": begin - took.began,
        "generating and scoring": max(rewarded) - begin,
        "after the last reward": took.began + took.wall_s - max(rewarded),
        "its own generate_seconds": sum(meta["generate_seconds"] for meta in metas),
        "its own score_seconds": sum(meta["score_seconds"] for meta in scored),
    }


def paper(case: Case) -> Figures:
    """The paper's way with every α."""
    return sum_up(paper_at(case, alpha) for alpha in case.alphas)


def paper_at(case: Case, alpha: float) -> Figures:
    """The paper's way with one α; its answers are compared with the sweep's."""
    folder, theta, name = case.work / "paper", case.work / "theta", f"a{alpha!r}"
    parts: dict[str, Took] = {}
    model = {0.0: case.dpo, -1.0: case.sft}.get(alpha)
    if model is None:
        sides = flags(sft=case.sft, dpo=case.dpo, output=theta)
        parts["extrapolate"] = case.process("-m", "expo", "extrapolate", *sides, f"--alpha={alpha!r}")
    where = flags(name=name, output_dir=folder)
    settings = flags(model=model or theta, seed_mode="row", **case.generating())
    parts["generate"] = case.process("-m", "expo", "generate", case.prompts, *where, *settings)
    settings = flags(reward_model=case.reward_model, **case.scoring())
    parts["score"] = case.process("-m", "expo", "score", case.prompts, *where, *settings)
    require_equal(case, alpha, "the paper's way", case.rows(folder, name))
    ours, theirs = case.rows(case.swept, case.name(alpha), "rewards"), case.rows(folder, name, "rewards")
    found = {
        "wall": sum(part.wall_s for part in parts.values()),
        "cpu": sum(part.cpu_s for part in parts.values()),
        **{name: parts[name].wall_s if name in parts else 0.0 for name in ("extrapolate", "generate", "score")},
        "its own generate_seconds": case.meta(folder, name, "outputs")["generate_seconds"],
        "its own score_seconds": case.meta(folder, name, "rewards")["score_seconds"],
        "rewards differ by": max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
    }
    shutil.rmtree(folder)
    shutil.rmtree(theta, ignore_errors=True)
    return found


def bare(case: Case) -> Figures:
    """Generating and scoring alone."""
    reward = bare_scoring(case)
    if case.asked.engine != "vllm":
        return reward
    policies = [bare_generating(case, alpha) for alpha in case.alphas]
    start = statistics.median(one.pop("start the policy") for one in policies)
    return {**sum_up(policies), "start the policy": start, **reward}


def bare_generating(case: Case, alpha: float) -> Figures:
    """Bare vLLM on a checkpoint of this α, with the arguments and the requests of the sweep."""
    model = checkpoint(case, alpha)
    settings = {"task": str(case.prompts), "output_dir": str(case.work), "seed_mode": "row", **case.generating()}
    job = generate.plan(GenerateConfig(**settings, model=str(model)))
    keys = ("top_k", "top_p", "presence_penalty", "frequency_penalty")
    common = {key: getattr(job.config, key) for key in keys} | {"stop_token_ids": job.setup.stop_ids}
    params = [
        {**common, "temperature": one.temperature, "seed": one.seed, "max_tokens": one.max_tokens, "detokenize": False}
        for one in job.requests
    ]
    task = {
        "arguments": vllm_engine.engine_arguments(job.setup),
        "prompts": [one.prompt_ids for one in job.requests],
        "params": params,
    }
    found, start = bare_process(case, GENERATE, task)
    stops = set(job.setup.stop_ids)
    texts = [job.model.decode(ids[:-1] if ids and ids[-1] in stops else ids) for ids in found["rows"]]
    rows = zip(found["rows"], texts, strict=True)
    require_equal(case, alpha, "bare vLLM", [{"output": text, "length": len(ids)} for ids, text in rows])
    return {"generate": found["seconds"], "start the policy": start}


def bare_scoring(case: Case) -> Figures:
    """The bare reward model on the sweep's answers."""
    settings = {"task": str(case.prompts), "output_dir": str(case.swept), **case.scoring()}
    jobs = [
        score.plan(ScoreConfig(**settings, reward_model=(str(case.reward_model),), name=case.name(alpha)))
        for alpha in case.alphas
    ]
    rows = [[row.token_ids for row in job.rows] for job in jobs]
    config = jobs[0].config
    budget = config.batch_tokens if visible_gpus() else min(config.batch_tokens, CPU_BATCH_TOKENS)
    task = {
        "rows": rows,
        "batches": [tight_batches([len(row) for row in some], budget) for some in rows],
        "model": str(case.reward_model),
        "dtype": config.dtype,
    }
    if jobs[0].engine == "vllm":
        longest = max(jobs, key=lambda job: job.setup.context_length)
        task["arguments"] = vllm_reward.engine_arguments(longest.setup)
    found, start = bare_process(case, SCORE, task)
    ours = [reward for alpha in case.alphas for reward in case.rows(case.swept, case.name(alpha), "rewards")]
    theirs = [reward for some in found["rewards"] for reward in some]
    apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return {"score": found["seconds"], "start the reward model": start, "rewards differ by": apart}


def bare_process(case: Case, script: str, task: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """What a script found, and the seconds from the start of its process until its engine was ready."""
    files = [case.work / name for name in ("bare.py", "bare.json", "bare-result.json")]
    files[0].write_text(script)
    files[1].write_text(json.dumps(task))
    took = case.process(*files, env={} if visible_gpus() else BARE_ON_CPU)
    found: dict[str, Any] = json.loads(files[2].read_text())
    return found, found["ready"] - took.began


def checkpoint(case: Case, alpha: float) -> Path:
    """θ(α) on disk, written once."""
    if alpha in (0.0, -1.0):
        return case.sft if alpha else case.dpo
    folder = case.work / "checkpoints" / case.name(alpha)
    if not folder.exists():
        sides = flags(sft=case.sft, dpo=case.dpo, output=folder)
        case.process("-m", "expo", "extrapolate", *sides, f"--alpha={alpha!r}", "--no-fsync")
    return folder


def require_equal(case: Case, alpha: float, way: str, rows: Sequence[dict[str, Any]]) -> None:
    """Refuse answers that are not the sweep's."""
    ours = case.rows(case.swept, case.name(alpha))
    same = sum(all(mine[key] == row[key] for key in row) for mine, row in zip(ours, rows, strict=True))
    if same < len(ours):
        sys.exit(f"α = {alpha!r}: {len(ours) - same} of {len(ours)} answers of {way} are not the sweep's")


def sum_up(runs: Any) -> Figures:  # noqa: ANN401 - an iterable of figures
    """The sum of each figure; of differences the largest."""
    total: Figures = {}
    for run in runs:
        for name, value in run.items():
            before = total.get(name, 0.0)
            total[name] = max(before, value) if name.startswith("rewards") else before + value
    return total


WAYS: dict[str, Callable[[Case], Figures]] = {
    "sweep, switch not yet proved": sweep_unproved,
    "sweep": sweep,
    "the paper's way": paper,
    "bare": bare,
}


# --- the tables ---------------------------------------------------------------------------------------------------


def measure(case: Case) -> None:
    """All ways in turn, the first round in order, and the tables after each."""
    runs: dict[str, list[Figures]] = {way: [] for way in WAYS}
    for number in range(case.asked.rounds):
        order = list(WAYS) if number == 0 else random.sample(list(WAYS), len(WAYS))
        for way in order:
            runs[way].append(WAYS[way](case))
            keep(case, way, runs[way][-1])
        print_costs(case, runs)
        print_ratios(case, runs)


def keep(case: Case, way: str, found: Figures) -> None:
    """Note figures where a kill does not lose them."""
    line = {"kind": case.kind, "way": way, "figures": found, "asked": vars(case.asked), "load": os.getloadavg()[0]}
    with (case.asked.work / "figures.jsonl").open("a") as stream:
        stream.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    say(f"{case.kind}, {way}: {', '.join(f'{name} {value:.3g}' for name, value in found.items())}")


def print_costs(case: Case, runs: dict[str, list[Figures]]) -> None:
    """Medians of every figure."""
    asked, rows = case.asked, sum(len(case.rows(case.swept, case.name(alpha))) for alpha in case.alphas)
    alphas = ", ".join(f"{alpha:g}" for alpha in case.alphas)
    size = sum(file.stat().st_size for file in case.dpo.glob("*.safetensors")) / 1e6
    print(f"\n**{case.kind}**: {size:,.0f} MB a side, α = {alphas}; {rows} answers of ≤ {asked.max_tokens} tokens, "
          f"engine {asked.engine}, reward model in {reward_engine(case)}, {asked.threads} threads; "
          f"rounds: {len(runs['sweep'])}.\n")  # fmt: skip
    print("| way | figure | seconds, median (range) |\n| --- | --- | --- |")
    for way, found in runs.items():
        for name in found[0]:
            values = [one[name] for one in found]
            digits = ".1e" if name.startswith("rewards") else ".2f"
            spread = f" ({min(values):{digits}}–{max(values):{digits}})" if len(values) > 1 else ""
            print(f"| {way} | {name} | {statistics.median(values):{digits}}{spread} |")


def reward_engine(case: Case) -> str:
    """The engine that scored."""
    return str(case.meta(case.swept, case.name(0.0), "rewards")["engine"])


def print_ratios(case: Case, runs: dict[str, list[Figures]]) -> None:
    """Ratios of runs of one round."""

    def of(way: str, *names: str) -> list[float]:
        return [sum(found[name] for name in names) for found in runs[way]]

    swept, unproved, papers = (
        of("sweep", "wall"),
        of("sweep, switch not yet proved", "wall"),
        of("the paper's way", "wall"),
    )
    made_bare = case.asked.engine == "vllm"
    generating = of("bare", "generate") if made_bare else of("the paper's way", "its own generate_seconds")
    work = [sum(both) for both in zip(generating, of("bare", "score"), strict=True)]
    lines = [("the paper's way / sweep", papers, swept, "≥ 3 on the trio")]
    lines += [("the same with the proof of the switch", papers, unproved, "")]
    lines += [("its upper limit: the paper's way / bare generating and scoring", papers, work, "")]
    if made_bare:
        starts = of("bare", "start the policy", "start the reward model")
        once, allowed = ([share * a + b for a, b in zip(work, starts, strict=True)] for share in (1.0, 1.15))
        lines += [("its upper limit with a start of each engine", papers, once, "")]
        lines += [("sweep / (1.15 × bare generating and scoring + a start of each engine)", swept, allowed, "≤ 1")]
    own = of("sweep", "its own generate_seconds", "its own score_seconds")
    lines += [("the sweep's own generate_seconds and score_seconds / bare", own, work, "")]
    lines += [("its seconds from first token to last reward / bare", of("sweep", "generating and scoring"), work, "")]
    lines += [("CPU time: the paper's way / sweep", of("the paper's way", "cpu"), of("sweep", "cpu"), "")]
    print("\n| ratio | median (interval of at least 95 %) | wanted |\n| --- | --- | --- |")
    for label, above, below, wanted in lines:
        print(f"| {label} | {ratio(above, below)} | {wanted} |", flush=True)


def curve(case: Case) -> None:
    """One sweep, what it says, and its cost beside the paper's way."""
    took, phases = run_sweep(case)
    keep(case, "sweep", {"wall": took.wall_s, "cpu": took.cpu_s, **phases})
    if case.asked.picture:
        shutil.copy(case.swept / "sweep.png", case.asked.picture)
    switch = json.loads((case.swept / "sweep.json").read_text())["switch"]
    print(f"\n**curve**: `expo sweep`, {took.wall_s:.0f} s, {took.cpu_s:.0f} s of CPU time: {shown(phases)}.\n"
          f"The switch: {switch and switch['reason']}.\n\n```\n{took.said.strip()}\n```\n", flush=True)  # fmt: skip
    found: dict[float, Figures] = {}
    for alpha in case.alphas if case.asked.whole_paper else [min(case.alphas, key=lambda alpha: abs(alpha - 0.5))]:
        found[alpha] = paper_at(case, alpha)
        keep(case, f"the paper's way, α = {alpha:g}", found[alpha])
    if len(found) == len(case.alphas):
        whole, how = sum_up(found.values())["wall"], "measured with every α"
    else:
        ((alpha, one),) = found.items()
        whole = like_one(case, alpha, one)
        how = f"α = {alpha:g} measured: {shown(one)}; each other α taken to cost as much, for a token of its answers"
    print(f"The paper's way: {whole:.0f} s ({how}); its answers are the sweep's. "
          f"The paper's way / sweep: {whole / took.wall_s:.2f}.", flush=True)  # fmt: skip


def like_one(case: Case, measured: float, one: Figures) -> float:
    """Seconds of the paper's way where all α cost what one did: generating by the token, the rest by the α."""
    tokens = {alpha: case.meta(case.swept, case.name(alpha), "outputs")["tokens_out"] for alpha in case.alphas}
    generating = one["its own generate_seconds"]
    by_alpha = len(tokens) * (one["generate"] - generating + one["score"])
    written = sum(alpha not in (0.0, -1.0) for alpha in tokens) * one["extrapolate"]
    return float(by_alpha + written + generating * sum(tokens.values()) / tokens[measured])


def shown(found: Figures) -> str:
    """Figures in a sentence."""
    return ", ".join(f"{name} {value:.1f} s" for name, value in found.items() if not name.startswith("rewards"))


# --- what is measured ---------------------------------------------------------------------------------------------


def make_case(kind: str, options: argparse.Namespace) -> Case:
    """The models and prompts of one kind, under --work."""
    given = {key: value for key, value in vars(options).items() if value is not None}
    asked = argparse.Namespace(**{**vars(options), **KINDS[kind], **given})
    work = options.work / kind
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (sft, dpo), reward_model = asked.pair, asked.reward_model
    if kind == "large":
        free = shutil.disk_usage(work).free
        if free < LARGE_BYTES:
            sys.exit(f"{work} has {free / 1e9:.0f} GB, and the large models need {LARGE_BYTES / 1e9:.0f} GB")
        say("large: making a pair and a reward model")
        (sft, dpo) = make_pair(dpo, work, **LARGE)
        reward_model = make_large(reward_model, work / "reward-model")
    prompts = json.loads(asked.prompts.read_text())[: asked.limit]
    (work / "prompts.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))
    return Case(kind, work, sft, dpo, reward_model, tuple(sorted({0.0, *asked.alpha})), asked)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=KINDS)
    parser.add_argument("--work", type=Path, required=True, help="12 GB for `large`; only figures.jsonl is left there")
    parser.add_argument("--pair", type=Path, nargs=2, default=[SHARED / "tiny-sft", SHARED / "tiny-dpo"],
                        metavar=("SFT", "DPO"), help="`large` takes its tokenizer")  # fmt: skip
    parser.add_argument("--reward-model", type=Path, default=SHARED / "tiny-rm")
    parser.add_argument("--prompts", type=Path, default=SHARED / "held_out_prompts.json", help="a JSON list of texts")
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--reward-engine", choices=("auto", "vllm", "transformers"), default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--reward-dtype", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every engine, on a CPU")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--limit", type=int, help="only the first prompts")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--n", type=int, help="samples of each prompt")
    parser.add_argument("--alpha", type=float, nargs="+", help="α besides 0")
    parser.add_argument("--whole-paper", action="store_true", help="with `curve`, the paper's way with every α")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="where `curve` puts its sweep.png")
    options = parser.parse_args()
    os.environ |= {name: value for name, value in PROCESS.items() if name not in os.environ}
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what runs is ended, too
    for kind in options.what:
        case = make_case(kind, options)
        try:
            (curve if kind == "curve" else measure)(case)
        finally:
            shutil.rmtree(case.work)


if __name__ == "__main__":
    main()
