"""`expo compare`: paired comparison of runs on the prompts they share; the report stands on it, too.

`finding.py` says what the user's words mean, `reading.py` makes runs of their files (`run.py`), `comparison.py`
compares them (`figures.py`), and `verdict.py` and `text.py` say it in words and tables. Nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from expo.config import CompareConfig
from expo.files import Row
from expo.output.frames import frame
from expo.verbs.compare.comparison import compare
from expo.verbs.compare.figures import Comparison
from expo.verbs.compare.finding import Source, find_sources
from expo.verbs.compare.pairing import common_reward_models, pair
from expo.verbs.compare.reading import read_sources
from expo.verbs.compare.run import Run
from expo.verbs.compare.text import as_markdown, as_text
from expo.verbs.compare.verdict import verdicts

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class ComparePlan:
    """The runs that will be compared."""

    config: CompareConfig
    sources: tuple[Source, ...]
    runs: tuple[Run, ...]

    def describe(self) -> Row:
        """The plan as plain data.

        Raises:
            InputError: The runs cannot be paired.
        """
        pairing = pair(self.runs, intersect=self.config.intersect)
        reward_models, _ = common_reward_models(self.runs)
        return {
            "task": self.runs[0].task,
            "baseline": self.runs[0].name,
            "rows": len(pairing.keys),
            "rows_left_out": len(pairing.left_out),
            "reward_models": ", ".join(reward_models) or None,
            "runs": [
                {
                    "name": source.name,
                    "rows": len(run.rows),
                    "outputs": None if source.outputs is None else str(source.outputs),
                    "rewards": [str(file) for file in source.rewards],
                }
                for source, run in zip(self.sources, self.runs, strict=True)
            ],
        }


@dataclass(frozen=True)
class Compared:
    """The result of a run."""

    comparison: Comparison
    text: str
    """The tables, for a terminal or in markdown."""

    def __str__(self) -> str:
        return self.text

    def describe(self) -> Row:
        """As plain data, with the contract's names."""
        return {**self.comparison.describe(), "verdicts": verdicts(self.comparison)}

    def to_pandas(self) -> DataFrame:
        """A row per reward model and run, the baseline first: the figures of `describe` but for subsets and flips."""
        described = self.comparison.describe()
        return frame(
            (
                {"reward_model": table["reward_model"], **model}
                for table in (described, *described["further"])
                for model in table["models"]
            ),
            leave_out=("subsets", "flips", "flip_rows"),
        )


def plan(config: CompareConfig) -> ComparePlan:
    """Find and read the runs.

    Raises:
        InputError: A run is missing or damaged, is there twice, or belongs to another task.
    """
    sources = find_sources(config.runs, task=config.task, output_dir=config.output_dir)
    return ComparePlan(config, tuple(sources), tuple(read_sources(sources, config.dataset)))


def run(config: CompareConfig) -> Compared:
    """Compare the runs.

    Raises:
        InputError: A run is missing or damaged, or they cannot be paired.
    """
    found = compare(plan(config).runs, intersect=config.intersect, flips=config.flips)
    return Compared(found, as_markdown(found) if config.markdown else as_text(found))
