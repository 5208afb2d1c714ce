"""A job in parts: the state of the whole and of each part, and joining them into what one run would write.

What a plan says of parts is said here, too: `describe_parts`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from expo.arguments import shown
from expo.errors import InputError, listed
from expo.files import Row
from expo.journal import read_journal
from expo.parts import DATE_NAME, FILE_NAME, Part, all_parts, array_list, counts_in
from expo.rows.files import Found, RowFiles, State, checksum
from expo.rows.job import Done, Figures, RowJob, Rows
from expo.rows.loop import Left, is_complete, keys_in, left_of, rows_to_extend
from expo.settings import require_same

PART_FIGURES = ("rows", "failed", "tokens_out", "engine_start_seconds", "tokens_per_second")
"""What the joined meta file repeats from each part's, besides the seconds, where present."""


@dataclass(frozen=True)
class FinishedPart:
    """A part that is finished."""

    meta: Row
    rows: Rows


class NotFinished(Exception):
    """A part is not finished, or is damaged; the message says why in a few words."""


FINISHED, NOTHING_TO_DO = "finished", "nothing left to do"
"""States of parts that need not be made; the second is of one whose rows the output has, or that has none."""


@dataclass(frozen=True)
class Look:
    """What a part was found to be."""

    part: Part
    state: str
    """In a few words; of one that is to be made, why."""
    made: FinishedPart | None = None

    @property
    def lacks(self) -> bool:
        """Whether it is still to be made."""
        return self.state not in (FINISHED, NOTHING_TO_DO)


# --- the whole -----------------------------------------------------------------------------------------------------


def kept_of_the_whole(job: RowJob) -> Rows:
    """The rows of a part that the whole output already has; refuses a run with another number of parts."""
    if job.whole is None or job.part is None:
        require_same_cut(job, None)
        return {}
    rows = left_of(job.whole).done
    require_same_cut(job.whole, job.part.count)
    return {key: rows[key] for key in job.keys if key in rows}


def require_same_cut(whole: RowJob, count: int | None) -> None:
    """Refuse to continue a run that was started with another number of parts.

    Args:
        whole: The job.
        count: N; None for a run without parts, which is allowed where the output is already complete.

    Raises:
        InputError: The run was started with another number of parts.
    """
    folder = whole.files.parts_folder
    others = counts_in(_names_in(whole.files)) - {count}
    if not others or whole.config.overwrite:
        return
    found = whole.files.require_own()
    if count is None and found.state is State.FINISHED and set(whole.keys).issubset(keys_in(whole, found.meta)):
        return
    there = min(others)
    now = f", not of {count}" if count else ""
    raise InputError(
        f"{folder} has parts of {there}{now}: continue with --part i/{there} (in an array job slurm/{there}) or "
        f"--data-parallel {there} and --join {there}, or start over with --overwrite"
    )


def parts_begun(whole: RowJob) -> int | None:
    """The number of parts that a run was divided into before; None where there is none, or a mix."""
    there = counts_in(_names_in(whole.files))
    return there.pop() if len(there) == 1 else None


def _names_in(files: RowFiles) -> list[str]:
    folder = files.parts_folder
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def missing_parts(left: Left, count: int) -> list[tuple[RowJob, int]]:
    """The parts of a job that are still to be made, each with the number of its rows that the output has.

    Args:
        left: The job, with what earlier runs have left.
        count: N.

    Raises:
        InputError: The run was started with another number of parts.
    """
    require_same_cut(left.job, count)
    parts = [left.job.share(part) for part in all_parts(count)]
    return [
        (part, sum(key in left.done for key in part.keys))
        for part in parts
        if part.pending(left.done) and not is_finished(part)
    ]


# --- a part --------------------------------------------------------------------------------------------------------


