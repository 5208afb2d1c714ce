"""The proof that a live engine can be switched from one α to another: made once, before rows depend on it.

The switched engine must hold the tensors and give the answers of an engine that was started cold at the second α, and
after switching back those it had at the first. So one engine more is started, before the one that stays; two are never
in memory.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from expo.engines.held import coarsest, differing, is_packed
from expo.engines.switching import Reply, bound_of, difference, is_finite
from expo.engines.verdicts import Scope, is_proved, keep_proof, proof_key
from expo.errors import EnvironmentFailure, ExpoError, InputError
from expo.output.findings import Inspection
from expo.rows.cluster import forget_names
from expo.rows.worker import Task, Worker
from expo.theta.moves import moved_kinds, seen_kinds
from expo.theta.pair import ThetaPlan, plan_theta
from expo.verbs.generate import GenerateJob
from expo.verbs.sweep.plan import quiet, theta_of

log = logging.getLogger(__name__)

STEPS = (4.0, 1.0)
"""How far from the first α the proof is made. A step of rounding between SFT and DPO shows at 1 or more; the larger it
is, the more of what is left behind is seen. Where θ(α) is so far out that it, or its answers, are no numbers, the next
is taken."""

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
    kinds: frozenset[str] = frozenset()
    """The kinds of tensors that were seen to move with the switch."""
    fills_block: bool = False
    """Whether the prefix cache held something of the prompts, or there is none."""


class _NotProved(Exception):
    """Carries the reason."""


@dataclass(frozen=True)
class _Seen:
    """What came back of one probe, with what it took."""

    reply: Reply
    start_seconds: float
    """From the job until the engine had its weights, a process that was started for it included."""


@dataclass(frozen=True)
class Elsewhere:
    """Where a proof is made, if not on this machine."""

    hardware: list[str]
    """The machines."""
    folder: Path
    """One that they share with this one."""


def prove(
    make_worker: Callable[[], Worker],
    first: GenerateJob,
    inspected: Inspection | None = None,
    elsewhere: Elsewhere | None = None,
) -> Proof:
    """See whether a live engine can be switched between the α of a pair, unless that is known already.

    Args:
        make_worker: Makes a worker that stays and was not started.
        first: A job with a θ(α), at whose α the engine is to be afterwards.
        inspected: Its pair, where that was inspected: what is identical there need not be read again.
        elsewhere: Where its processes are, if not here.

    Raises:
        InputError: A process refuses to start at the first α.
        EnvironmentFailure: A process died before it was switched.
    """
    if first.setup.in_logit_space:
        return Proof(True, "in logit space both models keep their weights: α is a number of the decoding")
    plan, scope = theta_of(first), _scope(first, inspected)
    if not scope.kinds:
        return Proof(True, "no tensor moves with α")
    key = proof_key(first.engine, first.setup, None if elsewhere is None else elsewhere.hardware)
    if is_proved(key, scope):
        return Proof(True, "tested before for this architecture, data type, engine and machine")
    log.info("testing that %s can be switched between α: one more start", first.engine)
    with _folder_for_answers(elsewhere) as folder:
        proof = _Prover(make_worker, first, plan, scope.kinds, folder / "answers.json").prove()
    if proof.proved:
        keep_proof(key, Scope(proof.kinds, None if proof.fills_block else scope.context))
    return proof


@contextmanager
def _folder_for_answers(elsewhere: Elsewhere | None) -> Iterator[Path]:
    if elsewhere is None:
        with tempfile.TemporaryDirectory(prefix="expo-") as name:
            yield Path(name)
        return
    folder = elsewhere.folder / ".switch"  # also that of a run that was killed in its proof
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder.absolute()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_known(first: GenerateJob, inspected: Inspection | None = None) -> bool:
    """Whether `prove` needs to start nothing."""
    if first.setup.in_logit_space:
        return True
    scope = _scope(first, inspected)
    return not scope.kinds or is_proved(proof_key(first.engine, first.setup), scope)


def _scope(first: GenerateJob, inspected: Inspection | None) -> Scope:
    """What a proof has to be good for."""
    same = [one.name for one in inspected.tensors if one.figures.identical] if inspected else []
    return Scope(moved_kinds(theta_of(first).pair, frozenset(same)), first.setup.context_length)


@dataclass(frozen=True)
class _Prover:
    """One proof.

    Args:
        make_worker: As `prove` has it.
        first: The job.
        theta: Its θ(α), at the first α.
        moved: The kinds of tensors that move.
        file: Where processes put their answers.
    """

    make_worker: Callable[[], Worker]
    first: GenerateJob
    theta: ThetaPlan
    moved: frozenset[str]
    file: Path

    @property
    def alpha(self) -> float:
        """The first α."""
        return self.theta.config.alpha

    @property
    def bound(self) -> float:
        """How far log probabilities may differ, in nats."""
        return bound_of(self.first.config, self.first.setup.model)

    def prove(self) -> Proof:
        """Start, ask and compare; a process is left only where all is proved."""
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
            problem = self._problem(second, cold.reply, before.reply, switched.reply, back.reply)
            kinds = self._kinds(second, cold.reply) if problem is None else frozenset()
        except _NotProved as why:
            discard(worker)
            return Proof(False, str(why))
        except BaseException:
            discard(worker)
            raise
        start_seconds = max(cold.start_seconds, before.start_seconds)
        switch_seconds = max(switched.reply.ready_seconds, back.reply.ready_seconds)
        if problem is not None:
            worker.end(END_SECONDS)
            return Proof(False, problem, None, start_seconds, switch_seconds)
        how = "equal weights, equal tokens and log probabilities"
        how = f"equal weights and tokens, log probabilities within {self.bound:g}" if self.bound else how
        how = f"switched to α = {second!r} and back: {how}"
        return Proof(True, how, worker, start_seconds, switch_seconds, kinds, before.reply.fills_block)

    def _kinds(self, second: float, cold: Reply) -> frozenset[str]:
        """The kinds that differ between the two α as the engine holds them: only these could be seen to stay behind."""
        with quiet(logging.ERROR):
            there = plan_theta(replace(self.theta.config, alpha=second))
        return seen_kinds(self.theta.pair, there.pair, self.moved, coarsest(cold.held))

    def _cold(self) -> tuple[float, _Seen]:
        """A second α, and what an engine that was started there answers.

        Raises:
            _NotProved: At none of them there is a θ(α) whose answers are numbers.
        """
        for step in STEPS:
            second = self.alpha + step
            worker = self.make_worker()
            try:
                seen = self._ask(worker, second)
            except InputError as error:  # such as values too large for float16
                discard(worker)
                why = f"no engine starts at α = {second!r}: {error}"
                continue
            except BaseException:
                discard(worker)
                raise
            worker.end(END_SECONDS)
            if is_finite(seen.reply.answers):
                return second, seen
            why = f"at α = {second!r} some log probabilities are not finite"
        raise _NotProved(why)

    def _problem(self, second: float, cold: Reply, before: Reply, switched: Reply, back: Reply) -> str | None:
        """Why this proves nothing, or the opposite; None where it is a proof."""
        live = (before, switched, back)
        if len({reply.pid for reply in live}) > 1 or [reply.opened for reply in live] != [True, False, False]:
            return "the engine was restarted instead of switched"
        if (unseen := self._unseen(second, cold, before)) is not None:
            return unseen
        there, again = f"an engine switched to α = {second!r}", f"an engine switched back to α = {self.alpha!r}"
        if (stale := differing(switched.held, cold.held)) is not None:
            return f"{there} still holds different values from one started there in {stale}"
        if (stale := difference(switched.answers, cold.answers, self.bound)) is not None:
            return f"{there} answers differently from one started there: {stale}"
        if (moved := differing(back.held, before.held)) is not None:
            return f"{again} holds different values from before in {moved}"
        moved = difference(back.answers, before.answers, self.bound)
        return moved and f"{again} answers differently from before: {moved}"

    def _unseen(self, second: float, cold: Reply, before: Reply) -> str | None:
        """Why one could not see that a switch leaves something behind; None where one can."""
        both = f"α = {self.alpha!r} and α = {second!r}"
        if not is_finite(before.answers):
            return f"at α = {self.alpha!r} some log probabilities are not finite"
        if not cold.held or (self.bound and is_packed(cold.held)):
            return "the engine's weights cannot be compared with those of a newly started one"
        if difference(before.answers, cold.answers, self.bound) is None:
            return f"{both} give the same answers, so a switch cannot be seen"
        if self.bound and differing(before.held, cold.held) is None:
            return f"{both} give the same weights, so a switch cannot be seen"
        return None

    def _ask(self, worker: Worker, alpha: float) -> _Seen:
        """Have a process open its engine at this α, or switch to it, and say what it answers.

        Raises:
            InputError: It refuses.
            EnvironmentFailure: It died.
        """
        job = replace(self.first, config=replace(self.first.config, alpha=alpha), probe=self.file)
        seconds = ask(worker, job, [self.file])
        reply = Reply.read(self.file)
        return _Seen(reply, seconds - reply.probe_seconds)


def ask(worker: Worker, job: Task, files: Sequence[Path]) -> float:
    """Have a process do a job that writes answers to a probe into files; the seconds that it took.

    Raises:
        InputError: It refuses.
        EnvironmentFailure: It died.
    """
    for file in files:
        file.unlink(missing_ok=True)
    clock = time.perf_counter()
    worker.take(job)
    worker.start()
    while (code := worker.outcome()) is None:
        time.sleep(POLL_SECONDS)
    if code != 0:
        worker.wait(END_SECONDS)
        reason = worker.last_error_line()
        raise InputError(reason) if code == InputError.exit_code else EnvironmentFailure(reason)
    forget_names([file.parent for file in files])
    return time.perf_counter() - clock


def discard(worker: Worker) -> None:
    """End a process that is no good."""
    with suppress(Exception):
        worker.kill()
    worker.close()
