"""The implicit reward: what is scored of a row, and how the rows are scored and written.

r(x, y) = β (log π_dpo(y|x) − log π_sft(y|x)), the reward whose optimum under a KL penalty of strength β to π_sft is
π_dpo, up to a term of x alone (Rafailov et al. 2023, arXiv 2305.18290, equation 5). log π(y|x) is a sum over the
answer's tokens.

One of the two models is in memory at a time: all rows are scored with the first, then with the second, in the same
batches. What the first gives is in the journal at once, as an interim row, so that a stopped run loses a batch at most.
"""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import xxhash

from expo.checkpoint.folder import Location
from expo.engines.batches import token_batches
from expo.engines.log_probs import Answered, LogProbs, LogProbSetup, Side
from expo.files import Row
from expo.rows.files import Columns
from expo.rows.job import Figures, Key, RowJob, Rows
from expo.verbs.score.job import JOURNAL_COLUMNS, ROW_COLUMNS, ScoreJob
from expo.verbs.score.rows import ScoreRow

NUMBER = (float, int, type(None))
IMPLICIT_COLUMNS: Columns = {**ROW_COLUMNS, "answer_tokens": int, "log_prob_dpo": NUMBER, "log_prob_sft": NUMBER}
"""The columns of every row: with the sums that the reward is made of, for another β."""
INTERIM = "interim"
"""The additional column of a row in the journal of which the first model's sum is there."""

log = logging.getLogger(__name__)


# --- rows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerRow(ScoreRow):
    """One row, whose token ids end with its answer."""

    start: int
    """The position of the answer's first token."""

    @property
    def answer_tokens(self) -> int:
        """How many tokens are the answer's."""
        return max(0, len(self.token_ids) - self.start)

    @property
    def is_cut_off(self) -> bool:
        """Whether truncation has left nothing of the answer."""
        return self.truncated and not self.answer_tokens

    @cached_property
    def token_ids_xxh3(self) -> str:
        """Identifies what was scored: the tokens, and which of them are the answer's."""
        return xxhash.xxh3_64_hexdigest(array("q", [self.start, *self.token_ids]).tobytes())

    def result(self, beta: float, log_prob_dpo: float, log_prob_sft: float) -> Row:
        """The row in the journal's form; what is not finite is None."""
        reward = beta * (log_prob_dpo - log_prob_sft)
        sums = {"log_prob_dpo": log_prob_dpo, "log_prob_sft": log_prob_sft}
        return {**self.journal_row(_finite(reward)), **{name: _finite(value) for name, value in sums.items()}}

    def interim(self, log_prob_dpo: float) -> Row:
        """What is known of it after the first model."""
        return {**self.journal_row(None), "log_prob_dpo": _finite(log_prob_dpo), INTERIM: True}

    def journal_row(self, reward: float | None) -> Row:
        """The row in the journal's form without its sums; a reward of None means it failed."""
        nothing = {"log_prob_dpo": None, "log_prob_sft": None}
        return {**super().journal_row(reward), "answer_tokens": self.answer_tokens, **nothing}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def answer_span(prompt: Sequence[int], conversation: Sequence[int], ending: int | None) -> tuple[int, int]:
    """Which tokens of a conversation are its last answer's.

    They begin where the conversation's ids first differ from the prompt's with its generation prompt. Usually that is
    the prompt's end; it is earlier where a tokenizer joins the prompt's last letters with the answer's first. They end
    with the token that the chat template closes an answer with; what it writes after that, such as a line break, is no
    part of the answer.

    Args:
        prompt: The ids of the turns before the answer, with a generation prompt: what `generate` asks.
        conversation: The ids of all turns.
        ending: The id of the token after an answer; None where the template writes none, and all the rest counts.

    Returns:
        The positions of the first token, and after the last one.
    """
    both = zip(prompt, conversation, strict=False)
    start = next((i for i, (one, other) in enumerate(both) if one != other), min(len(prompt), len(conversation)))
    closed = (i for i in range(len(conversation) - 1, start - 1, -1) if conversation[i] == ending)
    return start, next(closed, len(conversation) - 1) + 1


