"""What `expo generate` will do, decided from the prompts and the model's small files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from expo.backends import GeneratorSetup, Request
from expo.backends.chat import ChatTokenizer, context_length
from expo.backends.vllm import why_not
from expo.checkpoint import PARTIAL_FOLDER, read_config, source_fingerprint
from expo.config import GenerateConfig
from expo.errors import InputError
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
    requests: tuple[Request, ...]
    """Prompt-major, one per sample; rows without one do not fit the context."""
    too_long: dict[tuple[str, int], str]
    """Row key → why it has no request."""
    tokenizer: ChatTokenizer
    setup: GeneratorSetup
    files: RowFiles
    name: str
    fingerprint: Row
    part: Part | None = None
    """Which part of a run this is; None is the whole."""
    whole: Plan | None = None
    """Of a part: the run it is a part of."""

    @property
    def keys(self) -> list[tuple[str, int]]:
        """All rows, in output order."""
        return [(prompt.id, sample) for prompt in self.prompts for sample in range(self.config.n)]

    @property
    def items(self) -> list[object]:
        """What the rows are made from, in output order."""
        return [prompt.item for prompt in self.prompts for _ in range(self.config.n)]

    def describe(self) -> Row:
        """The plan as plain data."""
        return {
            "model": str(self.location.path),
            "engine": self.engine,
            "task": self.task.name,
            **({"part": str(self.part)} if self.part else {}),
            **({"workers": self.config.data_parallel} if self.config.data_parallel > 1 else {}),
            **({"parts_to_join": self.config.join} if self.config.join else {}),
            "rows": len(self.keys),
            "rows_too_long": len(self.too_long),
            "prompt_tokens": sum(len(request.prompt_ids) for request in self.requests),
            "context_length": self.setup.context_length,
            "stop_token_ids": list(self.setup.stop_ids),
            "output": str(self.files.final),
        }


def plan(config: GenerateConfig) -> Plan:
    """Decide everything from the prompts and the model's small files; nothing is written.

    Raises:
        InputError: The model, the task or a setting is at fault.
        EnvironmentFailure: The hub cannot be reached.
    """
    engine = choose_engine(config)
    task = find_task(config.task)
    location = locate(config.model)
    require_generator(location.path)
    prompts = load_prompts(task, config.dataset)
    dataset_sha256 = texts_sha256(prompt.item for prompt in prompts)
    prompts = prompts[: config.limit]
    tokenizer = ChatTokenizer(location.path, template=config.chat_template, trust_remote_code=config.trust_remote_code)
    ids = tokenizer.encode([_messages(prompt, config) for prompt in prompts], generation_prompt=True)
    limit = context_length(location.path)
    requests, too_long = _requests(config, prompts, ids, limit)
    stop_ids = tuple(sorted({*tokenizer.stop_ids(), *config.stop_token_id}))
    needed = max((len(request.prompt_ids) + request.max_tokens for request in requests), default=1)
    pad_id = tokenizer.pad_id if tokenizer.pad_id is not None else (*stop_ids, 0)[0]
    setup = GeneratorSetup(config, location.path, stop_ids, pad_id, min(limit, needed))
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
    }
    whole = Plan(
        config=config,
        engine=engine,
        location=location,
        task=task,
        prompts=tuple(prompts),
        requests=requests,
        too_long=too_long,
        tokenizer=tokenizer,
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
        requests=tuple(request for request in whole.requests if request.id in ids),
        too_long={key: reason for key, reason in whole.too_long.items() if key[0] in ids},
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


def _messages(prompt: Prompt, config: GenerateConfig) -> Sequence[dict[str, str]]:
    system = [{"role": "system", "content": config.system}] if config.system is not None else []
    return [*system, *prompt.messages]


def _requests(
    config: GenerateConfig, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], limit: int
) -> tuple[tuple[Request, ...], dict[tuple[str, int], str]]:
    requests, too_long = [], {}
    for prompt, prompt_ids in zip(prompts, ids, strict=True):
        room = limit - len(prompt_ids)
        for sample in range(config.n):
            if room < 1:
                too_long[prompt.id, sample] = f"the prompt has {len(prompt_ids)} tokens, the model takes {limit}"
            else:
                max_tokens = min(config.max_tokens, room)
                messages = tuple(_messages(prompt, config))
                requests.append(Request(prompt.id, sample, tuple(prompt_ids), max_tokens, config.temperature, messages))
    return tuple(requests), too_long
