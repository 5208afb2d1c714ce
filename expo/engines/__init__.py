"""The engines behind `generate` and `score`: two small protocols and the table of who implements them.

Only the modules in this folder import an engine. To add one, write a module with a class that satisfies
`Generator` or `Scorer` and add a line to `GENERATORS` or `SCORERS`; the contract tests then run on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from expo.tasks import Message

if TYPE_CHECKING:
    from expo.config import GenerateConfig, ScoreConfig
    from expo.theta.pair import ThetaPlan


Key = tuple[str, int, int]
"""Identifies a row: the prompt's id, the sample, the turn."""


@dataclass(frozen=True)
class Request:
    """One answer to generate."""

    id: str
    """The prompt's id."""
    sample: int
    """Which of the prompt's samples."""
    prompt_ids: tuple[int, ...]
    """Token ids of the prompt, as the chat template gives them."""
    max_tokens: int
    """The maximum number of new tokens; prompt and answer together fit the model's context."""
    temperature: float
    """Softmax temperature; 0 decodes greedily. Rows of one run may have different ones."""
    messages: tuple[Message, ...] = ()
    """The conversation, for an engine that applies the chat template itself."""
    turn: int = 0
    """Which of the prompt's turns."""

    @property
    def key(self) -> Key:
        """Identifies the row."""
        return self.id, self.sample, self.turn


@dataclass(frozen=True)
class Completion:
    """One generated answer."""

    request: Request
    token_ids: tuple[int, ...]
    """The new tokens, the stop token included."""
    finish_reason: Literal["stop", "length"]
    """Whether a stop token ended it."""


@dataclass(frozen=True)
class TextCompletion:
    """One answer from an engine that returns text without token ids."""

    request: Request
    text: str
    length: int
    """New tokens, the stop token included."""
    prompt_tokens: int
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Failure:
    """One row that the engine could not answer, although it can answer others; a rerun tries it again."""

    request: Request
    reason: str


Outcome: TypeAlias = Completion | TextCompletion | Failure
"""The result of a request."""


@dataclass(frozen=True)
class GeneratorSetup:
    """What a generator is started with."""

    config: GenerateConfig
    model: Path
    """The model's folder; of no meaning where a server has the model, which `config.model` names."""
    stop_ids: tuple[int, ...]
    """Token ids that end an answer."""
    pad_id: int
    context_length: int
    """Longest prompt + answer of this run, in tokens; at most the model's own."""
    theta: ThetaPlan | None = None
    """The θ(α) to load; None to load the weights in the model's folder."""

    @property
    def name(self) -> str:
        """The model's name in messages."""
        return self.model.name if self.theta is None else self.theta.name


class Generator(Protocol):
    """Generates answers. Made from a `GeneratorSetup`; making it loads the model."""

    repeatable: bool
    """Whether rows do not depend on what else was generated beside them, nor on interruptions."""
    step_seconds: float
    """Time spent inside the engine's own steps so far."""

    def generate(self, requests: Sequence[Request], done: set[Key]) -> Iterator[Sequence[Outcome]]:
        """Yield answers as they finish; closing the iterator cancels unfinished ones. Called once per turn.

        Args:
            requests: All rows of the run's turn, in order.
            done: Keys of rows an earlier run finished; they are not yielded again.
        """

    def versions(self) -> dict[str, str]:
        """Names and versions of the libraries that did the work."""


@dataclass(frozen=True)
class ScorerSetup:
    """What a scorer is started with."""

    config: ScoreConfig
    model: Path
    """The reward model's folder."""
    pad_id: int | None
    """The tokenizer's padding token."""


class Scorer(Protocol):
    """Scores token sequences with a reward model. Made from a `ScorerSetup`; making it loads the model."""

    def score(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """The raw logit of each row.

        Args:
            rows: One batch of token ids, of any lengths.
        """

    def versions(self) -> dict[str, str]:
        """Names and versions of the libraries that did the work."""


GENERATORS = {
    "vllm": "expo.engines.vllm:VllmGenerator",
    "transformers": "expo.engines.transformers:TransformersGenerator",
    "openai": "expo.engines.openai:OpenaiGenerator",
}
SCORERS = {"transformers": "expo.engines.transformers_reward:TransformersScorer"}


def load_generator(name: str) -> Callable[[GeneratorSetup], Generator]:
    """The generator class of that name; importing it imports the engine."""
    factory: Callable[[GeneratorSetup], Generator] = _load(GENERATORS[name])
    return factory


def load_scorer(name: str) -> Callable[[ScorerSetup], Scorer]:
    """The scorer class of that name; importing it imports the engine."""
    factory: Callable[[ScorerSetup], Scorer] = _load(SCORERS[name])
    return factory


def _load(place: str) -> Any:  # noqa: ANN401 - a class; its protocol is checked by the callers' types
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group rows into padded batches of at most `budget` tokens, longest rows first.

    A pure function of all rows' lengths: a rerun groups them as the first run did. Longest first, so that a lack
    of memory shows at once.

    Args:
        lengths: Tokens of each row.
        budget: The maximum number of tokens in a batch, including padding; a longer row is a batch of its own.

    Returns:
        Row numbers, batch by batch.
    """
    batches: list[list[int]] = []
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    for number in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches
