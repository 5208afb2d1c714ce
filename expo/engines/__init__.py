"""The engines behind `generate` and `score`: two small protocols, and the tables of who implements them.

Only the modules in this folder import an engine, and only here an engine is told from another by its name: what one can
do, and what has to be known of it before it is imported, is in its line. To add one, write a module with a class that
satisfies `Generator` or `Scorer` and add a line to `GENERATORS` or `SCORERS`; the contract tests then run on it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from expo.config.logit_space import LOGITS
from expo.config.sweep import SFT_ALPHA
from expo.errors import InputError
from expo.settings import flag, settings_of
from expo.tasks import Message

if TYPE_CHECKING:
    from expo.config import EngineConfig, GenerateConfig, RowsConfig, ScoreConfig, ThetaConfig
    from expo.theta.applied import Applied
    from expo.theta.pair import ThetaPlan


log = logging.getLogger(__name__)

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
    seed: int = 0
    """Of its random numbers, 0 ≤ seed < 2³¹ with `--seed-mode row`; engines with noise of their own ignore it."""

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
    length: int | None
    """New tokens, the stop token included; None where the server does not report it."""
    prompt_tokens: int | None
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Failure:
    """One row that the engine could not answer, although it can answer others; a rerun tries it again."""

    request: Request
    reason: str
    lasting: bool = False
    """Whether trying it again with the same settings is not expected to help."""


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
    gpu_share: float | None = None
    """The share of each GPU's memory for an engine that reserves it; None for the engine's own default."""
    applied: Applied | None = None
    """The adapter that makes `theta` of SFT while the engine answers; None to load the weights of `theta` itself."""

    @property
    def name(self) -> str:
        """The model's name in messages."""
        return self.model.name if self.theta is None else self.theta.name

    @property
    def in_logit_space(self) -> bool:
        """Whether α acts on what two models say, and on no weights."""
        return self.config.space == LOGITS

    @property
    def loaded(self) -> ThetaConfig | None:
        """The θ(α) whose weights the engine loads; None for a model's own.

        It is SFT, where an adapter is applied to it, and in logit space DPO, whatever α, beside which SFT is loaded.
        """
        if self.theta is None:
            return None
        if self.in_logit_space:
            return replace(self.theta.config, alpha=0.0)
        if self.applied is None:
            return self.theta.config
        return replace(self.theta.config, alpha=SFT_ALPHA, alpha_for=(), exclude=())

    def weights(self) -> dict[str, Any] | None:
        """What decides the values that it loads, as they are now: two plans of one are one; None for a model's own."""
        return None if self.theta is None or self.loaded is None else self.theta.weights(self.loaded)

    @property
    def _source(self) -> tuple[Path, ...]:
        """The folders of the model; those of a θ(α) are the pair's, whatever α."""
        return (self.model,) if self.theta is None else (self.theta.sft.path, self.theta.dpo.path)

    def takes_over(self, started: GeneratorSetup) -> bool:
        """Whether an engine that was started with another setup can go on with this one, given its weights."""
        names = "device dtype engine_arg tensor_parallel trust_remote_code base_url concurrency space"
        places = [one.applied and one.applied.place for one in (self, started)]
        return (
            (self._source, self.stop_ids, self.pad_id) == (started._source, started.stop_ids, started.pad_id)
            and places[0] == places[1]
            and self.context_length <= started.context_length
            and all(getattr(self.config, name) == getattr(started.config, name) for name in names.split())
        )


class Engine(Protocol):
    """What every engine does: making it opens it."""

    def load(self, setup: Any) -> None:  # noqa: ANN401 - a setup of the engine's kind
        """Go on with another setup that takes over from the present one: other settings, other weights of θ(α).

        Raises:
            InputError: The weights do not fit.
            EnvironmentFailure: Loading failed.
        """

    def close(self) -> None:
        """Give back memory and processes; the engine is not used again."""

    def versions(self) -> dict[str, str]:
        """Names and versions of the libraries that did the work."""


class Generator(Engine, Protocol):
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


@dataclass(frozen=True)
class Probed:
    """What an engine goes on with after one prompt: its own state, as far as it can be seen from outside."""

    token_ids: tuple[int, ...]
    """The most likely tokens, one after the other."""
    log_probs: tuple[float, ...]
    """The natural logarithm of each one's probability, of float32."""


