"""One engine for several jobs at once: each has a seat, and the engine the requests of all of them in one batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from expo.engines import GeneratorSetup, Key, Outcome, Probed, Prober, Request
from expo.errors import EnvironmentFailure
from expo.rows import EngineKeeper, RowJob


class SharedGenerator(Prober, Protocol):
    """A generator that takes requests of several setups beside each other (`adapters`)."""

    def submit(self, requests: Sequence[Request], setup: GeneratorSetup) -> list[str]:
        """Give the engine requests beside those that it has; its names for them.

        Args:
            requests: What is asked.
            setup: Whose θ(α) answers.

        Raises:
            InputError: The engine refuses them.
            EnvironmentFailure: It has died.
        """

    def step(self) -> list[tuple[str, Outcome]]:
        """Work on all requests for a while: the names and answers of those that are finished.

        Raises:
            EnvironmentFailure: The engine has died.
        """

    def give_up(self, names: Sequence[str]) -> None:
        """Forget requests that are not finished, as far as the engine lives."""

    def probe_together(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, setups: Sequence[GeneratorSetup]
    ) -> list[list[Probed]]:
        """As `Prober.probe`, of several setups in one batch: for each the answers to all prompts."""


class Seats(EngineKeeper):
    """Gives each of several jobs a seat at one engine.

    Args:
        keeper: Has the engine, which is opened for the first of them and is there after the last.
    """

    is_shared = True

    def __init__(self, keeper: EngineKeeper) -> None:
        super().__init__()
        self._keeper = keeper
        self._engine: SharedGenerator | None = None
        self._setup: GeneratorSetup | None = None
        self._seats: list[Seat] = []

    def engine_for(self, job: RowJob) -> Any:  # noqa: ANN401 - as the parent class has it
        """A seat for a job.

        Raises:
            EnvironmentFailure: It needs another engine than those before it.
        """
        setup: Any = job.setup
        if self._engine is None or self._setup is None:
            self._engine, self._setup = self._keeper.engine_for(job), setup
            self.opened = self._keeper.opened
        elif not setup.takes_over(self._setup):
            raise EnvironmentFailure(f"{job.name} needs another engine than the jobs beside it")
        self._seats.append(Seat(self, self._engine, setup))
        return self._seats[-1]

    def step(self, engine: SharedGenerator) -> None:
        """Have the engine work, and hand out its answers; its time is that of the seats that wait, in equal parts."""
        started = time.perf_counter()
        answers = engine.step()
        waiting = [seat for seat in self._seats if seat.waits]
        for seat in waiting:
            seat.step_seconds += (time.perf_counter() - started) / len(waiting)
        for name, answer in answers:
            for seat in waiting:
                seat.hand(name, answer)

    def close(self) -> None:
        """The engine is the keeper's."""


class Seat:
    """A job's place at an engine: what a run needs of a `Generator`, which is the others' to load and close.

    While it waits it yields nothing, so that whoever runs the jobs can go on with another one.
    """

    def __init__(self, seats: Seats, engine: SharedGenerator, setup: GeneratorSetup) -> None:
        self.repeatable = engine.repeatable
        self.step_seconds = 0.0
        self._seats, self._engine, self._setup = seats, engine, setup
        self._asked: set[str] = set()
        self._answers: list[Outcome] = []

    @property
    def waits(self) -> bool:
        """Whether it has requests that are not finished."""
        return bool(self._asked)

    def hand(self, name: str, answer: Outcome) -> None:
        """Take an answer, if the request was asked from here."""
        if name in self._asked:
            self._asked.remove(name)
            self._answers.append(answer)

    def generate(self, requests: Sequence[Request], done: set[Key]) -> Iterator[Sequence[Outcome]]:
        """As `Generator`."""
        todo = [request for request in requests if request.key not in done]
        self._asked = set(self._engine.submit(todo, self._setup))
        try:
            yield []  # the others ask, too, before the engine works
            while self.waits or self._answers:
                if not self._answers:
                    self._seats.step(self._engine)
                answers, self._answers = self._answers, []
                yield answers
        except GeneratorExit:
            self._engine.give_up(list(self._asked))
            raise

    def versions(self) -> dict[str, str]:
        """As `Engine`."""
        return self._engine.versions()
