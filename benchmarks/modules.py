"""Whether modules with α of their own do better than one α for all: `expo sweep --search modules`, with several seeds.

A seed decides the order of the prompts, which are set aside, and the answers. Shown are, for each: the α that the first
race found, every step with its arms (the difference of their mean reward from the vector as it was, on the prompts of
that race), what was left at the end, its one test against the α of the first race on the prompts that were set aside,
both above α = 0 there, and what it took.

`--rivals` then asks what the test does not: whether another α for all would have done as well. These α answer all
prompts, and the best of them on the prompts that were set aside, chosen on these very prompts, which favours it, is
compared there with the end of the search. `--hidden` says what the demo's hidden quality, which its reward model was
trained to guess, makes of the same answers.

    python benchmarks/modules.py --trio demo-output --alpha 1 --alpha 2 --alpha 4 --n 8 --max-tokens 64 --hidden
    python benchmarks/modules.py --trio demo-output --alpha 0.5 --alpha 1 --seeds 1 --rivals 0.5 1 2 3
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from likelihood import LETTERS, MODELS, read_prompts, write_rows

from expo.config import SweepConfig
from expo.verbs.sweep.confirm import Confirmation, confirm
from expo.verbs.sweep.modules import plan as plan_modules
from expo.verbs.sweep.order import Order

COMMAND = [sys.executable, "-m", "expo", "sweep"]


def swept(words: Sequence[object], folder: Path) -> float:
    """Run `expo sweep`; its seconds."""
    started = time.perf_counter()
    subprocess.run([*COMMAND, *map(str, words), "--output", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def vector(said: dict[str, Any]) -> str:
    """An α, and what has another one."""
    own = ", ".join(f"{label} {value:g}" for label, value in said["own"].items())
    return f"α = {said['alpha']:g}" + (f" but {own}" if own else "")


def measured(found: dict[str, Any]) -> str:
    """A difference with its interval."""
    if found["difference"] is None:
        return "no rewards"
    within = "" if found["interval"] is None else f" [{', '.join(f'{end:+.3f}' for end in found['interval'])}]"
    return f"{found['difference']:+.3f}{within}"


def shown(record: dict[str, Any]) -> Iterator[str]:
    """What a search found."""
    for step in record["steps"]:
        arms = []
        for label in step["arms"]:
            look = next((one for one in reversed(step["looks"]) if label in one["means"]), None)
            if look is not None:
                base = look["means"][next(iter(step["arms"]))]
                mark = " ←" if label == step["taken"] else ""
                arms.append(f"{label} {look['means'][label] - base:+.3f} ({look['prompts']}){mark}")
        yield f"  {step['step']}: {'; '.join(arms)}"
    yield f"  uniform: {vector(record['uniform'])}; final: {vector(record['final'])}"
    test = record["test"]
    if test is not None:
        said = "shown" if test["shown"] else "not shown"
        yield f"  final over uniform, {test['prompts']} prompts: {measured(test)}, p = {test['p']:.4f}: {said}"
    for over in record["over_dpo"]:
        yield f"  over α = 0: {vector(over)}: {measured(over)}"
    yield f"  {record['tokens']:,} tokens in {record['rows']:,} answers, of {record['most_rows']:,} at most"


def rows_of(folder: Path, kind: str, name: str, aside: Sequence[str]) -> dict[tuple[str, int], Any]:
    """Prompt and sample → answer, or reward, of those that were set aside."""
    (answers,), (rows,) = folder.glob(f"outputs_*/{name}.meta.json"), folder.glob(f"{kind}_*/{name}.jsonl")
    said = json.loads(answers.read_text())["per_row"]
    values = [json.loads(line) for line in rows.read_text().splitlines()]
    keys = zip(said["id"], said["sample"], strict=True)
    return {key: value for key, value in zip(keys, values, strict=True) if key[0] in set(aside) and value is not None}


def compared(ours: dict[tuple[str, int], float], theirs: dict[tuple[str, int], float], order: Order) -> Confirmation:
    """The difference of two columns of the prompts that were set aside, over the rows that both have."""
    question = {one: number for number, ids in enumerate(order.confirmation) for one in ids}
    keys = sorted(ours.keys() & theirs.keys())
    one, other = (np.array([of[key] for key in keys]) for of in (ours, theirs))
    return confirm(0.0, one, other, np.array([question[key[0]] for key in keys]))


def said_of(found: Confirmation) -> str:
    """A difference with its interval."""
    return measured({"difference": found.difference, "interval": found.interval})


def name_of(record: dict[str, Any], one: dict[str, Any]) -> str:
    """What the outputs of a vector are called."""
    wanted = (one["alpha"], one["own"])
    return next(str(other["name"]) for other in record["vectors"] if (other["alpha"], other["own"]) == wanted)


def hidden(record: dict[str, Any], folder: Path, order: Order) -> Iterator[str]:
    """The hidden quality and the tokens of the answers to the prompts that were set aside."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from demo import task

    quality, tokens = {}, {}
    for one in (record["uniform"], record["final"]):
        rows = rows_of(folder, "outputs", name_of(record, one), order.to_confirm)
        quality[vector(one)] = {key: task.quality(row["prompt"], row["output"]) for key, row in rows.items()}
        tokens[vector(one)] = np.mean([row["length"] for row in rows.values()])
    theirs, ours = quality.values()
    each = "; ".join(f"{name} {np.mean(list(own.values())):.3f}" for name, own in quality.items())
    yield f"  hidden quality: {each}; final over uniform {said_of(compared(ours, theirs, order))}"
    yield f"  tokens of an answer: {'; '.join(f'{name} {count:.1f}' for name, count in tokens.items())}"