class Prober(Generator, Protocol):
    """A generator that runs here (`local`), and so can be given other weights while it lives."""

    @property
    def block_tokens(self) -> int:
        """How many tokens of a prompt are kept together for prompts that begin alike; 0 where none are."""

    def probe(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Probed]:
        """Decode greedily what follows each prompt, without penalties and whatever ends an answer, as rows are made.

        Args:
            prompts: Token ids.
            new_tokens: The number of tokens for each.
        """

    def held(self) -> list[dict[str, str]]:
        """Each tensor's name and the hash of its bits (`held.py`), for each process that has a part of the model.

        Empty where the engine was started so that it cannot be asked.
        """


@dataclass(frozen=True)
class ScorerSetup:
    """What a scorer is started with."""

    config: ScoreConfig
    model: Path
    """The reward model's folder."""
    context_length: int
    """The longest row of this run, in tokens, or of the runs that the engine stays for."""
    base: Path | None = None
    """Of an adapter: the folder of the model it was trained on."""
    separator: int | None = None
    """Of text pairs with token types: the id after whose first place they are 1."""
    gpu_share: float | None = None
    """As of `GeneratorSetup`."""

    def takes_over(self, started: ScorerSetup) -> bool:
        """Whether an engine that was started with another setup can go on with this one."""
        settings = ("device", "dtype", "engine_arg", "tensor_parallel", "trust_remote_code", "chat_template")
        return (
            (self.model, self.base, self.separator) == (started.model, started.base, started.separator)
            and self.context_length <= started.context_length
            and all(getattr(self.config, name) == getattr(started.config, name) for name in settings)
        )


class Scorer(Engine, Protocol):
    """Scores token sequences with a reward model. Made from a `ScorerSetup`; making it loads the model."""

    def score(self, rows: Sequence[Sequence[int]]) -> Iterator[list[tuple[int, float]]]:
        """Yield the raw logit of each row as it is known, with the row's place in what is given.

        A reward does not depend on the other rows, nor on their order. A causal model is read at a row's last id.
        Closing the iterator gives up the rest.

        Args:
            rows: Token ids of all rows that are to be scored, at least one each, of any lengths.
        """


@dataclass(frozen=True)
class EngineSpec:
    """What is known of an engine before it is imported. Functions are named as `module:function`."""

    place: str
    """Its class, as `module:class`."""
    can: frozenset[str] = frozenset()
    """What settings may ask of it (`Setting.needs`): `local` (it runs here, on a model folder), `server` (it asks one),
    `engine_arg`, `tensor_parallel`, `logits` (it can draw tokens from what two models say), `adapters` (it answers for
    several α in one batch: a `SharedGenerator`)."""
    pads: bool = False
    """Whether it pads rows to batches, so that what changes batches changes rows in their last bits."""
    absent: Mapping[str, object] = field(default_factory=dict)
    """Setting → the value that its outputs without it were made with, where that is not `Setting.absent`."""
    why_not: str | None = None
    """Says why it cannot run here, None where it can; without one it always can."""
    refuses: str | None = None
    """Says why it does not run a model, whatever is asked for: (config, model folder) → text or None."""
    rather_not: str | None = None
    """Says why auto does not take it although it could: config → text or None."""
    settle: str | None = None
    """Resolves settings whose default hangs on this machine: (config, model folder) → config."""
    context_limit: str | None = None
    """The longest sequence that its arguments leave: config → tokens, or None."""
    preload: str | None = None
    """Imports what the engine needs beyond its module: () → None."""

    def call(self, function: str, *arguments: object) -> Any:  # noqa: ANN401 - as the function says
        """Call one of the functions that are named here; None where there is none."""
        place = getattr(self, function)
        return None if place is None else _load(place)(*arguments)

    def load(self) -> Callable[[Any], Any]:
        """The class; importing it imports the engine."""
        found: Callable[[Any], Any] = _load(self.place)
        return found


