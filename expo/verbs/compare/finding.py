"""What the user's words mean: a name, an output file or a reward file, and the files that belong to it.

Nothing but names and the first rows of unknown files is read here; `reading.py` reads the rest. Output files lie in
`outputs_<task>/`, rewards in `rewards_<task>/` beside it: `NAME.jsonl`, and `NAME@<reward model>.jsonl` of further
reward models. A file that lies elsewhere was made by others, and its content says which format it is in.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from expo.checkpoint.folder import expand_user
from expo.errors import InputError
from expo.files import SUFFIXES, Row, read_json, read_rows, shown
from expo.settings import OWN_ENDINGS
from expo.tasks import TASKS, Task, find_task

OUTPUTS, REWARDS = "outputs_", "rewards_"
"""How the folders begin."""

OTHERS_TASK = "prompts"
"""The task of files that others made, where nothing says another."""


@dataclass(frozen=True)
class Source:
    """The files of one run."""

    word: str
    """What the user called it."""
    name: str
    task: str
    outputs: Path | None
    """None where only rewards are there."""
    rewards: tuple[Path, ...]
    """One file per reward model, the one with the run's plain name first; empty where there are only outputs."""
    foreign: bool = False
    """Whether the outputs lie outside of expo's folders, so that rewards of that name may be another file's."""

    @property
    def identity(self) -> Path:
        """The file that makes it this run."""
        return (self.outputs or self.rewards[0]).resolve()


@dataclass(frozen=True)
class _Word:
    """A word, as far as it alone says what it is."""

    text: str
    file: Path | None = None
    """The file it names; None for a name."""
    task: str | None = None
    """The task that its folder says."""
    rewards: bool = False
    """Whether the file holds rewards."""


def find_sources(words: Sequence[str], *, task: str | None = None, output_dir: str = ".") -> list[Source]:
    """The files of each run.

    Args:
        words: Names, output files or reward files.
        task: The task, as given to `expo generate`; None: the folders or the files say it.
        output_dir: Where the folders of names lie.

    Raises:
        InputError: A file or name is missing, a run is there twice, or the runs belong to different tasks.
    """
    base = Path(output_dir)
    parsed = [_parse(word, base) for word in words]
    name = _one_task(parsed, _task_name(task, base), base)
    sources = [_source(word, name, base) for word in parsed]
    seen: dict[Path, Source] = {}
    for source in sources:
        first = seen.setdefault(source.identity, source)
        if first is not source:
            raise InputError(f"{first.word} and {source.word} are the same run ({source.identity}): leave one out")
    names = [source.name for source in sources]
    return [replace(one, name=one.word) if names.count(one.name) > 1 else one for one in sources]


def task_called(name: str) -> Task:
    """The task of that name: one of expo's, or that of a file of prompts with this stem."""
    return TASKS[name] if name in TASKS else find_task(f"{name}.jsonl")


def _task_name(task: str | None, base: Path) -> str | None:
    if task is None or task in TASKS:
        return task
    known = any((base / f"{kind}{task}").is_dir() for kind in (OUTPUTS, REWARDS))
    return task if known else find_task(task).name


# --- words ----------------------------------------------------------------------------------------------------------


def _parse(text: str, base: Path) -> _Word:
    path = expand_user(text)
    is_file = "/" in text or path.suffix.lower() in SUFFIXES
    if not is_file and _tasks_with(text, base):  # also where its checkpoint lies here, under the same name
        return _Word(text)
    return _parse_file(text, path) if is_file or path.exists() else _Word(text)


def _parse_file(text: str, path: Path) -> _Word:
    if path.is_dir():
        raise InputError(f"{text} is a folder: give a file in it, or names with --output-dir {text}")
    path = Path(*path.absolute().parts)
    for ending in OWN_ENDINGS:  # a file beside the run's own one
        if path.stem.endswith(ending):
            path = _with_stem(path.parent, path.stem.removesuffix(ending)) or path
    if not path.is_file():
        raise InputError(f"no such file: {text}{_nearest(path.name, _siblings(path))}")
    folder = path.parent.name
    for kind in (OUTPUTS, REWARDS):
        if folder.startswith(kind) and folder != kind:
            return _Word(text, path, folder.removeprefix(kind), rewards=kind == REWARDS)
    return _Word(text, path, rewards=_holds_rewards(path))


