"""Generation with vLLM, offline and in this process.

Rows come out of the engine's own step loop as they finish. On a CPU the engine is started so that seeded rows
work and do not depend on their batch; `--engine-arg` overrides anything here. How vLLM is started is in
`vllm_tools.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from expo.engines import Completion, GeneratorSetup, Key, Probed, Request
from expo.engines.refusals import LOAD_FORMAT, reraise_refusals
from expo.engines.vllm_tools import VllmEngine, common_arguments, given_arguments, has_gpu, refusing
from expo.errors import EnvironmentFailure

if TYPE_CHECKING:
    from expo.config import ThetaConfig
    from expo.engines.held import Held
    from expo.theta.applied import Applied

SIZES = frozenset({"max_model_len", "max_num_seqs", "kv_cache_memory_bytes", "gpu_memory_utilization"})
"""Arguments that change how many rows run at once, but no row."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `max_lora_rank`."""

EXTENSION, HELD_EXTENSION = "worker_extension_cls", "expo.engines.held.HeldExtension"
"""What is mixed into vLLM's workers where weights are θ(α)."""

MEMORY_ADVICE = "--engine-arg max_num_seqs=32, or a smaller --max-tokens, needs less memory"


def _make_loader_known(arguments: dict[str, Any]) -> None:
    """Register the loader of θ(α) here; vLLM's other processes find it by its entry point.

    Raises:
        EnvironmentFailure: There are others, and the entry point is not installed.
    """
    alone = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0" and arguments.get("tensor_parallel_size") == 1
    if not alone and not entry_points(group="vllm.general_plugins", name=LOAD_FORMAT):
        raise EnvironmentFailure("vLLM's other processes cannot find expo's loader: reinstall expo with pip")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and LOAD_FORMAT not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = f"{allowed},{LOAD_FORMAT}"
    from expo.engines.vllm_loader import register

    register()


class VllmGenerator(VllmEngine):
    """See `expo.engines.Generator`, and `expo.engines.shared.SharedGenerator`.

    Args:
        setup: What to start.

    Raises:
        MissingExtra: vLLM is not installed.
        InputError: vLLM refuses an engine argument or the model.
        EnvironmentFailure: The engine does not start.
    """

    def __init__(self, setup: GeneratorSetup) -> None:
        self._setup = self._started = setup  # what it was started with lives as long: a θ(α) has links to its files
        self._weights = setup.weights()
        self._asked: dict[str, Request] = {}
        self._numbers: dict[str, int] = {}  # θ(α) → by what number vLLM knows its adapter
        super().__init__(setup.name, engine_arguments(setup), memory_advice=MEMORY_ADVICE)
        self.repeatable = is_repeatable(setup)

    def before_start(self, arguments: dict[str, Any]) -> None:
        """Register the loader of θ(α)."""
        if self._setup.theta is not None:
            _make_loader_known(arguments)

    def generate(self, requests: Sequence[Request], done: set[Key]) -> Iterator[list[Completion]]:
        """Yield rows as the engine finishes them."""
        left = set(self.submit([request for request in requests if request.key not in done], self._setup))
        try:
            while left:
                answers = self.step()
                left.difference_update(name for name, _ in answers)
                if answers:
                    yield [answer for _, answer in answers]
        except GeneratorExit:
            self.give_up([*left])
            raise

    def submit(self, requests: Sequence[Request], setup: GeneratorSetup) -> list[str]:
        """Give the engine requests beside those that it has; its names for them."""
        params_of = functools.cache(functools.partial(_params, setup))  # shared: vLLM copies them for each request
        with refusing("the sampling settings"):
            params = [params_of(request.temperature, request.seed, request.max_tokens) for request in requests]
        names = self._enqueue([request.prompt_ids for request in requests], params, setup)
        self._asked |= dict(zip(names, requests, strict=True))
        return names

    def step(self) -> list[tuple[str, Completion]]:
        """One step of the engine: the requests that it finished."""
        return [(name, _completion(self._asked.pop(name), output)) for name, output in self._finished()]

    def give_up(self, names: Sequence[str]) -> None:
        """Forget requests that are not finished."""
        for name in names:
            self._asked.pop(name, None)
        with suppress(Exception):  # an engine that has died cannot be asked to
            self._llm.llm_engine.abort_request(list(names))

    def probe(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Probed]:
        """What follows each prompt, made as rows are; their beginnings are looked up in the prefix cache, too."""
        return self.probe_together(prompts, new_tokens, [self._setup])[0]

    def probe_together(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, setups: Sequence[GeneratorSetup]
    ) -> list[list[Probed]]:
        """What follows each prompt in each setup, all in one batch."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, logprobs=0, detokenize=False)
        names = [self._enqueue(prompts, [params] * len(prompts), setup) for setup in setups]
        found: dict[str, Any] = {}
        while len(found) < len(setups) * len(prompts):
            found |= dict(self._finished())
        return [[_probed(found[name]) for name in of_setup] for of_setup in names]

    @property
    def block_tokens(self) -> int:
        """The size of a block of the prefix cache; 0 where `--engine-arg` switched it off."""
        cache = self._llm.llm_engine.vllm_config.cache_config
        return int(cache.block_size) if cache.enable_prefix_caching else 0

    def held(self) -> list[Held]:
        """What each tensor-parallel rank holds of θ(α), hashed in its process; empty where that was not mixed into it.

        Raises:
            EnvironmentFailure: The engine died.
        """
        if self._started.theta is None or EXTENSION in given_arguments(self._started.config):
            return []
        llm = self._llm
        with self.running():
            found: list[Held] = self._watched(lambda: llm.collective_rpc("expo_held"))
        return found

    def _enqueue(self, prompts: Sequence[Sequence[int]], params: Sequence[object], setup: GeneratorSetup) -> list[str]:
        """Give the engine prompts; by which names their outputs come."""
        from vllm.inputs import TokensPrompt

        asked = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        adapter = None if setup.applied is None else self._adapter(setup.name, setup.applied)
        with self.running(), refusing(f"the prompts of {setup.name}"):
            names = self._llm.enqueue(asked, params, lora_request=adapter, use_tqdm=False)
        return [_name(name) for name in names]

    def _finished(self) -> list[tuple[str, Any]]:
        """One step of the engine: the names and vLLM's outputs of what it finished."""
        return [(_name(output.request_id), output) for output in self.finished()]

    def _adapter(self, name: str, applied: Applied) -> object:
        """How a request asks for the adapter of a θ(α); it is read when it is first asked for."""
        from vllm.lora.request import LoRARequest

        number = self._numbers.setdefault(name, len(self._numbers) + 1)
        return LoRARequest(name, number, str(applied.folder))

    def load(self, setup: GeneratorSetup) -> None:
        """Go on with other settings, and with the weights of another θ(α) in the live engine.

        An engine whose weights could not be replaced is closed: some layers may have the new ones.
        """
        weights = setup.weights()
        if setup.loaded is not None and weights != self._weights:
            try:
                self._reload(setup.loaded)
            except BaseException:
                self.close()
                raise
        self._setup, self._weights = setup, weights
        self.repeatable = is_repeatable(setup)

    def _reload(self, theta: ThetaConfig) -> None:
        keys = {"load_format": LOAD_FORMAT, "model_loader_extra_config": dataclasses.asdict(theta)}
        llm = self._llm
        with self.running(), reraise_refusals():
            self._watched(lambda: llm.collective_rpc("update_config", args=({"load_config": keys},)))
            self._watched(lambda: llm.collective_rpc("reload_weights"))
            # What the old weights made of prompts, wherever it is kept.
            is_reset = self._watched(lambda: llm.reset_prefix_cache(reset_connector=True))
        if not is_reset:
            raise EnvironmentFailure(
                "vLLM kept a prefix cache made with other weights; rerun the same command to continue"
            )


