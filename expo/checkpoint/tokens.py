"""The token ids of a model folder's tokenizer, and where two models differ; no model code runs.

A row of the embedding belongs to the token with that id. If SFT and DPO give a token different ids, their rows do not
correspond, and the difference between them means nothing. Here: `tokenizer.json`, `vocab.json`, `added_tokens.json`
and `tokenizer_config.json`; a sentencepiece model alone is compared as bytes. Not here: chat templates and which token
ends an answer, which are DPO's business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from expo.errors import InputError
from expo.files import open_file, read_json, shown

TOKENIZER_FILE = "tokenizer.json"
VOCABULARY_FILE = "vocab.json"
SENTENCEPIECE_FILE = "tokenizer.model"
COMPARED_BYTES = 1 << 20

Pairs = Iterator[tuple[Any, Any]]
"""Token and id, as in a file, unchecked."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenDifference:
    """How two tokenizers differ."""

    moved: dict[str, tuple[int, int]]
    """Tokens that both have with different ids: token → (SFT's, DPO's)."""
    only_sft: dict[str, int]
    """Tokens that only SFT has; empty if one side has no complete list of its tokens."""
    only_dpo: dict[str, int]
    """Tokens that only DPO has."""
    unknown: bool = False
    """Whether the sentencepiece models differ and no file lists their tokens."""


def _entries(value: object) -> Pairs:
    if isinstance(value, dict):
        yield from value.items()


def _vocabulary(content: dict[str, Any]) -> Pairs:
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: [token, score], in the order of their ids
        yield from ((entry[0], number) for number, entry in enumerate(vocabulary) if isinstance(entry, list) and entry)
    yield from _entries(vocabulary)
    added = content.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict):
            yield entry.get("content"), entry.get("id")


def _added_tokens_decoder(content: dict[str, Any]) -> Pairs:
    for number, entry in _entries(content.get("added_tokens_decoder")):
        if isinstance(entry, dict) and number.isascii() and number.isdigit() and len(number) < 10:
            yield entry.get("content"), int(number)


READERS: dict[str, Callable[[dict[str, Any]], Pairs]] = {
    TOKENIZER_FILE: _vocabulary,
    VOCABULARY_FILE: _entries,
    "added_tokens.json": _entries,
    "tokenizer_config.json": _added_tokens_decoder,
}
"""The files with token ids; the first id of a token counts."""


def token_numbers(folder: Path) -> dict[str, int]:
    """Token → id, from all files of a model folder that list them; empty if there are none.

    Raises:
        InputError: One of them cannot be read.
    """
    present = {name: reader for name, reader in READERS.items() if (folder / name).exists()}
    numbers: dict[str, int] = {}
    for token, number in chain.from_iterable(reader(read_json(folder / name)) for name, reader in present.items()):
        if isinstance(token, str) and type(number) is int:
            numbers.setdefault(token, number)
    return numbers


def compare_tokens(sft: Path, dpo: Path) -> TokenDifference | None:
    """How the tokenizers of two model folders differ; None if they do not, or if nothing can be compared.

    A `tokenizer.json` of 30 MB is parsed only if both sides have one and they differ.

    Raises:
        InputError: A tokenizer's file cannot be read.
    """
    if _has_same(TOKENIZER_FILE, sft, dpo):
        return None
    ours, theirs = token_numbers(sft), token_numbers(dpo)
    moved = {token: (ours[token], theirs[token]) for token in ours if theirs.get(token, ours[token]) != ours[token]}
    whole = _lists_all(sft) and _lists_all(dpo)
    difference = TokenDifference(
        moved=moved,
        only_sft={token: number for token, number in ours.items() if whole and token not in theirs},
        only_dpo={token: number for token, number in theirs.items() if whole and token not in ours},
        unknown=not whole and _has_same(SENTENCEPIECE_FILE, sft, dpo) is False,
    )
    return difference if difference != TokenDifference({}, {}, {}) else None


