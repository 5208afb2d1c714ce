"""What `expo score` does with a plan: how rows are scored, batch by batch, and written."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from expo import __version__
from expo.checkpoint.folder import Location
from expo.config import ScoreConfig
from expo.engines import EngineSpec, Scorer, ScorerSetup
from expo.engines.torch_tools import gpus_per_engine, worker_environments
from expo.errors import InputError
from expo.files import Row, json_lines, texts_sha256
from expo.parts import Part
from expo.rows.files import Columns, RowFiles, require_columns
from expo.rows.job import Figures, Key, RowJob, Rows
from expo.rows.parts import describe_parts
from expo.stats.means import clustered_mean_and_standard_error, mean_and_standard_error
from expo.tasks import read_rows
from expo.verbs.score.rows import ScoreRow

ROW_COLUMNS: Columns = {
    "id": str,
    "sample": int,
    "reward": (float, int, type(None)),
    "tokens": int,
    "truncated": bool,
}
"""The columns of every row."""
MIN_DIFFERENT = 8
"""From this many different token sequences on, one reward for all means that the model does not read them."""
JOURNAL_COLUMNS: Columns = {"row": int, "token_ids_xxh3": str}
"""The additional columns in the journal: which row it is, and of which tokens."""
ROW_NAMES = ("row", "id", "sample", "turn")
"""The columns that say which row it is."""

PAIR = ("implicit_reward", "sft", "dpo", "beta")
"""The settings of the implicit reward, which are not a reward model's."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ScoreJob(RowJob):
    """Everything `expo score` will do."""

    verb: ClassVar[str] = "score"
    public_columns: ClassVar[Columns] = ROW_COLUMNS
    columns: ClassVar[Columns] = {**ROW_COLUMNS, **JOURNAL_COLUMNS}
    seconds_key: ClassVar[str] = "score_seconds"

    config: ScoreConfig
    spec: EngineSpec
    location: Location
    outputs: Path
    rows: tuple[ScoreRow, ...]
    all_rows: Callable[[], tuple[ScoreRow, ...]]
    """Those of the whole file of outputs, also beyond `--limit`."""
    setup: ScorerSetup
    longest: int
    """The longest conversation that is read, in tokens."""
    number: int = 0
    """Which of the run's reward models scores, in the order of their files."""
    further: tuple[ScoreJob, ...] = ()
    """Of the first: the jobs of the run's further reward models."""
    normalization: dict[str, float] | None = None
    """The `mean` and `std` in the reward model's config: recorded, not applied."""

    @property
    def scored_by(self) -> Row:
        """What the meta file says of who scores."""
        normalization = {} if self.normalization is None else {"normalization": self.normalization}
        return {"reward_model": self.location.label, "revision": self.location.revision, **normalization}

    @property
    def described_by(self) -> Row:
        """What the plan says of who scores."""
        return {"reward_model": str(self.location.path)}

    # --- its rows

    @cached_property
    def by_name(self) -> dict[Key, ScoreRow]:
        """Row key → what is scored."""
        return {row.key: row for row in self.rows}

    @property
    def keys(self) -> list[Key]:
        """The rows' ids, samples and turns; their numbers change when a row is inserted into the outputs."""
        return list(self.by_name)

    @property
    def items(self) -> list[object]:
        """The conversations that are scored."""
        return [list(row.conversation.messages) for row in self.rows]

    def everything(self) -> Self:
        """All rows of the outputs."""
        return replace(self, rows=self.all_rows())

    def covering(self, keys: Collection[Key]) -> Self:
        """With these rows of the outputs, also beyond `--limit`."""
        if all(key in self.by_name for key in keys):
            return self
        wanted = {*self.by_name, *keys}
        return replace(self, rows=tuple(row for row in self.all_rows() if row.key in wanted))

    def share(self, part: Part) -> Self:
        """One part of the job."""
        rows = tuple(part.of(self.rows))
        return replace(self, rows=rows, files=self.files.part(part.file_stem), part=part, whole=self)

    def key_of(self, row: Row) -> Key:
        """The row's id, sample and turn."""
        return row["id"], row["sample"], row.get("turn", 0)

    def is_answered(self, row: Row) -> bool:
        """Whether there is a reward."""
        return row["reward"] is not None

    def is_current(self, row: Row) -> bool:
        """Whether it is the reward of the current answer: the outputs may have been regenerated since."""
        one = self.by_name.get(self.key_of(row))
        return one is not None and one.is_of(row)

    def pending(self, done: Mapping[Key, Row]) -> bool:
        """Whether any answer has no reward."""
        return any(key not in done and not row.failed for key, row in self.by_name.items())

    def impossible(self, done: Mapping[Key, Row]) -> Rows:
        """The rows without an answer."""
        return {key: row.journal_row(None) for key, row in self.by_name.items() if row.failed and key not in done}

    def require_sound(self, done: Rows) -> None:
        """Refuse rewards that are one and the same number for all of at least 8 different token sequences.

        Raises:
            InputError: They are.
        """
        rewards = {row["token_ids_xxh3"]: row["reward"] for row in done.values() if row["reward"] is not None}
        if len(rewards) < MIN_DIFFERENT or len(set(rewards.values())) > 1:
            return
        narrow = "" if self.config.dtype == "float32" else "--dtype float32 (a narrow type can saturate), "
        in_parts = self.config.join or self.config.makes_parts
        kept = "their parts" if in_parts else self.files.journal.name
        reward, count = next(iter(rewards.values())), len(rewards)
        raise InputError(
            f"{self.location.label} gives the same reward, {reward!r}, to all {count} different "
            "token sequences: a head or a buffer (of rotary positions, say) was lost or zeroed while it loaded; these "
            f"rows are kept in {kept} and no final file is written; try {narrow}another version of transformers, or "
            "another --engine, with --overwrite"
        )

    # --- producing them

    def with_room(self, context_length: int, gpu_share: float | None) -> Self:
        """The same job with an engine that stays for others: for rows of this many tokens, as far as any are read."""
        longest = max(self.setup.context_length, min(context_length, self.longest))
        return replace(self, setup=replace(self.setup, context_length=longest, gpu_share=gpu_share))

    def worker_options(self) -> dict[str, Any]:
        """Which of the run's reward models, the date in its prompts, and the room of its engine."""
        own = {"only": self.number, "room": self.setup.context_length, "gpu_share": self.setup.gpu_share}
        return {**super().worker_options(), **own}

    def open_engine(self) -> Scorer:
        """Start the engine."""
        engine: Scorer = self.spec.load()(self.setup)
        return engine

    def execute(self, engine: Scorer, done: Rows) -> Iterator[list[Row]]:
        """Score the remaining rows, each by itself: how they are batched is the engine's, and changes no reward."""
        rows = [row for key, row in self.by_name.items() if key not in done and not row.failed]
        for rewards in engine.score([row.token_ids for row in rows]):
            yield [rows[place].journal_row(reward if math.isfinite(reward) else None) for place, reward in rewards]

    def tokens(self, row: Row) -> int:
        """The tokens of the conversation."""
        return int(row["tokens"])

    def worker_environments(self, count: int) -> list[dict[str, str]]:
        """The GPUs of each worker, or its share of the CPU's threads."""
        return worker_environments(self.engine, self.spec, self.config, count)

    def gpus_per_engine(self, there: bool) -> int:
        """The GPUs of each engine on a cluster."""
        return gpus_per_engine(self.engine, self.spec, self.config, asked=self.config.engine, there=there)

    # --- writing them

    def finished_keys(self, meta: Row) -> list[Key] | None:
        """The names in the rows file."""
        try:
            rows = self._finished_rows()
        except InputError:
            return None
        return list(map(self.key_of, rows)) if len(rows) == meta["rows"] else None

    def _finished_rows(self) -> Sequence[Row]:
        file = self._finished_file()
        return require_columns(read_rows(file), self.public_columns, file)

    def _finished_file(self) -> Path:
        """The file that has the finished output's rows with their names."""
        return rows_file(self.files) if self.part is None else self.files.final

    def finished_rows(self, meta: Row, keys: Sequence[Key]) -> list[Row]:  # noqa: ARG002 - all is in the rows file
        """The rows of the finished output, from its rows file; none, to be scored again, where it is damaged."""
        try:
            rows = self._finished_rows()
        except InputError:
            log.warning("%s is missing or damaged: its rows are scored again", self._finished_file())
            return []
        blank = [one.journal_row(None) for one in map(self.covering(keys).by_name.__getitem__, keys)]
        return [
            {**named, **row, **{name: named[name] for name in ROW_NAMES if name in named}}
            for named, row in zip(blank, rows, strict=False)
        ]

    def render(self, rows: Sequence[Row]) -> dict[Path, str]:
        """The rewards, one number per line, and the file with the details of each row."""
        public = [
            {key: value for key, value in self._as_read(row).items() if key not in JOURNAL_COLUMNS} for row in rows
        ]
        return {
            rows_file(self.files): json_lines(public),
            self.files.final: json_lines(row["reward"] for row in rows),
        }

    def recorded_config(self) -> Row:
        """The settings as recorded in the meta file; of the reward models this one, as in a run of its own."""
        others = {"reward_model": self.config.reward_models[self.number]}
        return {name: others.get(name, value) for name, value in super().recorded_config().items() if name not in PAIR}

    def _as_read(self, row: Row) -> Row:
        """The row with the number of tokens that were read, which older journals do not have."""
        return {**row, "tokens": len(self.by_name[self.key_of(row)].token_ids)}

    def meta_of(self, rows: Sequence[Row], figures: Figures, *, extends: bool) -> Row:  # noqa: ARG002 - the interface
        """The content of the meta file."""
        rewards = [row["reward"] for row in rows if row["reward"] is not None]
        mean, standard_error = self._mean_and_standard_error(rows)
        return {
            "command": self.verb,
            "name": self.config.name,
            "config": self.recorded_config(),
            "engine": self.engine,
            "versions": {"expo": __version__, **figures.versions},
            **self.scored_by,
            "rows": len(rows),
            "n": len(rewards),
            "mean": mean,
            "standard_error": standard_error,
            "truncated": sum(row["truncated"] for row in rows),
            "failed": len(rows) - len(rewards),
            "errors": [
                {
                    "row": number,
                    "id": row["id"],
                    "sample": row["sample"],
                    "reason": self._why_failed(row),
                    "lasting": True,
                }
                for number, row in enumerate(rows)
                if not self.is_answered(row)
            ],
            "rows_this_run": figures.rows,
            "engine_start_seconds": round(figures.engine_start_seconds, 3),
            "score_seconds": round(figures.seconds, 3),
            "tokens_per_second": figures.tokens_per_second,
            "prompts_sha256": texts_sha256(row.conversation.asked for row in self.rows),
            "outputs_sha256": texts_sha256(self.items),
            "fingerprint": self.fingerprint,
        }

    def _mean_and_standard_error(self, rows: Sequence[Row]) -> tuple[float | None, float | None]:
        """Of the rewards; samples of a prompt, and turns of a question, are not independent, and count as a cluster."""
        answered = [row for row in rows if self.is_answered(row)]
        rewards = [float(row["reward"]) for row in answered]
        of = [self.by_name[self.key_of(row)].cluster for row in answered]
        numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(of))}
        if len(numbers) == len(of):
            return mean_and_standard_error(rewards)
        return clustered_mean_and_standard_error(np.array(rewards), np.array([numbers[cluster] for cluster in of]))

    def _why_failed(self, row: Row) -> str:
        one = self.by_name[self.key_of(row)]
        if one.failed:
            return f"{self.outputs.name} has no answer to score, because generating it failed"
        wider = "" if self.config.dtype == "float32" else "; --dtype float32 may give one"
        return f"the reward model gives it no finite number{wider}"

    def describe(self) -> Row:
        """The plan as plain data."""
        scored = [row for row in self.rows if not row.failed]
        return {
            **self.described_by,
            "engine": self.engine,
            "outputs": str(self.outputs),
            **describe_parts(self, self.further),
            **self.describe_date(),
            "rows": len(self.rows),
            "rows_without_answer": len(self.rows) - len(scored),
            "tokens": sum(len(row.token_ids) for row in scored),
            "truncated": sum(row.truncated for row in scored),
            "rewards": str(self.files.final),
            **({"further": [job.describe() for job in self.further]} if self.further else {}),
        }


def rows_file(files: RowFiles) -> Path:
    """The file beside the rewards with each row's id, sample, tokens and whether it was truncated."""
    return files.final.with_name(f"{files.name}.rows.jsonl")