# --- the job ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ImplicitJob(ScoreJob):
    """Everything `expo score --implicit-reward` will do."""

    public_columns: ClassVar[Columns] = IMPLICIT_COLUMNS
    columns: ClassVar[Columns] = {**IMPLICIT_COLUMNS, **JOURNAL_COLUMNS}

    rows: tuple[AnswerRow, ...]
    setup: LogProbSetup  # type: ignore[assignment]  # not a reward model's
    sft: Location
    """π_sft; `location` is π_dpo."""

    @property
    def scored_by(self) -> Row:
        """What the meta file says of who scores: β is part of the name, since it is the scale of the rewards."""
        dpo, sft = self.location, self.sft
        revisions = [one.revision or "local" for one in (dpo, sft)]
        return {
            "reward_model": f"implicit reward of {dpo.label} over {sft.label} (beta {self.config.beta!r})",
            "revision": " over ".join(revisions) if dpo.revision or sft.revision else None,
        }

    @property
    def described_by(self) -> Row:
        """What the plan says of who scores."""
        return {"implicit_reward": str(self.location.path), "over": str(self.sft.path), "beta": self.config.beta}

    def require_sound(self, done: Rows) -> None:
        """One reward for all is what two equal models give, and no fault."""

    def is_interim(self, row: Row) -> bool:
        """Whether only the first model has scored it."""
        return bool(row.get(INTERIM))

    # --- producing them

    def with_room(self, context_length: int, gpu_share: float | None) -> Self:  # noqa: ARG002 - its engine takes any row
        """The same job: its engine takes rows of any length."""
        return self

    def worker_options(self) -> dict[str, Any]:
        """Which of the run's rewards, and the date in its prompts."""
        return {**RowJob.worker_options(self), "only": self.number}

    def open_engine(self) -> LogProbs:  # type: ignore[override]  # not a reward model's
        """Start the engine."""
        engine: LogProbs = self.spec.load()(self.setup)
        return engine

    def execute(self, engine: LogProbs, done: Rows) -> Iterator[list[Row]]:  # type: ignore[override]  # as above
        """Score the remaining rows with both models, in batches that are a pure function of all rows."""
        rows = [row for row in self.rows if not row.failed]
        batches = [
            [rows[number] for number in numbers]
            for numbers in token_batches([len(row.token_ids) for row in rows], self.config.batch_tokens)
        ]
        batches = [batch for batch in batches if any(row.key not in done for row in batch)]
        first = self._after_first_model()
        for batch in batches:
            if any(row.key not in first for row in batch):
                values = _log_probs(engine, "dpo", batch)
                first |= values
                yield [row.interim(values[row.key]) for row in batch]
        for batch in batches:
            values = _log_probs(engine, "sft", batch)
            left = [row for row in batch if row.key not in done]
            yield [row.result(self.config.beta, first[row.key], values[row.key]) for row in left]

    def _after_first_model(self) -> dict[Key, float]:
        """Row key → log π_dpo, as the journal has it."""
        there = [row for row in self.files.look().journal if self.is_interim(row) and self.is_current(row)]
        sums = {self.key_of(row): row["log_prob_dpo"] for row in there}
        return {key: math.nan if value is None else value for key, value in sums.items()}

    # --- writing them

    def recorded_config(self) -> Row:
        """The settings as recorded in the meta file; none of reward models, which this is not."""
        return {
            name: value for name, value in super(ScoreJob, self).recorded_config().items() if name != "reward_model"
        }

    def meta_of(self, rows: Sequence[Row], figures: Figures, *, extends: bool) -> Row:
        """The content of the meta file."""
        sides = {"dpo": self.location, "sft": self.sft}
        pair = {side: {"name": one.label, "revision": one.revision} for side, one in sides.items()}
        return {**super().meta_of(rows, figures, extends=extends), **pair, "beta": self.config.beta}

    def _why_failed(self, row: Row) -> str:
        one = self.by_name[self.key_of(row)]
        if isinstance(one, AnswerRow) and one.is_cut_off:
            return f"its prompt alone fills the maximum length of {len(one.token_ids)} tokens"
        if one.failed:
            return super()._why_failed(row)
        side = self.location if row["log_prob_dpo"] is None else self.sft
        wider = "" if self.config.dtype == "float32" else "; --dtype float32 may give one"
        return f"{side.label} gives its answer no finite log-probability{wider}"


def _log_probs(engine: LogProbs, side: Side, batch: Sequence[AnswerRow]) -> dict[Key, float]:
    """Row key → log π."""
    values = engine.log_probs(side, [Answered(row.token_ids, row.start) for row in batch])
    return {row.key: value for row, value in zip(batch, values, strict=True)}