def _siblings(path: Path) -> list[str]:
    return [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []


def _nearest(word: str, known: Iterable[str]) -> str:
    known = sorted(set(known))
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    more = ", …" if len(known) > 5 else ""
    return f"; there {'is' if len(known) == 1 else 'are'} {', '.join(known[:5])}{more}" if known else ""


def _with_stem(folder: Path, stem: str) -> Path | None:
    """The output or reward file of that name in a folder."""
    files = (folder / f"{stem}{suffix}" for suffix in SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def _holds_rewards(path: Path) -> bool:
    """Whether a file's first line is a number or null."""
    with path.open("rb") as stream:
        line = stream.readline(1000).strip()
    try:
        return not isinstance(json.loads(line), (dict, list, str))
    except (ValueError, RecursionError):
        return False


# --- the task -------------------------------------------------------------------------------------------------------


def _one_task(words: Sequence[_Word], given: str | None, base: Path) -> str:
    told = {word.task: word.text for word in words if word.task is not None}
    if given is not None:
        told = {given: "--task", **{task: text for task, text in told.items() if task != given}}
    if not told:
        names = [word.text for word in words if word.file is None]
        told = {_task_of_names(names, base): names[0]} if names else {_look(word): word.text for word in words}
    if len(told) > 1:
        (first, one), (second, other), *_ = told.items()
        raise InputError(f"runs of different tasks cannot be paired: {first} ({one}) and {second} ({other})")
    return next(iter(told))


def _task_of_names(names: Sequence[str], base: Path) -> str:
    """The one task for which all names have files."""
    found = {name: _tasks_with(name, base) for name in names}
    for name, tasks in found.items():
        if not tasks:
            raise InputError(_missing(name, base, sorted(_tasks_in(base))))
    common = set.intersection(*found.values())
    if len(common) == 1:
        return next(iter(common))
    if common:
        raise InputError(f"{names[0]} exists for {' and '.join(sorted(common))}: pass --task")
    first, other = names[0], next(name for name in names if not found[name] & found[names[0]])
    raise InputError(
        f"runs of different tasks cannot be paired: {first} exists for {', '.join(sorted(found[first]))} and "
        f"{other} for {', '.join(sorted(found[other]))}"
    )


def _tasks_in(base: Path) -> set[str]:
    folders = [path.name for path in base.iterdir() if path.is_dir()] if base.is_dir() else []
    return {name.removeprefix(kind) for name in folders for kind in (OUTPUTS, REWARDS) if name.startswith(kind)} - {""}


def _tasks_with(name: str, base: Path) -> set[str]:
    return {task for task in _tasks_in(base) if any(_files(name, task, base))}


def _missing(name: str, base: Path, tasks: Sequence[str]) -> str:
    """Why there is no run of that name."""
    for task in tasks:
        for kind, verb in ((OUTPUTS, "generate"), (REWARDS, "score")):
            if (base / f"{kind}{task}" / f".{name}.journal.jsonl").exists():
                return f"{name} is not finished for {task}: `expo {verb} {task}` continues it"
    what = f"the task {tasks[0]}" if len(tasks) == 1 else "any task"
    return f"no outputs or rewards of {name} for {what} in {base}{_nearest(name, _names(base, tasks))}"


def _names(base: Path, tasks: Iterable[str]) -> Iterator[str]:
    for task in tasks:
        for folder in (base / f"{OUTPUTS}{task}", base / f"{REWARDS}{task}"):
            files = folder.glob("*.json*") if folder.is_dir() else ()
            yield from (
                file.stem for file in files if not file.stem.endswith(OWN_ENDINGS) and not file.name.startswith(".")
            )


def _look(word: _Word) -> str:
    """The task of a file that others made, by its first row."""
    if word.file is None or word.rewards:
        raise InputError(f"{word.text} contains only rewards and is not in a folder rewards_<task>: pass --task")
    row = next(iter(read_rows(word.file)), None)
    if row is None:
        raise InputError(f"{word.text} contains no rows")
    task = next((task for task, columns in FORMATS.items() if columns <= row.keys()), None)
    if task is None:
        columns = ", ".join(map(shown, list(row)[:5])) or "no columns"
        raise InputError(f"{word.text} is not an output file: its rows have {columns}, but no output with a prompt")
    return task


FORMATS = {"mtbench": {"question_id", "choices"}, "alpaca": {"instruction", "output"}, OTHERS_TASK: {"output"}}
"""Tasks whose output files others make, too: the columns that tell them, the first task that fits."""


# --- files ----------------------------------------------------------------------------------------------------------


def _source(word: _Word, task: str, base: Path) -> Source:
    if word.file is None:
        return _named(word, task, base)
    if word.rewards:
        return _of_rewards(word, word.file, task)
    if word.task is not None:
        rewards = _rewards_of(word.file.stem, task, word.file.parents[1])
        return Source(word.text, word.file.stem, task, word.file, tuple(rewards))
    rewards = _rewards_of(word.file.stem, task, base)
    return Source(word.text, word.file.stem, task, word.file, tuple(rewards), foreign=True)


def _files(name: str, task: str, base: Path) -> tuple[Path | None, tuple[Path, ...]]:
    return _with_stem(base / f"{OUTPUTS}{task}", name), tuple(_rewards_of(name, task, base))


def _named(word: _Word, task: str, base: Path) -> Source:
    outputs, rewards = _files(word.text, task, base)
    if outputs is None and not rewards:
        raise InputError(_missing(word.text, base, [task]))
    if outputs is None and "@" in word.text and rewards[0].stem == word.text:
        return _of_rewards(replace(word, file=rewards[0]), rewards[0], task)
    return Source(word.text, word.text, task, outputs, rewards)


def _rewards_of(name: str, task: str, base: Path) -> Iterator[Path]:
    """The reward files of a run; one whose whole stem is the name of an output is that output's."""
    folder = base / f"{REWARDS}{task}"
    if (own := folder / f"{name}.jsonl").is_file():
        yield own
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        is_further = file.name.startswith(f"{name}@") and file.suffix == ".jsonl" and file.is_file()
        if is_further and not file.stem.endswith(OWN_ENDINGS) and not _outputs_of(file.stem, task, base):
            yield file


def _outputs_of(name: str, task: str, base: Path) -> Path | None:
    return _with_stem(base / f"{OUTPUTS}{task}", name)


def _of_rewards(word: _Word, file: Path, task: str) -> Source:
    """The run of one reward file: with this reward model's rewards alone."""
    base, name, meta = file.parents[1], file.stem, meta_beside(file)
    if not _outputs_of(name, task, base) and "@" in name:
        said = str(meta.get("name"))
        name = said if name.startswith(f"{said}@") else name.rpartition("@")[0]
    outputs = _outputs_of(name, task, base) or _said_outputs(meta, base)
    return Source(word.text, name, task, outputs, (file,))


def _said_outputs(meta: Row, base: Path) -> Path | None:
    """The file that was scored, if the meta file names one that is still there."""
    config = meta.get("config")
    name = config.get("outputs") if isinstance(config, dict) else None
    if not isinstance(name, str):
        return None
    places = (expand_user(name).absolute(), (base / expand_user(name)).absolute())
    return next((place for place in places if place.is_file()), None)


def meta_beside(file: Path) -> Row:
    """The meta file of an output or of rewards; empty if there is none.

    Raises:
        InputError: It is damaged.
    """
    meta = file.with_name(f"{file.stem}.meta.json")
    try:
        return read_json(meta) if meta.is_file() else {}
    except InputError as error:
        raise InputError(f"{error}; move it away to read {shown(file.name)} without it") from error