def read_part(job: RowJob) -> FinishedPart:
    """A finished part, checked.

    Raises:
        NotFinished: It is missing, unfinished, or damaged.
        InputError: It was made with other settings or from other prompts.
    """
    files, found = job.files, job.files.look()
    if found.state is not State.FINISHED:
        raise NotFinished(_why_not_finished(job, found))
    meta, text = found.meta, files.final.read_bytes()
    require_same(files.final, meta["fingerprint"], job.fingerprint, advice="--part with --overwrite replaces it")
    if checksum(text) != meta.get("rows_sha256"):
        raise NotFinished(f"damaged, remove {files.final}")
    try:
        there = set(keys_in(job, meta))
    except InputError as error:
        message = f"{files.final} was made from different prompts; --part with --overwrite replaces it"
        raise InputError(message) from error
    further = there.difference((job.whole or job).keys)
    if further and not job.takes_in(further):
        raise InputError(f"{files.final} has {len(there)} rows, made with a larger --limit; join with the same --limit")
    lacking = sum(key not in there for key in job.keys)
    if lacking:
        raise NotFinished(f"unfinished, {len(job.keys) - lacking} of {len(job.keys)} rows")
    return FinishedPart(meta, job.by_key(map(json.loads, text.splitlines())))


def _why_not_finished(job: RowJob, found: Found) -> str:
    files = job.files
    if found.state is State.UNFINISHED:
        rows = sum(not job.is_interim(row) for row in found.journal)
        return "still running" if files.is_held() else f"unfinished, {rows} rows"
    return {
        State.ABSENT: "not started",
        State.WITHOUT_META: f"missing its meta file, remove {files.final}",
        State.WITHOUT_FINAL: "missing its file",
        State.DAMAGED: f"damaged, remove {files.meta} and {files.final.name}",
    }[found.state]


def is_finished(job: RowJob) -> bool:
    """Whether a part is finished, except for rows that cannot be produced.

    Raises:
        InputError: It was made with other settings, and `--overwrite` is not given.
    """
    try:
        made = read_part(job)
    except NotFinished:
        return False
    except InputError:
        if not job.config.overwrite:
            raise
        return False
    answered = job.answered(made.rows.values())
    return sum(key not in answered for key in job.keys) == len(job.impossible(answered))


# --- joining -------------------------------------------------------------------------------------------------------


def join_parts(whole: RowJob, count: int) -> Done:
    """Write the whole output from `count` parts and the rows it already has; then remove the parts.

    Raises:
        InputError: A part is missing, unfinished, damaged or has other settings; nothing is changed.
        EnvironmentFailure: Writing failed; the parts are kept.
    """
    left = left_of(whole)
    whole, kept = left.job, left.done
    require_same_cut(whole, count)
    parts = _needed_parts(whole, count, kept)
    found = whole.files.require_own()
    if rows_to_extend(whole, found) is None:
        done = Done(whole, found.meta, "already complete")
    else:
        journal = whole.files.open_journal(whole.fingerprint)
        with whole.files.holding(journal):
            rows: Rows = {key: row for part in parts for key, row in part.rows.items()} | kept
            whole.require_sound(rows)
            rows |= whole.impossible(whole.answered(rows.values()))
            output, ordered = left.output(rows)
            journal.begin(ordered)  # a part may not have those that were there
            figures = _figures(whole, [part.meta for part in parts])
            meta = output.meta_of(ordered, figures, extends=len(parts) > 1 or bool(kept or left.beside))
            meta["parts"] = [_part_record(whole, part.meta) for part in parts]
            whole.files.finish(journal, output.render(ordered), meta)
        done = Done(whole, meta, "written")
    remove_parts(whole)
    return done


def _needed_parts(whole: RowJob, count: int, kept: Rows) -> list[FinishedPart]:
    """The parts that have a row the output lacks.

    Raises:
        InputError: Some cannot be joined; the message lists them and the command that produces the first.
    """
    looks = look_at_parts(whole, count, kept)
    lacking = [look for look in looks if look.lacks]
    if lacking:
        command = shown(whole.verb, replace(whole.config, join=None, part=str(lacking[0].part)))
        parts = listed("", (f"{look.part} ({look.state})" for look in lacking))[0].removeprefix(": ")
        raise InputError(
            f"{len(lacking)} of {count} parts cannot be joined yet: {parts}; to make one: {command}; all of them as an "
            f"array job: --array={array_list(look.part.index for look in lacking)} and --part slurm/{count}"
        )
    return [look.made for look in looks if look.made]


