"""Whether the policy's engine may have all α of a LoRA pair in one batch, each as an adapter: tried, and timed.

An engine that applies the adapters is asked for two α in one batch, and its answers for the larger one are compared
with those of an engine that was started with that θ(α); both are timed. The adapter's product is added while the engine
works, and θ(α) was rounded to its data type when it was made, so that log probabilities agree within rounding.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from expo.engines.switching import Reply, difference, is_finite, rounding_of
from expo.engines.verdicts import Scope, is_proved, keep_proof, proof_key
from expo.errors import ExpoError
from expo.files import Row
from expo.rows.together import Together
from expo.rows.worker import Worker
from expo.theta.applied import rank_of
from expo.theta.moves import moved_kinds
from expo.verbs.generate import GenerateJob
from expo.verbs.sweep.plan import theta_of
from expo.verbs.sweep.switch import END_SECONDS, ask, discard

log = logging.getLogger(__name__)

ROOM = 8
"""How many α an engine has room for in one batch, at most; further ones wait for those before them."""
SLOWER = 1.1
"""How much longer a batch may take than with loaded weights, unless adapters are asked for: what is saved is a reload
for each α, and waiting for its last answers."""


@dataclass(frozen=True)
class Trial:
    """Whether adapters are applied."""

    works: bool
    reason: str
    """How it is known, or what stands against it, in one sentence without a full stop."""
    worker: Worker | None = None
    """The live process with its engine, where it works and one was started."""
    slowdown: float | None = None
    """A batch's time over that with loaded weights; None where nothing was timed."""


def room_for(alphas: Collection[float]) -> int:
    """How many α an engine has room for in one batch."""
    return min(len(alphas), ROOM)


def try_adapters(
    make_worker: Callable[[], Worker], first: GenerateJob, alphas: Collection[float], *, insist: bool
) -> Trial:
    """See whether an engine has all α in one batch, unless that is known already.

    Args:
        make_worker: Makes a worker that stays and was not started.
        first: A job of the pair.
        alphas: All that are known so far.
        insist: Whether it may be slower than loading weights.

    Raises:
        InputError: A process refuses to start with loaded weights.
        EnvironmentFailure: It died.
    """
    theta = theta_of(first)
    scope = Scope(moved_kinds(theta.pair), None)
    key = {**proof_key(first.engine, first.setup), "adapter": [rank_of(theta.pair), room_for(alphas)]}
    verdicts: dict[bool, Row] = {is_fast: {**key, "is_fast": is_fast} for is_fast in (True, False)}
    known = next((is_fast for is_fast, verdict in verdicts.items() if is_proved(verdict, scope)), None)
    if known is not None:
        works = known or insist
        return Trial(works, f"{'tried' if works else 'slower'} before for this architecture, data type and machine")
    log.info("trying whether %s can have all α in one batch as adapters: one more start", first.engine)
    with tempfile.TemporaryDirectory(prefix="expo-") as name:
        found = _trial(make_worker, first, (0.0, max(alphas)), room_for(alphas), Path(name))
    if found.worker is None or found.slowdown is None:
        return found
    is_fast = found.slowdown <= SLOWER
    keep_proof(verdicts[is_fast], scope)
    if is_fast or insist:
        return found
    found.worker.end(END_SECONDS)
    reason = f"a batch takes {found.slowdown:.2g} times as long as with loaded weights"
    return Trial(False, reason, None, found.slowdown)


def _trial(
    make_worker: Callable[[], Worker], first: GenerateJob, alphas: tuple[float, float], room: int, folder: Path
) -> Trial:
    files = [folder / f"{number}.json" for number in range(2)]
    near, far = (
        replace(first, config=replace(first.config, alpha=alpha), probe=file, timed=True)
        for alpha, file in zip(alphas, files, strict=True)
    )
    cold = make_worker()
    try:
        ask(cold, far, files[1:])
        loaded = Reply.read(files[1])
    except BaseException:
        discard(cold)
        raise
    cold.end(END_SECONDS)
    worker = make_worker()
    try:
        ask(worker, Together((replace(near, room=room), replace(far, room=room))), files)
    except ExpoError as error:  # it could be started with loaded weights
        discard(worker)
        return Trial(False, f"an engine that applies adapters fails: {error}")
    except BaseException:
        discard(worker)
        raise
    at_near, at_far = map(Reply.read, files)
    bound = rounding_of(first.config, first.setup.model)
    slowdown = (at_far.batch_seconds or 0.0) / (loaded.batch_seconds or 1.0)
    if (problem := _problem(loaded, at_near, at_far, far.config.alpha, bound)) is not None:
        worker.end(END_SECONDS)
        return Trial(False, problem, None, slowdown)
    reason = f"at α = {far.config.alpha!r}, in a batch with α = {near.config.alpha!r}, the tokens are those of loaded "
    reason += f"weights, and log probabilities differ by less than {bound:.2g}"
    return Trial(True, reason, worker, slowdown)


def _problem(loaded: Reply, near: Reply, far: Reply, alpha: float | None, bound: float) -> str | None:
    """Why an engine with adapters does not do; None where it does."""
    if not is_finite(loaded.answers):
        return f"at α = {alpha!r} some log probabilities are not finite"
    if (other := difference(far.answers, loaded.answers, bound)) is not None:
        return f"applied as an adapter, α = {alpha!r} gives other answers than loaded: {other}"
    if difference(near.answers, far.answers, bound) is None:
        return f"two α give the same answers, so that it cannot be seen whether α = {alpha!r} is applied"
    return None
