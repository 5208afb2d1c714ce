"""What `expo generate` will do, decided from the prompts and the model's small files."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from expo.checks import require_name
from expo.config import DEFAULT_TEMPERATURE, GenerateConfig
from expo.durable import Row, texts_sha256
from expo.engines import GeneratorSetup, Key, Request
from expo.engines.torch_tools import run_dtype
from expo.engines.vllm import why_not
from expo.fingerprint import Fingerprint
from expo.generate.models import Model, find_model, require_fitting
from expo.generate.turns import Asking, Turn, first_turn, require_one_system_message, rooms_of
from expo.parts import Part, folder_name, read_part
from expo.rows.files import RowFiles, refuse_replacing
from expo.settings import absent_values, recorded
from expo.tasks import Prompt, Task, find_task, load_prompts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Everything `expo generate` will do."""

    config: GenerateConfig
    engine: str
    """The engine, chosen."""
    model: Model
    task: Task
    prompts: tuple[Prompt, ...]
    asking: Asking
    first: Turn
    """What is asked first; later turns are made of its answers."""
    setup: GeneratorSetup
    files: RowFiles
    name: str
    fingerprint: Row
    part: Part | None = None
    """Which part of a run this is; None is the whole."""
    whole: Plan | None = None
    """Of a part: the run it is a part of."""

    @property
    def requests(self) -> tuple[Request, ...]:
        """The first turn's requests."""
        return self.first.requests

    @property
    def turns(self) -> int:
        """The most turns a prompt has."""
        return max((prompt.turns for prompt in self.prompts), default=1)

    @property
    def keys(self) -> list[Key]:
        """All rows, in output order."""
        return [(prompt.id, sample, turn) for prompt, sample, turn in self._rows()]

    @property
    def items(self) -> list[object]:
        """What the rows are made from, in output order."""
        return [prompt.asked(turn) for prompt, _, turn in self._rows()]

    def _rows(self) -> Iterator[tuple[Prompt, int, int]]:
        for prompt in self.prompts:
            yield from ((prompt, sample, turn) for sample in range(self.config.n) for turn in range(prompt.turns))

    def describe(self) -> Row:
        """The plan as plain data."""
        known = self.model.tokenizer is not None
        return {
            **self.model.describe(),
            "engine": self.engine,
            "task": self.task.name,
            **({"part": str(self.part)} if self.part else {}),
            **({"workers": self.config.data_parallel} if self.config.data_parallel > 1 else {}),
            **({"parts_to_join": self.config.join} if self.config.join else {}),
            "rows": len(self.keys),
            "rows_too_long": len(self.first.too_long),
            "temperatures": {str(value): number for value, number in sorted(self._temperatures().items())},
            "prompt_tokens": sum(len(request.prompt_ids) for request in self.requests) if known else None,
            "context_length": self.setup.context_length if known else None,
            "stop_token_ids": list(self.setup.stop_ids),
            "output": str(self.files.final),
        }

    def _temperatures(self) -> Counter[float]:
        """Temperature → how many rows have it."""
        return Counter(self.asking.temperature(prompt) for prompt, _, _ in self._rows())


def plan(config: GenerateConfig) -> Plan:
    """Decide everything from the prompts and the model's small files; nothing is written.

    Raises:
        InputError: The model, the task or a setting is at fault.
        EnvironmentFailure: The hub cannot be reached.
    """
    engine = choose_engine(config)
    task = find_task(config.task)
    if config.temperature is None and not task.temperatures:
        config = replace(config, temperature=DEFAULT_TEMPERATURE)
    model = find_model(config, engine)
    if engine == "transformers":
        config = with_run_dtype(config, model.path)
    prompts = load_prompts(task, config.dataset)
    require_one_system_message(prompts, config)
    dataset_sha256 = texts_sha256(prompt.source if task.by_id else prompt.asked(0) for prompt in prompts)
    prompts = prompts[: config.limit]
    asking = Asking(config, task, model)
    ids = model.encode_each([asking.opening(prompt) for prompt in prompts])
    asking = replace(asking, rooms=rooms_of(asking, prompts, ids))
    first = first_turn(asking, prompts, ids)
    stop_ids = model.stop_ids(config.stop_token_id)
    needed = max((asking.rooms[request.id] for request in first.requests), default=1)
    setup = GeneratorSetup(config, model.path, stop_ids, model.pad_id(stop_ids), needed, model.theta)
    name = config.name or model.name
    require_name(name)
    files = RowFiles(Path(config.output_dir) / f"outputs_{task.name}" / f"{name}{task.suffix}", name, "prompts_sha256")
    if isinstance(file := config.dataset or task.source, str | Path):
        refuse_replacing(Path(file), (files.final, files.meta))
    made_from = {
        "task": task.name,
        "dataset_sha256": dataset_sha256,
        "engine": engine,
        **model.fingerprint,
        **(recorded(config, "batches") if engine == "transformers" else {}),
        **recorded(config, "rows"),
        **({"temperature": dict(task.temperatures)} if config.temperature is None else {}),
    }
    whole = Plan(
        config=config,
        engine=engine,
        model=model,
        task=task,
        prompts=tuple(prompts),
        asking=asking,
        first=first,
        setup=setup,
        files=files,
        name=name,
        fingerprint=Fingerprint(made_from, absent_values(config, "rows", "batches", "weights", engine=engine)),
    )
    return whole if config.part is None else share(whole, read_part(config.part, {}))


def share(whole: Plan, part: Part) -> Plan:
    """What one part of a run will do; all samples of a prompt are in one part."""
    prompts = tuple(part.of(whole.prompts))
    ids = {prompt.id for prompt in prompts}
    folder = whole.files.final.parent / folder_name(whole.name)
    return replace(
        whole,
        prompts=prompts,
        first=whole.first.of(ids),
        files=RowFiles(folder / f"{part.file_stem}.jsonl", part.file_stem, whole.files.items_key),
        part=part,
        whole=whole,
    )


def choose_engine(config: GenerateConfig) -> str:
    """The engine `--engine` names; auto is vLLM where it can run, and says which and why.

    Raises:
        InputError: The setting goes with another engine.
    """
    engine: str = config.engine
    if engine == "auto":
        reason = why_not()
        engine = "vllm" if reason is None else "transformers"
        log.info("engine: %s (%s)", engine, reason or "vLLM is installed and can run")
    require_fitting(config, engine)
    return engine


def with_run_dtype(config: GenerateConfig, model: Path) -> GenerateConfig:
    """The settings with the data type the transformers engine runs in, so that it is recorded and compared."""
    weights_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    dtype = run_dtype(config.dtype, config.device, weights_bytes)
    if dtype != config.dtype:
        log.info("dtype: %s (this CPU has no bfloat16 arithmetic; --dtype bfloat16 takes half the memory)", dtype)
    return replace(config, dtype=dtype)
