"""What the contract of `expo.engines.Generator` speaks of, observed on engines: `observe.py SETTINGS STOP_IDS ENGINE…`.

An engine is started once, and then asked in every way; the observations are rows as the journal has them, in the
batches they came in. vLLM needs a process of its own, so they leave it as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from expo.config import GenerateConfig
from expo.engines import Request
from expo.files import Row
from expo.verbs.generate import GenerateJob, plan

Batches = list[list[Row]]


class Engine:
    """One engine, started when it is first asked."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.name = name
        self.settings = settings
        self.generator: Any = None

    def plan(self, **others: Any) -> GenerateJob:
        return plan(GenerateConfig(engine=self.name, **{**self.settings, **others}))

    def ask(
        self,
        work: GenerateJob,
        requests: Sequence[Request] | None = None,
        *,
        done: Collection = (),
        batches: int = 10**6,
    ) -> Batches:
        """The rows as they come; `batches` ends it early."""
        if self.generator is None:
            self.generator = work.open_engine()
        self.generator.load(work.setup)
        came: Batches = []
        with closing(self.generator.generate(work.requests if requests is None else requests, set(done))) as answers:
            for outcomes in answers:
                came.append([work.journal_row(one) for one in outcomes])
                if len(came) == batches:
                    break
        return came


def observe(name: str, settings: dict[str, Any], stop_ids: Sequence[int]) -> dict[str, Batches]:
    """Ask one engine in every way; with `stop_ids` in one of them."""
    engine = Engine(name, settings)
    greedy, sampled = engine.plan(temperature=0.0), engine.plan(n=2)
    half = {request.key for request in sampled.requests[::2]}
    first = engine.ask(greedy)  # with the longest rows of all, for which vLLM is started
    uneven = [replace(one, max_tokens=1 if number % 2 else 48) for number, one in enumerate(greedy.requests)]
    return {
        "greedy": first,
        "closed": engine.ask(greedy, uneven, batches=1),
        "greedy again": engine.ask(greedy),
        "sampled": engine.ask(sampled),
        "half done": engine.ask(sampled, done=half),
        "all done": engine.ask(sampled, done={request.key for request in sampled.requests}),
        "short": engine.ask(engine.plan(max_tokens=3, temperature=0.0)),
        "uneven": engine.ask(greedy, uneven),
        "stopped": engine.ask(engine.plan(temperature=0.0, stop_token_id=tuple(stop_ids))),
    }


def main() -> None:
    settings, stop_ids = map(json.loads, sys.argv[1:3])
    print(json.dumps({name: observe(name, settings, stop_ids) for name in sys.argv[3:]}))


if __name__ == "__main__":
    main()
