"""Generation with vLLM, offline and in this process.

Rows come out of the engine's own step loop as they finish. On a CPU the engine is started so that seeded rows
work and do not depend on their batch; `--engine-arg` overrides anything here. How vLLM is started is in
`vllm_tools.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from expo.config import GenerateConfig
from expo.engines import Completion, GeneratorSetup, Key, Probed, Request
from expo.engines.refusals import LOAD_FORMAT, reraise_refusals
from expo.engines.vllm_tools import VllmEngine, common_arguments, given_arguments, has_gpu, refusing
from expo.errors import EnvironmentFailure

if TYPE_CHECKING:
    from expo.engines.held import Held
    from expo.theta.pair import ThetaPlan

SIZES = frozenset({"max_model_len", "max_num_seqs", "kv_cache_memory_bytes", "gpu_memory_utilization"})
"""Arguments that change how many rows run at once, but no row."""

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
    """See `expo.engines.Generator`.

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
        super().__init__(setup.name, engine_arguments(setup), memory_advice=MEMORY_ADVICE)
        self.repeatable = is_repeatable(setup.config)

    def before_start(self, arguments: dict[str, Any]) -> None:
        """Register the loader of θ(α)."""
        if self._setup.theta is not None:
            _make_loader_known(arguments)

    def generate(self, requests: Sequence[Request], done: set[Key]) -> Iterator[list[Completion]]:
        """Yield rows as the engine finishes them."""
        todo = [request for request in requests if request.key not in done]
        params_of = functools.cache(self._params)  # rows of one seed share them: vLLM copies them for each request
        with refusing("the sampling settings"):
            params = [params_of(request.temperature, request.seed, request.max_tokens) for request in todo]
        with closing(self._answers([request.prompt_ids for request in todo], params)) as answers:
            for finished in answers:
                yield [_completion(todo[number], output) for number, output in finished]

    def probe(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Probed]:
        """What follows each prompt, made as rows are; their beginnings are looked up in the prefix cache, too."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, logprobs=0, detokenize=False)
        found = dict(pair for finished in self._answers(prompts, [params] * len(prompts)) for pair in finished)
        return [_probed(found[number]) for number in range(len(prompts))]

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

    def _answers(
        self, prompts: Sequence[Sequence[int]], params: Sequence[object]
    ) -> Generator[list[tuple[int, Any]], None, None]:
        """The prompts' numbers and vLLM's outputs, as the engine finishes them; closing it gives up the rest."""
        from vllm.inputs import TokensPrompt

        asked = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        with self.running(), refusing(f"the prompts of {self._setup.name}"):
            engine_ids = self._llm.enqueue(asked, params, use_tqdm=False)
        numbers = {str(name).split("-")[0]: number for number, name in enumerate(engine_ids)}
        engine = self._llm.llm_engine
        while engine.has_unfinished_requests():
            finished = [(numbers[output.request_id.split("-")[0]], output) for output in self.finished()]
            if finished:
                try:
                    yield finished
                except GeneratorExit:
                    engine.abort_request(list(numbers))
                    raise

    def _params(self, temperature: float, seed: int, max_tokens: int) -> object:
        from vllm import SamplingParams

        config = self._setup.config
        return SamplingParams(
            temperature=temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            presence_penalty=config.presence_penalty,
            frequency_penalty=config.frequency_penalty,
            seed=seed,
            max_tokens=max_tokens,
            stop_token_ids=list(self._setup.stop_ids),
            detokenize=False,
        )

    def load(self, setup: GeneratorSetup) -> None:
        """Go on with other settings, and with the weights of another θ(α) in the live engine.

        An engine whose weights could not be replaced is closed: some layers may have the new ones.
        """
        weights = setup.weights()
        if setup.theta is not None and weights != self._weights:
            try:
                self._reload(setup.theta)
            except BaseException:
                self.close()
                raise
        self._setup, self._weights = setup, weights
        self.repeatable = is_repeatable(setup.config)

    def _reload(self, theta: ThetaPlan) -> None:
        keys = {"load_format": LOAD_FORMAT, "model_loader_extra_config": dataclasses.asdict(theta.config)}
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
    if setup.theta is not None:
        arguments["load_format"] = LOAD_FORMAT
        arguments[EXTENSION] = HELD_EXTENSION
        arguments["model_loader_extra_config"] = dataclasses.asdict(setup.theta.config)
    return arguments | given_arguments(config)


def is_repeatable(config: GenerateConfig) -> bool:
    """Whether rows do not depend on their batch: tested on a CPU with expo's arguments; on a GPU vLLM's setting."""
    if has_gpu():
        return os.environ.get("VLLM_BATCH_INVARIANT") == "1"
    return given_arguments(config).keys() <= SIZES
