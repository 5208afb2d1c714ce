"""Reward models with vLLM's pooling: the raw logit of each row, from the engine's own step loop.

Which architectures it is taken for is in `reward_classes.py`. How vLLM is started is in `vllm_tools.py`.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeAlias

from expo.config import ScoreConfig
from expo.engines import ScorerSetup
from expo.engines.reward_classes import class_name, head_dimension, why_not_in_vllm
from expo.engines.torch_tools import own_dtype
from expo.engines.vllm_tools import VllmEngine, common_arguments, given_arguments, has_gpu, refusing
from expo.errors import InputError

MEMORY_ADVICE = "--engine-arg max_num_seqs=32, or a smaller --max-length, needs less memory"

UNDER_WAY = 1024
"""Rows that the engine is given at a time: more than run at once, and few enough that the first finish at once."""

CPU_HEAD_DIMENSION = 32
"""The smallest dimension of attention heads that vLLM 0.32 runs on a CPU."""

OWN = ("runner", "convert", "pooler_config", "hf_overrides")
"""Arguments that make a reward what it is."""


Rewards: TypeAlias = list[tuple[int, float]]
"""Row numbers and rewards."""


class VllmScorer(VllmEngine):
    """See `expo.engines.Scorer`.

    Args:
        setup: What to start.

    Raises:
        MissingExtra: vLLM is not installed.
        InputError: vLLM refuses an engine argument or the model.
        EnvironmentFailure: The engine does not start.
    """

    def __init__(self, setup: ScorerSetup) -> None:
        self._name = setup.model.name
        self._longest = setup.context_length
        super().__init__(self._name, engine_arguments(setup), memory_advice=MEMORY_ADVICE)

    def score(self, rows: Sequence[Sequence[int]]) -> Iterator[Rewards]:
        """Yield rewards as the engine finishes rows, longest first.

        vLLM 0.32 on a CPU leaves what is not a number in its attention's buffers, where the next rows find it. So a row
        that gives none is asked again by itself, after one that has written over them, and what it gives then counts.
        """
        unsure: list[int] = []
        sound: Sequence[int] = ()
        longest_first = sorted(range(len(rows)), key=lambda number: (-len(rows[number]), number))
        with closing(self._run(rows, longest_first)) as running:
            for rewards in running:
                unsure += [number for number, reward in rewards if math.isnan(reward)]
                if numbers := [(number, reward) for number, reward in rewards if not math.isnan(reward)]:
                    sound = rows[numbers[0][0]]
                    yield numbers
        for number in unsure:
            if sound:
                list(self._run([[*islice(cycle(sound), self._longest)]], [0]))
            yield from self._run(rows, [number])

    def _run(self, rows: Sequence[Sequence[int]], order: Sequence[int]) -> Generator[Rewards, None, None]:
        """Rewards of the rows of these numbers, given to the engine in this order."""
        from vllm import PoolingParams
        from vllm.inputs import TokensPrompt

        params = PoolingParams(task="classify", use_activation=False)
        engine, waiting = self._llm.llm_engine, iter(order)
        under_way: set[str] = set()
        try:
            while True:
                with self.running(), refusing(f"the rows for {self._name}"):
                    for number in islice(waiting, UNDER_WAY - len(under_way)):
                        engine.add_request(str(number), TokensPrompt(prompt_token_ids=list(rows[number])), params)
                        under_way.add(str(number))
                if not under_way:
                    return
                finished = self.finished()
                under_way.difference_update(output.request_id for output in finished)
                if finished:
                    yield [(int(output.request_id), self._reward(output)) for output in finished]
        finally:
            if under_way:
                engine.abort_request(list(under_way))

    def _reward(self, output: Any) -> float:  # noqa: ANN401 - vLLM's PoolingRequestOutput
        numbers = output.outputs.data.flatten().tolist()
        if len(numbers) != 1:
            raise InputError(f"{self._name} gives {len(numbers)} numbers for a row; a reward model gives one")
        return float(numbers[0])

    def load(self, setup: ScorerSetup) -> None:
        """Go on with other settings; none of them is the engine's."""


def engine_arguments(setup: ScorerSetup) -> dict[str, Any]:
    """The arguments of `vllm.LLM` for a setup; `--engine-arg` adds to them.

    Raises:
        InputError: `--engine-arg` would change which model answers, or what a reward is.
    """
    config = setup.config
    given = given_arguments(config)
    for key in OWN:
        if key in given:
            raise InputError(f"--engine-arg {key} is set by expo: changing it would change the rewards")
    # vLLM would run a float32 checkpoint in half precision, and read the labels from a config that may not say them
    return {
        **common_arguments(config, setup.model, setup.context_length, setup.gpu_share),
        "dtype": own_dtype(setup.model) if config.dtype == "auto" else config.dtype,
        "runner": "pooling",
        "convert": "classify",
        "pooler_config": {"use_activation": False},
        "hf_overrides": {"architectures": [class_name(setup.model)], "num_labels": 1},
        "enable_prefix_caching": False,
        **given,
    }


def refuses(config: ScoreConfig, model: Path) -> str | None:
    """Why vLLM does not run a reward model here; None where it does, and expo has compared its rewards."""
    if (why := why_not_in_vllm(model, trust_remote_code=config.trust_remote_code)) is not None or has_gpu():
        return why
    dimension = head_dimension(model)
    if dimension is None or dimension >= CPU_HEAD_DIMENSION:
        return None
    return f"{model.name} has attention heads of {dimension} dimensions, and vLLM on a CPU needs {CPU_HEAD_DIMENSION}"


def rather_not(config: ScoreConfig) -> str | None:
    """Why auto does not take it although it could."""
    if config.device != "auto":
        return "--device is for transformers"
    return None if has_gpu() else "on a CPU transformers is faster and starts sooner"