def _params(setup: GeneratorSetup, temperature: float, seed: int, max_tokens: int) -> object:
    from vllm import SamplingParams

    config = setup.config
    return SamplingParams(
        temperature=temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        presence_penalty=config.presence_penalty,
        frequency_penalty=config.frequency_penalty,
        seed=seed,
        max_tokens=max_tokens,
        stop_token_ids=list(setup.stop_ids),
        detokenize=False,
    )


def _name(engine_id: str) -> str:
    """A request's name, to which the engine may add something of its own."""
    return str(engine_id).split("-")[0]


def _completion(request: Request, output: Any) -> Completion:  # noqa: ANN401 - vLLM's RequestOutput
    best = output.outputs[0]
    return Completion(request, tuple(best.token_ids), "length" if best.finish_reason == "length" else "stop")


def _probed(output: Any) -> Probed:  # noqa: ANN401 - vLLM's RequestOutput
    best = output.outputs[0]
    ids = tuple(best.token_ids)
    return Probed(ids, tuple(known[token].logprob for token, known in zip(ids, best.logprobs, strict=True)))


def engine_arguments(setup: GeneratorSetup) -> dict[str, Any]:
    """The arguments of `vllm.LLM` for a setup; `--engine-arg` wins over all others.

    Raises:
        InputError: `--engine-arg` would change which model answers.
    """
    config = setup.config
    arguments = common_arguments(config, setup.model, setup.context_length, setup.gpu_share)
    arguments |= {"dtype": config.dtype, "seed": config.seed}
    if setup.loaded is not None:
        arguments["load_format"] = LOAD_FORMAT
        arguments[EXTENSION] = HELD_EXTENSION
        arguments["model_loader_extra_config"] = dataclasses.asdict(setup.loaded)
    if setup.applied is not None:
        rank = next((rank for rank in LORA_RANKS if rank >= setup.applied.rank), setup.applied.rank)
        arguments |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": setup.applied.room}
    return arguments | given_arguments(config)


def is_repeatable(setup: GeneratorSetup) -> bool:
    """Whether rows do not depend on their batch: tested on a CPU with expo's arguments; on a GPU vLLM's setting.

    Not with adapters, whose kernels take the rows of all α together.
    """
    if setup.applied is not None:
        return False
    if has_gpu():
        return os.environ.get("VLLM_BATCH_INVARIANT") == "1"
    return given_arguments(setup.config).keys() <= SIZES