def look_at_parts(whole: RowJob, count: int, kept: Rows) -> list[Look]:
    """Every part of a job: whether it is there, or why not.

    Args:
        whole: The job.
        count: N.
        kept: The rows that the output has already.

    Raises:
        InputError: A part was made with other settings or from other prompts.
    """
    looks = []
    for part in all_parts(count):
        job = whole.share(part)
        try:
            made = read_part(job) if job.pending(kept) else None
            looks.append(Look(part, FINISHED if made else NOTHING_TO_DO, made))
        except NotFinished as reason:
            looks.append(Look(part, str(reason)))
    return looks


# --- what a plan says of them --------------------------------------------------------------------------------------


def describe_parts(job: RowJob, further: Sequence[RowJob] = ()) -> Row:
    """The plan's entries about parts; with `--join`, what is there of each, and which ones are to be made.

    Args:
        job: The job.
        further: Those that the same command does after it: a part is to be made if one of them lacks it.

    Raises:
        InputError: A part, or the output, was made with other settings or from other prompts, or in other parts.
    """
    config = job.config
    return {
        **({"part": str(job.part)} if job.part else {}),
        **({"workers": config.data_parallel} if config.data_parallel else {}),
        **({"ray": config.ray} if config.ray else {}),
        **(_describe_join((job, *further), config.join) if config.join else {}),
    }


def _describe_join(jobs: Sequence[RowJob], count: int) -> Row:
    looks = []
    for job in jobs:
        left = left_of(job)
        require_same_cut(left.job, count)
        looks.append(look_at_parts(left.job, count, left.done))
    parts = list(zip(*looks, strict=True))
    return {
        "parts_to_join": count,
        "parts": [{"part": str(part[0].part), "state": _state_of(jobs, part)} for part in parts],
        "parts_to_make": array_list(part[0].part.index for part in parts if any(look.lacks for look in part)),
        "joined": all(is_complete(job) for job in jobs),
    }


def _state_of(jobs: Sequence[RowJob], looks: Sequence[Look]) -> str:
    """The state of one part of all jobs, said once where it is the same."""
    if len({look.state for look in looks}) == 1:
        return looks[0].state
    return "; ".join(f"{job.name}: {look.state}" for job, look in zip(jobs, looks, strict=True))


# --- after joining -------------------------------------------------------------------------------------------------


def _part_record(whole: RowJob, meta: Row) -> Row:
    names = (*PART_FIGURES[:-1], whole.seconds_key, PART_FIGURES[-1])
    return {"part": meta["part"], **{name: meta[name] for name in names if name in meta}}


def _figures(whole: RowJob, metas: Sequence[Row]) -> Figures:
    """The cost of the run: parts run in parallel, so it took as long as the slowest."""
    made = [whole.figures_in(meta) for meta in metas]
    working = [one for one in made if one.rows]
    agree = all(one.versions == other.versions for one in made for other in made if one.versions and other.versions)

    def longest(name: str) -> float:
        return max((getattr(one, name) for one in made), default=0.0)

    return Figures(
        rows=sum(one.rows for one in made),
        tokens=sum(one.tokens for one in made),
        engine_start_seconds=longest("engine_start_seconds"),
        seconds=longest("seconds"),
        engine_step_seconds=longest("engine_step_seconds"),
        repeatable=bool(working) and agree and all(one.repeatable for one in working),
        versions={name: text for one in reversed(made) for name, text in one.versions.items()},
    )


def remove_parts(whole: RowJob) -> None:
    """Remove the parts whose rows are all in the finished output, and the folder when it is empty.

    A part that is running, or has a row that the output lacks, is kept; with `--overwrite`, one with other settings is
    removed.
    """
    stems = {found[1] for found in map(FILE_NAME.fullmatch, _names_in(whole.files)) if found}
    left = left_of(whole) if stems else Left(whole, {}, {})
    rows = left.done | left.beside
    for stem in sorted(stems):
        files = whole.files.part(stem)
        lock = files.lock()
        if lock is not None:
            try:
                _remove_part(whole, files, rows)
            finally:
                lock.release()
    folder = whole.files.parts_folder
    if all(name.startswith(DATE_NAME) for name in _names_in(whole.files)):
        for name in _names_in(whole.files):
            (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _remove_part(whole: RowJob, files: RowFiles, rows: Rows) -> None:
    found = files.look()
    there = whole.answered([*read_journal(files.final), *found.journal])
    replaced = whole.config.overwrite and found.fingerprint != whole.fingerprint
    if there.keys() <= rows.keys() or replaced:
        files.remove()
