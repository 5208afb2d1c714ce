"""Asks scorers in a process that has vLLM: `python observe_scorers.py JSON` prints engine → way of asking → rewards."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from expo.config import ScoreConfig
from expo.engines import SCORERS, ScorerSetup
from expo.errors import ExpoError

FEW_AT_A_TIME: dict[str, dict[str, Any]] = {
    "transformers": {"batch_tokens": 200},
    "vllm": {"engine_arg": ("max_num_seqs=8",)},
}


def main() -> None:
    asked = json.loads(sys.argv[1])
    print(json.dumps({name: observe(name, asked) for name in asked["engines"]}))


def observe(engine: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Each way of asking, and what came back: batches of (place, reward)."""
    rows, longest = asked["rows"], max(map(len, asked["rows"]))
    few = FEW_AT_A_TIME[engine]
    config = ScoreConfig(task="alpaca", name="m", reward_model=asked["model"], dtype="float32", **few)
    with closing(SCORERS[engine].load()(ScorerSetup(config, Path(asked["model"]), longest))) as scorer:
        seen: dict[str, Any] = {
            "all": batches(scorer, rows),
            "alone": [batch for row in rows for batch in batches(scorer, [row])],
            "backwards": batches(scorer, rows[::-1]),
            "none": batches(scorer, []),
        }
        some = scorer.score(rows)
        seen["closed"] = [next(some)]
        some.close()
        seen["after closing"] = batches(scorer, rows)
        try:
            seen["refused"] = batches(scorer, [[1] * (longest + 1)]) if engine == "vllm" else None
        except ExpoError as error:
            seen["refused"] = str(error)
    return seen


def batches(scorer: Any, rows: list[list[int]]) -> list[list[tuple[int, float]]]:
    return [list(batch) for batch in scorer.score(rows)]


if __name__ == "__main__":
    main()
