"""A training run from its first steps: train one by reinforcement learning, extrapolate it, and measure both.

`python -m demo.trajectory --output FOLDER` takes about five minutes on one CPU core. It makes a tiny SFT model θ_0,
trains it with a verifiable reward (`demo/reinforce.py`), extrapolates from the first part of the run to later steps
with `expo extrapolate`, and has every model answer held-out prompts. `trajectory.md`, `trajectory.json` and
`trajectory.png` have what came out, whatever it is.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from . import task
from .run import expo, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PreTrainedTokenizerFast

    from .reinforce import Run

PARTS = ((0, 0.15), (0, 0.25), (0, 0.5), (0.25, 0.35), (0.25, 0.5))
"""Parts of the run from which it is extrapolated: where θ_0 is taken and the last step seen, as shares of the run.

Those that begin later were added when the figures of the others were known: there the policy already succeeds at times,
as those do that are usually trained with verifiable rewards.
"""
REACH = (1, 1.5, 2, 3, 5, 10)
"""How far: multiples of the steps that were seen. The end of the run is a target as well."""
MEASURED_EVERY = 0.05
"""The share of the run between checkpoints that are measured, beside the targets; more are there to be used."""
WAYS = {"relex": "relex", "linear": "linear", "pair": "the last checkpoint alone"}
"""How it is extrapolated. `pair` takes θ_0 and the last checkpoint alone, as α does."""
COLUMNS = 3
"""Of the picture."""
SAMPLES = 4
"""Answers to each held-out prompt, at temperature 1."""


class Part(NamedTuple):
    """A part of the run, in its steps."""

    start: int
    """Where θ_0 is taken."""
    seen: int
    """The last step that may be used."""


WHOLE = Part(0, 0)
"""Stands for no part: a checkpoint of the run itself."""
Models: TypeAlias = dict[tuple[str, Part, int], Path]
"""(way, part, step) → model, as in `Score`."""


@dataclass(frozen=True)
class Score:
    """What a model's answers to the held-out prompts are worth."""

    way: str
    """`run` for a checkpoint of the run itself, else one of `WAYS`."""
    part: Part
    """What it was made from; `WHOLE` for the run itself."""
    step: int
    reward: float
    """The mean over prompts and samples."""
    error: float
    """Its standard error, over prompts."""
    greedy: float
    """The mean of the likeliest answers."""


@dataclass(frozen=True)
class FitFigures:
    """How well lines describe the steps that were seen, over all tensors."""

    rule: str
    part: Part
    checkpoints: int
    explained: float | None
    """The share of the squared changes that lies along the lines."""
    r2: float | None
    """R² of the places on these lines as linear in the step."""
    ahead: float
    """Cosine of the change that was seen and the change up to the end of the run, over all weights."""


def main() -> None:
    """Run everything into the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("trajectory-output"), help="default: trajectory-output")
    parser.add_argument("--seed", type=int, default=0, help="fixes data, weights and samples (default: 0)")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded: this model is too small for more
    from .reinforce import RUN

    print(run_all(arguments.output, RUN, arguments.seed))


def run_all(folder: Path, run: Run, seed: int) -> str:
    """Train, extrapolate, measure; write the three files.

    Returns:
        The text of `trajectory.md`.
    """
    from . import reinforce, train

    start = time.monotonic()
    tokenizer = train.build_tokenizer()
    say("training an SFT model from scratch, and that one by reinforcement learning (about two minutes)")
    sft = train.train_sft(tokenizer, seed, say)
    kept = reinforce.train(sft, tokenizer, folder / "run", run, seed, say)
    say(f"trained in {time.monotonic() - start:.0f} s; extrapolating")
    made = {part: extrapolate(folder, kept, part) for part in parts_of(run)}
    fits = [figures for part in made for figures in fit_figures(kept, part)]
    measured = {
        *range(0, run.steps + 1, round(run.steps * MEASURED_EVERY)),
        *(step for of in made.values() for _, step in of),
    }
    models: Models = {("run", WHOLE, step): path for step, path in kept.items() if step in measured}
    models |= {(way, part, step): path for part, of in made.items() for (way, step), path in of.items()}
    say(f"measuring {len(models)} models")
    scores = list(measure(models, tokenizer, task.prompts(run.held_out, seed, held_out=True), seed))
    text = f"{table(scores)}\n\n{fit_table(fits)}\n"
    (folder / "trajectory.md").write_text(text, encoding="utf-8")
    draw(scores, folder / "trajectory.png")
    seconds = round(time.monotonic() - start, 1)
    record = {"seed": seed, "seconds": seconds, "run": asdict(run), "scores": [*map(asdict, scores)]}
    record["fits"] = [*map(asdict, fits)]
    (folder / "trajectory.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    say(f"{seconds:.0f} s in all; trajectory.md, trajectory.json and trajectory.png are in {folder}")
    return text


def parts_of(run: Run) -> list[Part]:
    """The parts in steps."""
    return [Part(round(start * run.steps), round(seen * run.steps)) for start, seen in PARTS]


def targets(part: Part, end: int) -> list[int]:
    """The steps to extrapolate to, counted from the run's beginning."""
    return sorted({*(part.start + round((part.seen - part.start) * times) for times in REACH), end})