GENERATORS = {
    "vllm": EngineSpec(
        "expo.engines.vllm:VllmGenerator",
        can=frozenset({"local", "engine_arg", "tensor_parallel", "adapters"}),
        why_not="expo.engines.vllm_tools:why_not",
        rather_not="expo.engines.vllm_tools:rather_not_generate",
        context_limit="expo.engines.vllm_tools:context_limit",
        preload="expo.engines.vllm_tools:import_vllm",
    ),
    "transformers": EngineSpec(
        "expo.engines.transformers:TransformersGenerator",
        can=frozenset({"local", "logits"}),
        pads=True,
        absent={"seed_mode": "row"},
        settle="expo.engines.torch_tools:with_run_dtype",
    ),
    "openai": EngineSpec("expo.engines.openai:OpenaiGenerator", can=frozenset({"server"})),
}
"""Engine → what is known of it; auto takes the first that can run here."""

SCORERS = {
    "vllm": EngineSpec(
        "expo.engines.vllm_reward:VllmScorer",
        can=frozenset({"local", "engine_arg", "tensor_parallel"}),
        why_not="expo.engines.vllm_tools:why_not",
        refuses="expo.engines.vllm_reward:refuses",
        rather_not="expo.engines.vllm_reward:rather_not",
        settle="expo.engines.torch_tools:with_reward_dtype",
        context_limit="expo.engines.vllm_tools:context_limit",
        preload="expo.engines.vllm_tools:import_vllm",
    ),
    "transformers": EngineSpec(
        "expo.engines.transformers_reward:TransformersScorer",
        can=frozenset({"local"}),
        settle="expo.engines.torch_tools:with_reward_dtype",
    ),
}
"""As `GENERATORS`, for reward models."""


def request_seed(config: GenerateConfig, key: Key) -> int:
    """The seed of a row's random numbers, for engines whose requests have one.

    With `--seed-mode row` it is made of `--seed` and the row's key, the same for every model and α, and 0 ≤ seed < 2³¹;
    with `shared` all rows of a sample have one, as in the paper's code.
    """
    name, sample, turn = key
    if config.seed_mode == "shared":
        return config.seed + sample
    digest = hashlib.sha256(f"{config.seed}:{sample}:{turn}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little") & 0x7FFFFFFF


def find_engine(
    engines: Mapping[str, EngineSpec],
    name: str,
    config: EngineConfig | None = None,
    model: Path | None = None,
    why_not: Callable[[str], str | None] = lambda _: None,
) -> tuple[str, EngineSpec]:
    """The engine that `--engine` names; auto is the first that can run, and it says which and why.

    Args:
        engines: The table.
        name: As `--engine` has it.
        config: The settings, where an engine may not be one for every model, or for every setting.
        model: The model's folder, in the first case.
        why_not: Says why the engine of a name does not run this kind of model; None where nothing stands against it.

    Raises:
        InputError: There is none of that name, or it does not run the model.
    """
    if name in engines:
        if (why := why_not(name) or _why_not_for(engines[name], config, model)) is not None:
            raise InputError(f"--engine {name}: {why}")
        return name, engines[name]
    if name != "auto":
        raise InputError(f"--engine must be one of auto, {', '.join(engines)}, not {name!r}")
    reasons: list[str] = []
    for candidate, spec in engines.items():
        unfit = why_not(candidate) or spec.call("why_not") or _why_not_for(spec, config, model)
        reason = unfit or spec.call("rather_not", config)
        if reason is None:
            if len(engines) > 1:
                log.info("engine: %s (%s)", candidate, reasons[-1] if reasons else "it is installed and can run")
            return candidate, spec
        reasons.append(reason)
    raise InputError(f"no engine can run here: {'; '.join(reasons)}")


def _why_not_for(spec: EngineSpec, config: EngineConfig | None, model: Path | None) -> str | None:
    why: str | None = None if model is None else spec.call("refuses", config, model)
    return why


def require_fitting(engines: Mapping[str, EngineSpec], config: RowsConfig, engine: str) -> None:
    """Refuse settings that the engine does not support.

    Raises:
        InputError: There is one.
    """
    can = engines[engine].can
    defaults = {field.name: field.default for field in fields(config)}
    for name, setting in settings_of(type(config)).items():
        if setting.needs not in (None, *can) and getattr(config, name) != defaults[name]:
            able = [other for other, its in engines.items() if setting.needs in its.can]
            plural = "s" if len(able) > 1 else ""
            raise InputError(
                f"{flag(name)} works only with the {' and '.join(able)} engine{plural}, and this run uses {engine}"
            )


def _load(place: str) -> Any:  # noqa: ANN401 - a class or function, whose type the callers know
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
