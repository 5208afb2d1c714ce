"""A task's prompts: from its data set on the hub, another one, or a file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from expo.checkpoint.hub import explain, fetch_file, is_offline, network_errors, require_usable_token
from expo.durable import Row
from expo.errors import EnvironmentFailure, ExpoError, InputError, first_line
from expo.files import is_utf8, repeated
from expo.tasks.files import SUFFIXES, read_rows
from expo.tasks.prompts import Prompt, Source, Task

log = logging.getLogger(__name__)


def load_prompts(task: Task, dataset: str | None = None) -> list[Prompt]:
    """All of a task's prompts.

    Args:
        task: The task.
        dataset: A local file, or a hub data set (`id` or `id@revision`), to read instead of the task's own.

    Raises:
        InputError: No such file, or a row without a prompt.
        EnvironmentFailure: The hub cannot be reached.
    """
    source, name = _source(task, dataset)
    rows = read_rows(source) if isinstance(source, Path) else _load_from_hub(source)
    prompts = list(_prompts(task, rows, name))
    if not prompts:
        raise InputError(f"{name} holds no prompts")
    return _with_ids(task, prompts, name)


def _prompts(task: Task, rows: Sequence[Row], name: str) -> Iterator[Prompt]:
    for number, row in enumerate(rows):
        try:
            prompt = task.read(row)
        except InputError as error:
            raise InputError(f"row {number} of {name} {error}") from error
        turns = (*prompt.messages, *prompt.followups)
        if not all(is_utf8(text) for text in (prompt.id, *(turn["content"] for turn in turns))):
            raise InputError(f"row {number} of {name} holds half of a surrogate pair, which is no text")
        yield prompt


def _source(task: Task, dataset: str | None) -> tuple[Source | Path, str]:
    if dataset is None:
        return task.source, task.name if isinstance(task.source, Source) else str(task.source)
    path = Path(dataset).expanduser()
    if path.is_file():
        return path, dataset
    if path.suffix.lower() in SUFFIXES or path.is_absolute() or path.is_dir():
        raise InputError(f"no such prompt file: {dataset}")
    if not isinstance(task.source, Source):
        return Source(dataset), dataset
    if dataset.partition("@")[0] == task.source.repository:  # another revision of the task's own
        return replace(task.source, repository=dataset), dataset
    return Source(dataset, task.source.split), dataset


def _with_ids(task: Task, prompts: list[Prompt], name: str) -> list[Prompt]:
    """The rows' own ids where all have one of their own, else their numbers."""
    again = repeated(prompt.id for prompt in prompts)
    if again is None and all(prompt.id for prompt in prompts):
        return prompts
    if task.by_id:
        raise InputError(f"{name} has two rows with the id {again}; answers are told apart by their ids")
    if again:
        log.warning("%s has two rows with the id %s: rows go by their numbers instead", name, again)
    return [replace(prompt, id=str(number)) for number, prompt in enumerate(prompts)]


def _load_from_hub(source: Source) -> list[Row]:
    repository, _, revision = source.repository.partition("@")
    try:
        if source.file is not None:
            return read_rows(fetch_file(repository, source.file, revision or None, kind=source.kind))
        return _load_dataset(repository, source.split, revision or None)
    except ExpoError as error:
        raise type(error)(f"the data set cannot be loaded: {error}; --dataset FILE reads a copy") from error


def _load_dataset(repository: str, split: str, revision: str | None) -> list[Row]:
    from datasets import exceptions, load_dataset

    require_usable_token()
    try:
        return list(load_dataset(repository, split=split, revision=revision))
    except (exceptions.DatasetsError, ValueError, *network_errors()) as error:
        # A repository that needs its own loading script is refused with a RuntimeError.
        if isinstance(error, (exceptions.DatasetsError, ValueError)) or "scripts" in str(error):
            raise InputError(f"{repository}: {first_line(error)}") from error
        if isinstance(error, FileNotFoundError) and not is_offline():
            raise EnvironmentFailure(f"{repository} is not in the hub cache, and the hub cannot be reached") from error
        raise explain(error, repository, revision) from error