def extrapolate(folder: Path, kept: Mapping[int, Path], part: Part) -> dict[tuple[str, int], Path]:
    """Extrapolate from a part's checkpoints, in every way.

    Args:
        folder: The models go below it.
        kept: Step → checkpoint.
        part: What may be used. `expo` is told steps counted from its start.

    Returns:
        (way, step) → model.
    """
    steps = targets(part, max(kept))
    made: dict[tuple[str, int], Path] = {}
    for way in WAYS:
        used = [part.seen] if way == "pair" else _steps_of(part, kept)
        checkpoints = [word for step in used for word in ("--checkpoint", f"{step - part.start}={kept[step]}")]
        rule = () if way == "pair" else ("--rule", way)
        ends = [word for step in steps for word in ("--target-step", step - part.start)]
        output = folder / f"{way}-{part.start}-{part.seen}" / "plus-{step}"
        with redirect_stdout(io.StringIO()):  # the folders' names, which are known
            expo(
                "extrapolate", "--sft", kept[part.start], *checkpoints, *rule, *ends, "--output", output, "--overwrite"
            )
        made |= {(way, step): Path(str(output).format(step=step - part.start)) for step in steps}
    return made


def _steps_of(part: Part, kept: Mapping[int, Path]) -> list[int]:
    return [step for step in sorted(kept) if part.start < step <= part.seen]


def fit_figures(kept: Mapping[int, Path], part: Part) -> list[FitFigures]:
    """How well each rule's lines describe a part's checkpoints."""
    import numpy as np
    from safetensors.numpy import load_file

    from expo.theta.trajectory.fit import LINE_RULES, fit, quality

    steps = [*_steps_of(part, kept), max(kept)]
    start, *later = (load_file(kept[step] / "model.safetensors") for step in (part.start, *steps))
    grams = []
    for name, values in start.items():
        changes = np.stack([(one[name].astype(np.float64) - values).ravel() for one in later])  # [steps, elements]
        grams.append(changes @ changes.T)
    whole = np.sum(grams, axis=0)  # its last row is that of the run's end
    ahead = float(whole[-2, -1] / np.sqrt(whole[-2, -2] * whole[-1, -1]))
    since = [step - part.start for step in steps[:-1]]
    found = {name: quality(fit(rule, gram[:-1, :-1], since) for gram in grams) for name, rule in LINE_RULES.items()}
    return [FitFigures(name, part, len(since), one.explained, one.r2, ahead) for name, one in found.items()]


def measure(models: Models, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], seed: int) -> Iterator[Score]:
    """Have each model answer the prompts, the same way each."""
    import torch
    from transformers import LlamaForCausalLM

    from . import reinforce, train

    for number, ((way, part, step), path) in enumerate(models.items(), start=1):
        with train.no_progress_bars():
            model = LlamaForCausalLM.from_pretrained(path)
        generator = torch.Generator().manual_seed(seed)
        sampled = reinforce.sample(model, tokenizer, prompts, SAMPLES, generator).rewards  # [prompts, samples]
        greedy = reinforce.sample(model, tokenizer, prompts, 1, None).rewards.mean().item()
        error = sampled.mean(1).std().item() / len(prompts) ** 0.5
        yield Score(way, part, step, sampled.mean().item(), error, greedy)
        if number % 20 == 0 or number == len(models):
            say(f"measured {number} of {len(models)}")


