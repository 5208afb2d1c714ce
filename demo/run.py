"""The main job from end to end: train a tiny trio, sweep α, see what the sweep chooses, and look at every answer.

Everything after the training is what `expo` does for models of any size; the commands are printed as they run, and so
is what they print.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

ALPHAS = (1, 2, 4, 8)
MAX_TOKENS = 64


def main() -> None:
    """Run the demo into the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo-output"), help="default: demo-output")
    folder: Path = parser.parse_args().folder
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded: these models are too small for more
    again = ("--overwrite",) if folder.exists() else ()
    train(folder)
    sweep(folder, again)
    report(folder)
    check(json.loads((folder / "sweep" / "sweep.json").read_text(encoding="utf-8")))


def train(folder: Path) -> None:
    """Train the trio into folder/sft, folder/dpo and folder/rm."""
    from demo.train import train_trio

    say("training an SFT model, a reward model and a DPO model from scratch (about half a minute)")
    train_trio(folder, say=say)


def sweep(folder: Path, flags: tuple[str, ...]) -> None:
    """Answer the prompts with every θ(α), score the answers, and choose, with further flags."""
    models = ("--sft", folder / "sft", "--dpo", folder / "dpo", "--reward-model", folder / "rm")
    alphas = [word for alpha in ALPHAS for word in ("--alpha", alpha)]
    rows = ("--task", folder / "prompts.jsonl", "--engine", "transformers", "--max-tokens", MAX_TOKENS)
    expo("sweep", *models, "--with-sft", *alphas, *rows, "--output", folder / "sweep", *flags)
    print(f"\nthe curve is drawn in {folder / 'sweep' / 'sweep.png'}")


def report(folder: Path) -> None:
    """Write the page about the sweep."""
    page = folder / "report.html"
    print("every answer, side by side, is on this page, for a browser: ", end="", flush=True)
    expo("report", folder / "sweep", "--output", page)


def check(record: dict[str, Any]) -> None:
    """Say whether the curve is the paper's: up beyond α = 0, down for an α too large.

    Args:
        record: What sweep.json says.

    Raises:
        SystemExit: It is not.
    """
    of = {one["alpha"]: one for one in record["alphas"]}
    dpo, top, last = of[0.0], of[record["best_alpha"]], of[max(of)]
    rises = top["alpha"] > 0 and top["interval"][0] > 0  # simultaneous over the α
    falls = last["mean"] < top["mean"]  # how far, the table says: other processors train other models
    if not (rises and falls):
        sys.exit("the curve does not rise beyond α = 0 and fall again")
    print(
        f"the curve is the paper's: from {dpo['mean']:.2f} (DPO) it rises to {top['mean']:.2f} (α = {top['alpha']:g}) "
        f"without training, and falls to {last['mean']:.2f} (α = {last['alpha']:g})"
    )


def expo(*words: object) -> None:
    """Run one expo command in this process, as the program would.

    Raises:
        SystemExit: It failed.
    """
    from expo.cli import program as cli

    arguments = [str(word) for word in words]
    say(f"$ expo {shlex.join(arguments)}")
    code = cli.run(arguments)
    if code:
        sys.exit(code)


def say(line: str) -> None:
    """One line of progress."""
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