def rivals(record: dict[str, Any], folder: Path, grid: Path, order: Order) -> Iterator[str]:
    """The end of the search beside other α for all, on the prompts that were set aside."""
    ours = rows_of(folder, "rewards", name_of(record, record["final"]), order.to_confirm)
    found = {}
    for one in json.loads((grid / "sweep.json").read_text())["alphas"]:
        theirs = rows_of(grid, "rewards", one["name"], order.to_confirm)
        found[one["alpha"]] = (float(np.mean(list(theirs.values()))), compared(ours, theirs, order))
    best = max(found, key=lambda alpha: found[alpha][0])
    each = ", ".join(f"{alpha:g} {mean:.3f}" for alpha, (mean, _) in sorted(found.items()))
    yield f"  α for all, mean on the prompts set aside: {each}"
    figures = said_of(found[best][1])
    yield f"  final over the best of them, α = {best:g}, chosen on these prompts: {figures}"


def main() -> None:
    """Search with each seed, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trio", type=Path, help="a folder with sft, dpo, rm and prompts.jsonl, as the demo writes")
    for name in MODELS:
        parser.add_argument(name, type=Path)
    parser.add_argument("--alpha", action="append", type=float, required=True)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=112)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rivals", type=float, nargs="*", default=[], metavar="A", help="α for all to compare with")
    parser.add_argument("--hidden", action="store_true", help="the demo's hidden quality of the answers, too")
    parser.add_argument("--work", type=Path, default=Path("/tmp/expo-modules"))
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    sft, dpo, reward, file = (
        getattr(asked, flag[2:].replace("-", "_")) or asked.trio / name for flag, name in MODELS.items()
    )
    prompts = read_prompts(file)[: asked.limit]
    task = write_rows(asked.work / "prompts.jsonl", [{"prompt": prompt[:LETTERS]} for prompt in prompts])
    for seed in range(asked.seeds):
        common = ["--sft", sft, "--dpo", dpo, "--reward-model", reward, "--task", task, "--any-pair", "--seed", seed]
        common += ["--n", asked.n, "--max-tokens", asked.max_tokens, "--engine", "transformers"]
        folder = asked.work / f"seed-{seed}"
        candidates = [word for alpha in asked.alpha for word in ("--alpha", alpha)]
        seconds = swept([*common, *candidates, "--search", "modules"], folder)
        record = json.loads((folder / "modules.json").read_text())
        print(f"seed {seed}, {len(prompts)} prompts × {asked.n} answers, {seconds:.0f} s\n" + "\n".join(shown(record)))
        if record["test"] is None:
            continue
        given = {"sft": str(sft), "dpo": str(dpo), "reward_model": (str(reward),), "task": str(task), "seed": seed}
        of = {"n": asked.n, "max_tokens": asked.max_tokens, "engine": "transformers", "any_pair": True}
        config = SweepConfig(**given, **of, alpha=tuple(asked.alpha), search="modules", output=str(folder))
        order = plan_modules(config).race.order
        if asked.hidden:
            print("\n".join(hidden(record, folder, order)))
        if asked.rivals:
            grid = asked.work / f"grid-{seed}"
            swept([*common, *(word for alpha in asked.rivals for word in ("--alpha", alpha))], grid)
            print("\n".join(rivals(record, folder, grid, order)))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
