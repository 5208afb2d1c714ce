"""What `expo generate` will do, decided from the prompts and the model's small files."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from expo.backends import GeneratorSetup, Key, Request
from expo.backends.chat import ChatTokenizer, context_length
from expo.backends.vllm import why_not
from expo.checkpoint import PARTIAL_FOLDER, read_config, source_fingerprint
from expo.config import DEFAULT_TEMPERATURE, GenerateConfig
from expo.errors import InputError
from expo.generate.turns import Asking, Turn, first_turn, require_one_system_message, rooms_of
from expo.hub import Location, locate
from expo.parts import Part, folder_name, read_part
from expo.store import Row, RowFiles, texts_sha256
from expo.tasks import Prompt, Task, find_task, load_prompts

RESULT_SETTINGS = (
    *("dtype", "engine_arg", "system", "n", "temperature", "top_k", "top_p", "presence_penalty"),
    *("frequency_penalty", "seed", "max_tokens", "stop_token_id"),
)
"""The settings that change the rows, beside the model, the task and the engine."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Everything `expo generate` will do."""

    config: GenerateConfig
    engine: str
    """The engine, chosen."""
    location: Location
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
    def tokenizer(self) -> ChatTokenizer:
        """The model's tokenizer."""
        return self.asking.tokenizer

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
        return {
            "model": str(self.location.path),
            "engine": self.engine,
            "task": self.task.name,
            **({"part": str(self.part)} if self.part else {}),
            "rows": len(self.keys),
            "rows_too_long": len(self.first.too_long),
            "temperatures": {str(value): number for value, number in sorted(self._temperatures().items())},
            "prompt_tokens": sum(len(request.prompt_ids) for request in self.requests),
            "context_length": self.setup.context_length,
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
    location = locate(config.model)
    require_generator(location.path)
    prompts = load_prompts(task, config.dataset)
    require_one_system_message(prompts, config)
    dataset_sha256 = texts_sha256(prompt.source if task.by_id else prompt.asked(0) for prompt in prompts)
    prompts = prompts[: config.limit]
    tokenizer = ChatTokenizer(location.path, template=config.chat_template, trust_remote_code=config.trust_remote_code)
    asking = Asking(config, task, tokenizer, context_length(location.path))
    ids = tokenizer.encode([asking.opening(prompt) for prompt in prompts], generation_prompt=True)
    asking = replace(asking, rooms=rooms_of(asking, prompts, ids))
    first = first_turn(asking, prompts, ids)
    stop_ids = tuple(sorted({*tokenizer.stop_ids(), *config.stop_token_id}))
    needed = max((asking.rooms[request.id] for request in first.requests), default=1)
    pad_id = tokenizer.pad_id if tokenizer.pad_id is not None else (*stop_ids, 0)[0]
    setup = GeneratorSetup(config, location.path, stop_ids, pad_id, needed)
    name = config.name or location.name
    files = RowFiles(Path(config.output_dir) / f"outputs_{task.name}" / f"{name}{task.suffix}", name, "prompts_sha256")
    made_from = {
        "task": task.name,
        "dataset_sha256": dataset_sha256,
        "model": source_fingerprint(location),
        "engine": engine,
        "chat_template": sha256(tokenizer.template.encode()).hexdigest(),
        **({"batch_tokens": config.batch_tokens} if engine == "transformers" else {}),
        **{key: _plain(getattr(config, key)) for key in RESULT_SETTINGS},
        **({"temperature": dict(task.temperatures)} if config.temperature is None else {}),
    }
    whole = Plan(
        config=config,
        engine=engine,
        location=location,
        task=task,
        prompts=tuple(prompts),
        asking=asking,
        first=first,
        setup=setup,
        files=files,
        name=name,
        fingerprint=made_from,
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
    if engine != "vllm" and config.engine_arg:
        raise InputError(f"--engine-arg is for the vllm engine, and this run uses {engine}")
    return engine


def require_generator(path: Path) -> None:
    """Refuse a model folder that cannot answer: one expo has not finished writing, or a reward model.

    Raises:
        InputError: It is one of these.
    """
    for architecture in read_config(path).get("architectures") or []:
        if str(architecture).endswith("ForSequenceClassification"):
            raise InputError(f"{path.name} is a {architecture}: it scores and cannot generate")
    if (path / PARTIAL_FOLDER).exists():
        raise InputError(f"{path} is an unfinished output of expo: run the command that makes it again")


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
