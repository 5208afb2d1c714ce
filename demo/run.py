"""The main job from end to end: train a tiny trio, extrapolate, generate, score, show reward against α, and report.

Everything after the training is what `expo` does for models of any size; the commands are printed as they run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

ALPHAS = (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
NAME = "tiny-ExPO-a{alpha}"
"""Of θ(α), as `expo extrapolate` would name it."""
MAX_TOKENS = 64
BAR_WIDTH = 30


class Point(NamedTuple):
    """One α of the curve."""

    alpha: float
    mean: float
    standard_error: float
    length: float
    """Mean tokens per answer."""
    ended: float
    """Share of answers that ended by themselves."""


def main() -> None:
    """Run the demo into the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo-output"), help="default: demo-output")
    folder: Path = parser.parse_args().folder
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded: these models are too small for more
    again = ("--overwrite",) if folder.exists() else ()
    train(folder)
    points = curve(folder, again)
    print_curve(points)
    draw(points, folder / "curve.png")
    check(points)
    report(folder)


def train(folder: Path) -> None:
    """Train the trio into folder/sft, folder/dpo and folder/rm."""
    from demo.train import train_trio

    say("training an SFT model, a reward model and a DPO model from scratch (about a minute)")
    train_trio(folder, say=say)


def curve(folder: Path, flags: tuple[str, ...]) -> list[Point]:
    """Extrapolate, generate and score for every α, with further flags."""
    alphas = [word for alpha in ALPHAS for word in ("--alpha", alpha)]
    where = ("--output", folder / NAME, *flags)
    expo("extrapolate", "--sft", folder / "sft", "--dpo", folder / "dpo", *alphas, *where)
    return [measure(folder, alpha, flags) for alpha in ALPHAS]


def name_of(alpha: float) -> str:
    """What θ(α) and its outputs are called."""
    return NAME.format(alpha=repr(alpha))


def measure(folder: Path, alpha: float, flags: tuple[str, ...]) -> Point:
    """Generate with θ(α) and score the answers."""
    name, prompts = name_of(alpha), folder / "prompts.jsonl"
    where = ("--output-dir", folder, *flags)
    expo("generate", prompts, "--model", folder / name, "--max-tokens", MAX_TOKENS, "--engine", "transformers", *where)
    expo("score", prompts, "--name", name, "--reward-model", folder / "rm", *where)
    rewards = json.loads((folder / "rewards_prompts" / f"{name}.meta.json").read_text())
    outputs = json.loads((folder / "outputs_prompts" / f"{name}.meta.json").read_text())
    rows = outputs["rows"]
    return Point(
        alpha=alpha,
        mean=rewards["mean"],
        standard_error=rewards["standard_error"],
        length=outputs["tokens_out"] / rows,
        ended=outputs["finish_reasons"].get("stop", 0) / rows,
    )


def expo(*words: object) -> None:
    """Run one expo command in this process, as the program would.

    Raises:
        SystemExit: It failed.
    """
    import contextlib
    import io

    from expo.cli import program as cli

    arguments = [str(word) for word in words]
    say(f"$ expo {shlex.join(arguments)}")
    with contextlib.redirect_stdout(io.StringIO()):
        code = cli.run(arguments)
    if code:
        sys.exit(code)


def print_curve(points: list[Point]) -> None:
    """Print the curve as a table with bars."""
    lowest, highest = min(point.mean for point in points), max(point.mean for point in points)
    notes = {-1.0: "SFT", 0.0: "DPO", best(points).alpha: "best"}
    print(f"\n{'α':>5}  {'reward':>14}  {'tokens':>6}  {'ended':>5}")
    for point in points:
        bar = "█" * max(1, round(BAR_WIDTH * (point.mean - lowest) / (highest - lowest)))
        figures = f"{point.mean:>6.2f} ± {point.standard_error:.2f}"
        shares = f"{point.length:>6.1f}  {point.ended:>5.0%}"
        print(f"{point.alpha:>5g}  {figures:>14}  {shares}  {bar} {notes.get(point.alpha, '')}".rstrip())


def best(points: list[Point]) -> Point:
    """The α with the highest mean reward."""
    return max(points, key=lambda point: point.mean)


def draw(points: list[Point], path: Path) -> None:
    """Draw the curve as a PNG."""
    from expo.output.plots import alpha_curve

    alphas, means, errors, *_ = zip(*points, strict=True)
    alpha_curve(alphas, means, errors, path, title="Reward of θ(α): a tiny trio, trained on the spot")
    print(f"\ncurve drawn in {path}")


def check(points: list[Point]) -> None:
    """Say whether the curve is the paper's: up beyond α = 0, down for an α too large.

    Raises:
        SystemExit: It is not.
    """
    top, dpo, last = best(points), next(point for point in points if point.alpha == 0), points[-1]
    rises = top.alpha > 0 and top.mean - dpo.mean > 2 * (top.standard_error + dpo.standard_error)
    falls = top.mean - last.mean > 2 * (top.standard_error + last.standard_error)
    if not (rises and falls):
        sys.exit("the curve does not rise beyond α = 0 and fall again")
    print(f"reward rises from {dpo.mean:.2f} (DPO) to {top.mean:.2f} (α = {top.alpha:g}) without training, then falls")


def report(folder: Path) -> None:
    """Write the page about all α, with DPO as the baseline."""
    names = [name_of(alpha) for alpha in sorted(ALPHAS, key=lambda alpha: (alpha != 0, alpha))]
    where = ("--task", "prompts", "--output-dir", folder, "--output", folder / "report.html")
    expo("report", *names, *where)
    print(f"\nevery answer, side by side, is on the page {folder / 'report.html'}: open it in a browser")


def say(line: str) -> None:
    """One line of progress."""
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
