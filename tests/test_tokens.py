"""Token ids of two model folders, from files of every kind a tokenizer comes in."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from helpers import random_pair, read_checkpoint_tensors, run_expo, write, write_checkpoint

from expo.checkpoint import tokens
from expo.checkpoint.tokens import TokenDifference, compare_tokens, require_same_tokens, token_numbers
from expo.errors import InputError

NUMBERS = {"a": 0, "b": 1, "<s>": 2, "<pad>": 3}
WORDS = {"a": 0, "b": 1}
ADDED = [{"id": 2, "content": "<s>", "special": True}, {"id": 3, "content": "<pad>"}]
DECODER = {"2": {"content": "<s>"}, "3": {"content": "<pad>"}}

KINDS: dict[str, dict[str, object]] = {
    "a vocabulary and added tokens": {
        "tokenizer.json": {"model": {"type": "BPE", "vocab": WORDS}, "added_tokens": ADDED}
    },
    "a list of tokens and scores": {
        "tokenizer.json": {"model": {"type": "Unigram", "vocab": [["a", 0.5], ["b", -1]]}, "added_tokens": ADDED}
    },
    "added tokens in a file of their own": {"vocab.json": WORDS, "added_tokens.json": {"<s>": 2, "<pad>": 3}},
    "added tokens in the config": {"vocab.json": WORDS, "tokenizer_config.json": {"added_tokens_decoder": DECODER}},
    "everything twice": {
        "tokenizer.json": {"model": {"vocab": NUMBERS}, "added_tokens": ADDED},
        "vocab.json": NUMBERS,
        "added_tokens.json": {"<s>": 2},
        "tokenizer_config.json": {"added_tokens_decoder": DECODER},
    },
}


def model(folder: Path, files: dict[str, object]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def tokenizer(numbers: dict[str, int]) -> dict[str, object]:
    return {"tokenizer.json": {"model": {"vocab": numbers}}}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_says_the_same(tmp_path: Path, kind: str) -> None:
    one = model(tmp_path / "one", KINDS[kind])
    assert token_numbers(one) == NUMBERS
    assert compare_tokens(one, model(tmp_path / "other", tokenizer(NUMBERS))) is None


def test_tokens_that_moved_came_and_went(tmp_path: Path) -> None:
    sft = model(tmp_path / "sft", tokenizer({"a": 0, "b": 1, "c": 2, "old": 3}))
    dpo = model(tmp_path / "dpo", tokenizer({"a": 0, "c": 1, "b": 2, "new": 3, "newer": 4}))
    assert compare_tokens(sft, dpo) == TokenDifference(
        moved={"b": (1, 2), "c": (2, 1)}, only_sft={"old": 3}, only_dpo={"new": 3, "newer": 4}
    )
    with pytest.raises(InputError, match=r"the token 'b' has id 1 in sft and 2 in dpo \(and 1 more tokens differ\)"):
        require_same_tokens(sft, dpo)


def test_a_number_that_both_have_is_one_tokens(tmp_path: Path) -> None:
    sft = model(tmp_path / "sft", tokenizer({"a": 0, "b": 1, "old": 2}))
    dpo = model(tmp_path / "dpo", tokenizer({"a": 0, "b": 1, "new": 2, "newer": 3}))
    with pytest.raises(InputError, match=r"id 2 is the token 'old' in sft and 'new' in dpo, .* or --exclude the emb"):
        require_same_tokens(sft, dpo, common=3)
    require_same_tokens(sft, dpo, common=2)


def test_tokens_that_came_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sft = model(tmp_path / "sft", tokenizer({"a": 0, "<reserved>": 1}))
    dpo = model(tmp_path / "dpo", tokenizer({"a": 0, "<|im_start|>": 1, "<|im_end|>": 2}))
    require_same_tokens(sft, dpo)
    assert caplog.messages == [
        f"1 tokens are in {sft} only ('<reserved>' is 1)",
        f"2 tokens are in {dpo} only ('<|im_start|>' is 1)",
    ]


NOTHING_TO_SAY: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "no tokenizers": ({}, {}),
    "one tokenizer": ({}, tokenizer(WORDS)),
    "one of another kind": ({"tokenizer.model": b"sp"}, tokenizer(WORDS)),
    "the same sentencepiece model": ({"tokenizer.model": b"sp"}, {"tokenizer.model": b"sp"}),
    "sentencepiece models that lists of tokens explain": (
        {"tokenizer.model": b"one", **tokenizer(WORDS)},
        {"tokenizer.model": b"other", **tokenizer({"b": 1, "a": 0})},
    ),
    "other templates and settings": (
        {**tokenizer(WORDS), "tokenizer_config.json": {"chat_template": "a", "eos_token": "a"}},
        {**tokenizer(WORDS), "tokenizer_config.json": {"chat_template": "b", "eos_token": "b"}},
    ),
    "some added tokens beside a whole list": ({"added_tokens.json": {"<s>": 2}}, tokenizer(NUMBERS)),
    "nonsense in the right places": (
        {"tokenizer.json": {"model": {"vocab": {"a": "0", "b": True, "c": None}}, "added_tokens": [1, {}, None]}},
        {"tokenizer.json": {"model": [], "added_tokens": {"id": 3}}},
    ),
    "nonsense in the config": (
        {"vocab.json": {}, "tokenizer_config.json": {"added_tokens_decoder": {"x": {}, "²": {"content": "a"}, "1": 5}}},
        {"vocab.json": {}, "tokenizer_config.json": {"added_tokens_decoder": [1]}},
    ),
}


@pytest.mark.parametrize("case", NOTHING_TO_SAY)
def test_nothing_to_say(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    sft, dpo = (model(tmp_path / name, files) for name, files in zip(("sft", "dpo"), NOTHING_TO_SAY[case], strict=True))
    assert compare_tokens(sft, dpo) is None
    require_same_tokens(sft, dpo)
    assert caplog.messages == []


def test_added_tokens_alone_can_tell_a_difference(tmp_path: Path) -> None:
    sft = model(tmp_path / "sft", {"tokenizer.model": b"sp", "added_tokens.json": {"<s>": 7}})
    with pytest.raises(InputError, match="the token '<s>' has id 7 in sft and 2 in dpo, so their"):
        require_same_tokens(sft, model(tmp_path / "dpo", tokenizer(NUMBERS)))


def test_sentencepiece_models_are_compared_as_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sides = [model(tmp_path / name, {"tokenizer.model": name.encode()}) for name in ("sft", "dpo")]
    assert compare_tokens(*sides) == TokenDifference({}, {}, {}, unknown=True)
    require_same_tokens(*sides)
    assert "their token ids were not compared" in caplog.text


def test_a_tokenizer_that_both_have_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = [model(tmp_path / name, {"tokenizer.json": b"\xff" * 3_000_000}) for name in ("sft", "dpo")]
    monkeypatch.setattr(tokens, "read_json", lambda _: pytest.fail("parsed"))
    assert compare_tokens(*sides) is None


@pytest.mark.parametrize("side", ["sft", "dpo"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_broken_tokenizer_is_a_warning(
    tmp_path: Path, side: str, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    broken = model(tmp_path / side, {"tokenizer.json": content})
    good = model(tmp_path / "good", tokenizer(WORDS))
    with caplog.at_level(logging.WARNING):
        require_same_tokens(*((broken, good) if side == "sft" else (good, broken)))
    assert caplog.messages[0].startswith(f"{broken}/tokenizer.json ")
    assert caplog.messages[0].endswith("; the token ids of SFT and DPO were not compared")


# --- where no row of a token is extrapolated ----------------------------------------------------------------------


NAMED = {"model.embed_tokens.weight": (5, 4), "lm_head.weight": (5, 4), "model.norm.weight": (4,)}
UNNAMED = {"a": (5, 4), "b": (4,)}


@pytest.mark.parametrize(
    ("shapes", "exclude", "refused"),
    [
        (NAMED, (), True),
        (NAMED, ("embed_tokens",), True),
        (NAMED, ("lm_head",), True),
        (NAMED, ("embed_tokens|lm_head",), False),
        (NAMED, ("embed_tokens", "lm_head"), False),
        (UNNAMED, ("a",), True),
    ],
)
def test_moved_tokens_matter_where_their_rows_are_extrapolated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, shapes: dict, exclude: tuple[str, ...], refused: bool
) -> None:
    sft, dpo = random_pair(shapes)
    sides = write_checkpoint(tmp_path / "sft", sft), write_checkpoint(tmp_path / "dpo", dpo)
    model(sides[0], tokenizer({"a": 0, "b": 1, "<pad>": 2}))
    model(sides[1], tokenizer({"a": 0, "<pad>": 1, "b": 2}))
    if refused:
        with pytest.raises(InputError, match=r"token '.*' has id .* or --exclude the embedding and the head"):
            write(sides, tmp_path / "out", 0.5, exclude=exclude)
        return
    write(sides, tmp_path / "out", 0.5, exclude=exclude)
    assert "more tokens differ); the embedding and the head are copied from DPO" in caplog.text
    made, theirs = read_checkpoint_tensors(tmp_path / "out"), read_checkpoint_tensors(sides[1])
    assert all(torch.equal(made[name], theirs[name]) for name in list(NAMED)[:2])


def test_inspect_reports_moved_tokens(tmp_path: Path) -> None:
    sides = [
        write_checkpoint(tmp_path / name, tensors)
        for name, tensors in zip(("sft", "dpo"), random_pair(NAMED), strict=True)
    ]
    model(sides[0], tokenizer({"a": 0, "b": 1, "<pad>": 2}))
    model(sides[1], tokenizer({"a": 0, "<pad>": 1, "b": 2}))
    command = ("inspect", "--sft", sides[0], "--dpo", sides[1])
    found = json.loads(run_expo(*command, "--json").stdout)
    assert (found["suits"], found["moved_tokens"]) == ("mismatched", ["'b' 1 ≠ 2", "'<pad>' 2 ≠ 1"])
    text = run_expo(*command).stdout
    assert "tokens with different ids (2): 'b' 1 ≠ 2, '<pad>' 2 ≠ 1" in text
    assert "2 tokens do not match, and `expo extrapolate` refuses the pair as it is" in text