def _lists_all(folder: Path) -> bool:
    return (folder / TOKENIZER_FILE).exists() or (folder / VOCABULARY_FILE).exists()


def _has_same(name: str, sft: Path, dpo: Path) -> bool | None:
    """Whether both folders have a file with the same bytes; None if one lacks it."""
    files = sft / name, dpo / name
    if not all(file.exists() for file in files):
        return None
    with open_file(files[0]) as one, open_file(files[1]) as other:
        while (block := one.read(COMPARED_BYTES)) == other.read(COMPARED_BYTES):
            if not block:
                return True
    return False


def _token_of(number: int, numbers: dict[str, int]) -> str:
    return next(token for token, own in numbers.items() if own == number)


def _problem(difference: TokenDifference, sft: str, dpo: str, common: int) -> str:
    """Which token's rows do not correspond; empty if all do."""
    if difference.moved:
        token, (ours, theirs) = min(difference.moved.items(), key=lambda item: item[1])
        more = f" (and {len(difference.moved) - 1} more tokens differ)" if len(difference.moved) > 1 else ""
        return f"the token {shown(token)} has id {ours} in {sft} and {theirs} in {dpo}{more}"
    shared = {*difference.only_sft.values()} & {*difference.only_dpo.values()}
    renamed = sorted(number for number in shared if number < common)
    if renamed:
        old, new = (_token_of(renamed[0], only) for only in (difference.only_sft, difference.only_dpo))
        return f"id {renamed[0]} is the token {shown(old)} in {sft} and {shown(new)} in {dpo}"
    return ""


def require_same_ids(sft: Path, dpo: Path, rows: int) -> None:
    """Refuse two models to which a token id means different tokens; warn about tokens that only one of them has.

    Args:
        sft: One model's folder.
        dpo: The other's.
        rows: How many tokens both have vectors for.

    Raises:
        InputError: There is such an id, or a tokenizer's file cannot be read; the message names the tokens.
    """
    difference = compare_tokens(sft, dpo)
    if difference is None:
        return
    problem = _problem(difference, sft.name, dpo.name, rows)
    if problem:
        raise InputError(
            f"{problem}, so their probabilities are of different tokens; use the SFT model that DPO was trained from"
        )
    _warn(difference, sft, dpo)


def require_same_tokens(sft: Path, dpo: Path, common: int = 0, *, needed: bool = True) -> None:
    """Refuse a pair with different ids for a token; warn about tokens that only one side has.

    Args:
        sft: SFT's folder.
        dpo: DPO's folder.
        common: If the vocabularies differ in size, the number of rows that both have; ids below it must mean the same
            token. (If the sizes are equal, a token may have been renamed, as reserved ones are.)
        needed: Whether rows of tokens are extrapolated; otherwise different ids are only a warning.

    Raises:
        InputError: A shared token has two ids, or a shared id has two tokens; the message names both.
    """
    try:
        difference = compare_tokens(sft, dpo)
    except InputError as error:  # SFT's tokenizer is not needed for anything else
        log.warning("%s; the token ids of SFT and DPO were not compared", error)
        return
    if difference is None:
        return
    problem = _problem(difference, sft.name, dpo.name, common)
    if problem and needed:
        raise InputError(
            f"{problem}, so their embedding rows do not correspond; use the SFT model that DPO was trained from, or "
            "--exclude the embedding and the head to copy them from DPO"
        )
    if problem:
        log.warning("%s; the embedding and the head are copied from DPO", problem)
    _warn(difference, sft, dpo)


def _warn(difference: TokenDifference, sft: Path, dpo: Path) -> None:
    if difference.unknown:
        log.warning("%s differs between %s and %s; their token ids were not compared", SENTENCEPIECE_FILE, sft, dpo)
    for folder, only in ((sft, difference.only_sft), (dpo, difference.only_dpo)):
        if only:
            first = min(only, key=lambda token: only[token])
            log.warning("%d tokens are in %s only (%s is %d)", len(only), folder, shown(first), only[first])