def table(scores: Sequence[Score]) -> str:
    """Both tables of rewards, in Markdown."""
    own = {one.step: one for one in scores if one.way == "run"}
    lines = ["| step of the run | reward | greedy |", "| --- | --- | --- |"]
    lines += [f"| {step} | {_cell(one)} | {one.greedy:.3f} |" for step, one in own.items()]
    others = {(one.way, one.part, one.step): one for one in scores if one.way != "run"}
    names = ("start", "seen to", "target", "", "the run itself", *WAYS.values())
    lines += ["", f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for part, step in sorted({(part, step) for _, part, step in others}):
        reach = (step - part.start) / (part.seen - part.start)
        cells = [_cell(own.get(step)), *(_cell(others.get((way, part, step))) for way in WAYS)]
        lines.append(f"| {part.start} | {part.seen} | {step} | {reach:.3g} × | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(score: Score | None) -> str:
    return "–" if score is None else f"{score.reward:.3f} ± {score.error:.3f}"


def fit_table(fits: Sequence[FitFigures]) -> str:
    """How well lines fit, in Markdown."""
    names = ("start", "seen to", "checkpoints", "rule", "explained variance", "R²", "cosine with the run's end")
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for one in fits:
        explained, r2 = ("–" if value is None else f"{value:.3f}" for value in (one.explained, one.r2))
        cells = (one.part.start, one.part.seen, one.checkpoints, one.rule, explained, r2, f"{one.ahead:.3f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def draw(scores: Sequence[Score], path: Path) -> None:
    """Draw reward against step: the run as a line, each way as points, one panel for each part of the run."""
    from matplotlib.figure import Figure

    from expo.output.charts import style

    parts = sorted({one.part for one in scores if one.way != "run"})
    rows = -(-(len(parts) + 1) // COLUMNS)  # the legend has a place of its own
    with style():
        figure = Figure(figsize=(9.2, 2.9 * rows), layout="constrained", facecolor="white")
        grid = list(figure.subplots(rows, COLUMNS, sharey=True, squeeze=False).flat)
        for axes, part in zip(grid, parts, strict=False):
            _draw_part(axes, scores, part)
        for axes in grid[len(parts) :]:
            axes.set_axis_off()
        grid[-1].legend(*grid[0].get_legend_handles_labels(), loc="center", fontsize=10)
        figure.supxlabel("step of the run", fontsize=10)
        figure.supylabel("reward, held-out prompts", fontsize=10)
        figure.savefig(path, dpi=120)


def _draw_part(axes: Axes, scores: Sequence[Score], part: Part) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from expo.output.charts import COLOURS, INK, MUTED

    own = [one for one in scores if one.way == "run"]
    axes.axhline(next(one.reward for one in own if one.step == part.start), color=MUTED, linestyle=":", label="θ_0")
    axes.axvspan(max(part.start, 1), part.seen, color=MUTED, alpha=0.15, linewidth=0, label="the steps seen")
    axes.plot([one.step for one in own[1:]], [one.reward for one in own[1:]], color=INK, label="the run itself")
    for way, colour, marker in zip(WAYS, COLOURS[1:], "osD", strict=False):
        made = [one for one in scores if (one.way, one.part) == (way, part)]
        steps, rewards, errors = ([getattr(one, name) for one in made] for name in ("step", "reward", "error"))
        form: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "linestyle": "--", "linewidth": 1}
        axes.errorbar(steps, rewards, yerr=[2 * error for error in errors], capsize=2, label=WAYS[way], **form)
    axes.set_xscale("log")
    axes.set_xlim(own[1].step / 1.2, max(one.step for one in scores) * 1.2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(-0.03, 1.03)
    axes.set_title(f"from step {part.start}, seen to {part.seen}", fontsize=10)


if __name__ == "__main__":
    main()
