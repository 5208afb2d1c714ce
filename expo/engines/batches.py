"""Rows in padded batches: which ones go together, as a function of their lengths alone."""

from __future__ import annotations

from collections.abc import Sequence


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group rows into padded batches of at most `budget` tokens, longest rows first.

    A pure function of all rows' lengths: a rerun groups them as the first run did. Longest first, so that a lack
    of memory shows at once.

    Args:
        lengths: Tokens of each row.
        budget: The maximum number of tokens in a batch, including padding; a longer row is a batch of its own.

    Returns:
        Row numbers, batch by batch.
    """
    batches: list[list[int]] = []
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    for number in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


MOST_PADDED = 1.06
"""Padded over real tokens of a batch of `tight_batches`, at most."""


def tight_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group rows into padded batches as `token_batches` does, but end one before it is much more padding than tokens.

    Args:
        lengths: Tokens of each row.
        budget: The maximum number of tokens in a batch, including padding; a longer row is a batch of its own.

    Returns:
        Row numbers, batch by batch, longest rows first; each batch is at most `MOST_PADDED` × its tokens.
    """
    batches: list[list[int]] = []
    width = tokens = 0
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        length = lengths[number]
        padded = width * (len(batches[-1]) + 1) if batches else 0
        if batches and padded <= min(budget, MOST_PADDED * (tokens + length)):
            batches[-1].append(number)
            tokens += length
        else:
            batches.append([number])
            width = tokens = length
    return batches
