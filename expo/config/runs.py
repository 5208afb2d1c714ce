"""The settings of the commands that read runs, which `expo generate`, `expo score` or others made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from expo.config.pair import CommandConfig
from expo.settings import Setting, require, require_text, spelling

MAX_FLIPS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class RunsConfig(CommandConfig):
    """Which runs are read, and what for."""

    HEADING = "The runs"

    runs: Annotated[
        tuple[str, ...],
        Setting("Two or more runs: names, output files or reward files. The first is the baseline.", metavar="RUN",
                positional=True),
    ] = ()  # fmt: skip
    task: Annotated[
        str | None,
        Setting("The runs' task, as given to `expo generate`. [default: found from the runs]", metavar="TASK"),
    ] = None
    output_dir: Annotated[str, Setting("Folder that holds outputs_<task>/ and rewards_<task>/.", metavar="DIR")] = "."
    dataset: Annotated[
        str | None, Setting("Read mtbench's questions from a local file or another hub dataset.", metavar="PATH|ID")
    ] = None
    intersect: Annotated[
        bool, Setting("If the runs' prompts differ, use the rows that all runs have, and list the rest.")
    ] = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: A value is out of its range; the message names the flag.
        """
        for field in fields(self):
            value: Any = getattr(self, field.name)
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str):
                    require_text(spelling(type(self), field.name), text)
                    require(bool(text.strip()), f"{spelling(type(self), field.name)} is empty")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(RunsConfig):
    """`expo compare`: paired comparison of runs on the prompts they share."""

    flips: Annotated[int, Setting("How many of each model's biggest wins and losses to list.", metavar="N")] = 10
    markdown: Annotated[bool, Setting("Print the tables as GitHub Markdown.")] = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: A value is out of its range; the message names the flag.
        """
        super().__post_init__()
        require(0 <= self.flips <= MAX_FLIPS, f"--flips must be 0 to {MAX_FLIPS}, not {self.flips}")
        count = len(self.runs)
        require(count >= 2, f"compare takes two or more runs, not {count}: a baseline, and what to compare with it")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(RunsConfig):
    """`expo report`: one page about runs on the prompts they share."""

    output: Annotated[str, Setting("The page to write.", metavar="FILE.html")] = "report.html"
    figures: Annotated[
        str | None, Setting("Also write the page's figures to this folder, as PNG and SVG.", metavar="DIR")
    ] = None
    overwrite: Annotated[bool, Setting("Replace files that expo report did not write.")] = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: A value is out of its range; the message names the flag.
        """
        super().__post_init__()
        is_page = Path(self.output).suffix.lower() in (".html", ".htm")
        require(is_page, f"--output must end in .html, not {self.output!r}")
