"""The proof that a live engine can be switched from one α to another: made once, before rows depend on it.

The switched engine must answer as an engine that was started cold at the second α, and after switching back as it did
at the first. So one engine more is started, before the one that stays; two are never in memory.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from expo.engines import Probed
from expo.engines.switching import bound_of, difference, is_finite, read_answers
from expo.engines.verdicts import is_proved, keep_proof, proof_key
from expo.errors import EnvironmentFailure, ExpoError, InputError
from expo.generate import GenerateJob
from expo.rows.worker import Worker
from expo.theta.moves import moved_kinds

log = logging.getLogger(__name__)

STEPS = (4.0, 1.0)
"""How far from the first α the proof is made. A step of rounding between SFT and DPO shows at 1 or more; the larger it
is, the more of what is left behind is seen. Where θ(α) is so far out that answers are no numbers, the next is taken."""

POLL_SECONDS = 0.05
END_SECONDS = 30.0
"""How long an engine may take to give back its memory."""


@dataclass(frozen=True)
class Proof:
    """Whether an engine can be switched, and what was started to see it."""

    proved: bool
    reason: str
    """How it is known, or why it is not proved, in one sentence without a full stop."""
    worker: Worker | None = None
    """The live process with its engine at the first α; None where nothing was started, or it is not proved."""
    start_seconds: float | None = None
    """From starting a process until its engine has weights; None where nothing was started."""
    switch_seconds: float | None = None
    """The longer of two switches, planning θ(α) not included; None where nothing was switched."""


class _NotProved(Exception):
    """Carries the reason."""


@dataclass(frozen=True)
class _Seen:
    """What came back of one probe, with what it took."""

    answers: list[Probed]
    ready_seconds: float
    start_seconds: float


def prove(make_worker: Callable[[], Worker], first: GenerateJob) -> Proof:
    """See whether a live engine can be switched between the α of a pair, unless that is known already.

    Args:
        make_worker: Makes a worker that stays and was not started.
        first: A job with a θ(α), at whose α the engine is to be afterwards.

    Raises:
        InputError: A process refuses to start with what it is given.
        EnvironmentFailure: A process died before it was switched.
    """
    plan = first.setup.theta
    if plan is None:
        raise InputError("a model that is no θ(α) has no other α to switch to")
    moved = moved_kinds(plan.pair)
    if not moved:
        return Proof(True, "no tensor moves with α")
    key = proof_key(first.engine, first.setup)
    if is_proved(key, moved):
        return Proof(True, "proved before, for this architecture, data type, engine and machine")
    log.info("proving that %s can be switched between α: one start more", first.engine)
    with tempfile.TemporaryDirectory(prefix="expo-") as folder:
        proof = _Prover(make_worker, first, plan.config.alpha, Path(folder) / "answers.json").prove()
    if proof.proved:
        keep_proof(key, moved)
    return proof


@dataclass(frozen=True)
class _Prover:
    """One proof.

    Args:
        make_worker: As `prove` has it.
        first: The job.
        alpha: The first α.
        file: Where processes put their answers.
    """

    make_worker: Callable[[], Worker]
    first: GenerateJob
    alpha: float
    file: Path

    def prove(self) -> Proof:
        """Start, ask and compare; a process is left only where all is proved."""
        bound = bound_of(self.first.config, self.first.setup.model)
        try:
            second, cold = self._cold()
        except _NotProved as why:
            return Proof(False, str(why))
        worker = self.make_worker()
        try:
            before = self._ask(worker, self.alpha)
            try:
                switched, back = self._ask(worker, second), self._ask(worker, self.alpha)
            except ExpoError as error:  # it could be started at both α
                raise _NotProved(f"switching from α = {self.alpha!r} to {second!r} and back fails: {error}") from error
        except _NotProved as why:
            _discard(worker)
            return Proof(False, str(why))
        except BaseException:
            _discard(worker)
            raise
        problem = self._problem(second, cold, before, switched, back, bound)
        start_seconds = max(cold.start_seconds, before.start_seconds)
        switch_seconds = max(switched.ready_seconds, back.ready_seconds)
        if problem is not None:
            worker.end(END_SECONDS)
            return Proof(False, problem, None, start_seconds, switch_seconds)
        how = "equal tokens and log probabilities" if not bound else f"equal tokens, log probabilities within {bound:g}"
        return Proof(True, f"switched to α = {second!r} and back: {how}", worker, start_seconds, switch_seconds)

    def _cold(self) -> tuple[float, _Seen]:
        """A second α, and what an engine that was started there answers.

        Raises:
            _NotProved: At none of them answers are numbers.
        """
        for step in STEPS:
            worker = self.make_worker()
            try:
                seen = self._ask(worker, self.alpha + step)
            except BaseException:
                _discard(worker)
                raise
            worker.end(END_SECONDS)
            if is_finite(seen.answers):
                return self.alpha + step, seen
        raise _NotProved(f"at α = {self.alpha + STEPS[-1]!r} some log probabilities are no numbers")

    def _problem(
        self, second: float, cold: _Seen, before: _Seen, switched: _Seen, back: _Seen, bound: float
    ) -> str | None:
        """Why this proves nothing, or the opposite; None where it is a proof."""
        if not is_finite(before.answers):
            return f"at α = {self.alpha!r} some log probabilities are no numbers"
        if difference(before.answers, cold.answers, bound) is None:
            return f"α = {self.alpha!r} and α = {second!r} give the same answers, so that a switch cannot be seen"
        stale = difference(switched.answers, cold.answers, bound)
        if stale is not None:
            return f"an engine switched to α = {second!r} does not answer as one started there: {stale}"
        moved = difference(back.answers, before.answers, bound)
        return moved and f"an engine switched back to α = {self.alpha!r} does not answer as before: {moved}"

    def _ask(self, worker: Worker, alpha: float) -> _Seen:
        """Have a process open its engine at this α, or switch to it, and say what it answers.

        Raises:
            InputError: It refuses.
            EnvironmentFailure: It died.
        """
        self.file.unlink(missing_ok=True)
        clock = time.perf_counter()
        worker.take(replace(self.first, config=replace(self.first.config, alpha=alpha), probe=self.file))
        worker.start()
        while (code := worker.outcome()) is None:
            time.sleep(POLL_SECONDS)
        if code != 0:
            worker.wait(END_SECONDS)
            reason = worker.last_error_line()
            raise InputError(reason) if code == InputError.exit_code else EnvironmentFailure(reason)
        answers, seconds = read_answers(self.file)
        return _Seen(answers, seconds["ready"], time.perf_counter() - clock - seconds["probe"])


def _discard(worker: Worker) -> None:
    with suppress(Exception):
        worker.kill()
    worker.close()
