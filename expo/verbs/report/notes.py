"""What a page's reader has to know beside the comparison: what is missing, answers cut, α that were rejected."""

from __future__ import annotations

from collections.abc import Iterable

from expo.output.sweeps import SweepRecord
from expo.verbs.report.aligned import Aligned


def notes(aligned: Aligned) -> list[str]:
    """A sentence for each thing that is missing, or that makes answers less than they seem."""
    return [*_lengths(aligned), *_endings(aligned)]


def sweep_notes(sweep: SweepRecord | None) -> list[str]:
    """Why a sweep did not choose α that gain, and what else it says; the race's own section says whom it dropped."""
    if sweep is None:
        return []
    rejected = [f"α = {sweep.shown(alpha)} is not chosen: {why}" for alpha, why in sorted(sweep.rejected_gains.items())]
    return [*rejected, *sweep.notes]


def _lengths(aligned: Aligned) -> Iterable[str]:
    rows = [row for rows in aligned.rows for row in rows if row is not None]
    if all(row.output is None for row in rows):
        yield "The answers' texts are missing: these are reward files."
    elif any(row.output is None for row in rows):
        names = [run.name for run in aligned.runs if any(row.output is None for row in run.rows)]
        yield f"Texts of answers are missing in {', '.join(names)}."
    if aligned.unit == "characters" and any(row.output is not None for row in rows):
        names = [run.name for run in aligned.runs if any(row.tokens is None for row in run.rows)]
        yield f"Lengths are in characters: there are no token counts for {', '.join(names)}."


def _endings(aligned: Aligned) -> Iterable[str]:
    for run in aligned.runs:
        for reason, what in (("length", "cut at the token limit"), ("error", "empty, because generating failed")):
            cut = sum(row.finish_reason == reason for row in run.rows)
            if cut:
                yield f"{run.name}: {cut:,} of {len(run.rows):,} answers {'is' if cut == 1 else 'are'} {what}."
