"""What chat completions servers reply: every form of an answer, and what a refusal is about."""

from __future__ import annotations

import json

import pytest

from expo.engines import Failure, Request, TextCompletion, chat_replies as replies

REQUEST = Request("0", 0, (), max_tokens=9, temperature=0.0)
THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}


def body(content: object, finish: object = "stop", usage: object = USAGE, **message: object) -> dict:
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return {"choices": [choice], "usage": usage}


ANSWERS = {
    "stop": (body("a"), ("a", 2, 3, "stop")),
    "length": (body("a", "length"), ("a", 2, 3, "length")),
    "TGI's end": (body("a", "eos_token"), ("a", 2, 3, "stop")),
    "TGI's stop": (body("a", "stop_sequence"), ("a", 2, 3, "stop")),
    "Together's end": (body("a", "eos"), ("a", 2, 3, "stop")),
    "Bedrock's end": (body("a", "end_turn"), ("a", 2, 3, "stop")),
    "in capitals": (body("a", "STOP"), ("a", 2, 3, "stop")),
    "a limit in capitals": (body("a", "MAX_TOKENS"), ("a", 2, 3, "length")),
    "Mistral's limit": (body("a", "model_length"), ("a", 2, 3, "length")),
    "no end": (body("a", None), ("a", 2, 3, "stop")),
    "an empty end": (body("a", ""), ("a", 2, 3, "stop")),
    "no end at the limit": (body("a", None, {"completion_tokens": 9}), ("a", 9, None, "length")),
    "an empty answer": (body(""), ("", 2, 3, "stop")),
    "parts": (body([THOUGHT, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), ("ab", 2, 3, "stop")),
    "parts that are text": (body(["a", "b"]), ("ab", 2, 3, "stop")),
    "a part of another kind": (body([{"type": "output_text", "text": "a"}, 7, {"text": 1}]), ("a", 2, 3, "stop")),
    "reasoning beside it": (body("a", reasoning_content="hm"), ("a", 2, 3, "stop")),
    "no usage": (body("a", usage=None), ("a", None, None, "stop")),
    "usage of another kind": (body("a", usage=[2]), ("a", None, None, "stop")),
    "no number of tokens": (body("a", usage={"completion_tokens": None}), ("a", None, None, "stop")),
    "a text for a number": (body("a", usage={"completion_tokens": "2"}), ("a", None, None, "stop")),
    "a number below 0": (body("a", usage={**USAGE, "completion_tokens": -1}), ("a", None, 3, "stop")),
    "zeros": (body("a", usage={"prompt_tokens": 0, "completion_tokens": 0}), ("a", None, None, "stop")),
    "no prompt tokens": (body("a", usage={"completion_tokens": 2}), ("a", 2, None, "stop")),
    "half an emoji": (body("a\ud83d"), ("a\ufffd", 2, 3, "stop")),
    "the other half": (body("\ude00a"), ("\ufffda", 2, 3, "stop")),
    "a whole emoji": (body("😀"), ("😀", 2, 3, "stop")),
    "an emoji in two parts": (body(["\ud83d", "\ude00"]), ("😀", 2, 3, "stop")),
}


@pytest.mark.parametrize(("answer", "expected"), ANSWERS.values(), ids=ANSWERS.keys())
def test_answers(answer, expected):
    assert replies.outcome_of(REQUEST, answer) == TextCompletion(REQUEST, *expected)


NO_ANSWERS = {
    "filtered": (body("a", "content_filter"), "ended the answer with 'content_filter'", False),
    "aborted": (body("a", "abort"), "ended the answer with 'abort'", False),
    "no end and no text": (body("", None), "ended the answer with None", False),
    "an end of another kind": (body("a", 3), "ended the answer with 3", False),
    "no text": (body(None), "contains no text", False),
    "thoughts only": (body([THOUGHT]), "contains no text", False),
    "no message": ({"choices": [{"message": None, "finish_reason": "stop"}]}, "contains no text", False),
    "no room for an answer": (body(None, "length", reasoning_content="hm"), "a larger --max-tokens", True),
    "an empty answer after reasoning": (body("", "length", reasoning="hm"), "a larger --max-tokens", True),
    "no room after a thought": (body([THOUGHT], "length"), "a larger --max-tokens", True),
    "a refusal": (body(None, refusal="I will\nnot"), "the model refuses: I will not", False),
    "no choices": ({"choices": []}, "gave no answer", False),
    "an error": ({"error": {"message": "Provider returned error", "code": 429}}, "Provider returned error", False),
}


@pytest.mark.parametrize(("answer", "reason", "lasting"), NO_ANSWERS.values(), ids=NO_ANSWERS.keys())
def test_no_answer(answer, reason, lasting):
    failure = replies.outcome_of(REQUEST, answer)
    assert isinstance(failure, Failure)
    assert reason in failure.reason
    assert failure.lasting == lasting


def stream(*chunks: object, end: str = "data: [DONE]\n\n") -> bytes:
    return ("".join(f"data: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks) + end).encode()


def delta(content: object, finish: str | None = None, **others: object) -> dict:
    return {"choices": [{"delta": {"content": content}, "finish_reason": finish}], **others}


STREAMS = {
    "pieces": (stream(delta("a"), delta("b\u2028"), delta(None, "length"), {"usage": USAGE}), ("ab\u2028", "length")),
    "comments and events": (b": hi\n\nevent: message\n" + stream(delta("a", "stop")), ("a", "stop")),
    "no end": (stream(delta("a")), ("a", "stop")),
    "a whole message": (stream({"choices": [{"message": {"content": "a"}}]}), ("a", "stop")),
}


@pytest.mark.parametrize(("content", "expected"), STREAMS.values(), ids=STREAMS.keys())
def test_a_streamed_answer(content, expected):
    outcome = replies.outcome_of(REQUEST, replies.read_reply(content))
    assert (outcome.text, outcome.finish_reason) == expected


BROKEN_STREAMS = {
    "cut": (stream(delta("a"), end=""), "unfinished stream"),
    "empty": (stream(), "an empty stream"),
    "an error": (stream(delta("a"), {"error": {"message": "fell over"}}), "fell over"),
}


@pytest.mark.parametrize(("content", "reason"), BROKEN_STREAMS.values(), ids=BROKEN_STREAMS.keys())
def test_a_stream_without_an_answer(content, reason):
    assert reason in replies.outcome_of(REQUEST, replies.read_reply(content)).reason


ENCODED = {
    "UTF-8": ("utf-8", None),
    "UTF-8 with a mark": ("utf-8-sig", "utf-8"),
    "UTF-16": ("utf-16", None),
    "GBK that says so": ("gbk", "gbk"),
    "a charset nobody knows": ("utf-8", "x-unknown"),
}


@pytest.mark.parametrize(("encoding", "charset"), ENCODED.values(), ids=ENCODED.keys())
def test_encodings(encoding, charset):
    content = json.dumps({"text": "你"}, ensure_ascii=False).encode(encoding)
    assert replies.read_reply(content, charset) == {"text": "你"}


def test_text_in_another_encoding_is_no_answer():
    with pytest.raises(UnicodeDecodeError):
        replies.read_reply(json.dumps({"text": "你"}, ensure_ascii=False).encode("gbk"))


@pytest.mark.parametrize("page", ["<html>é".encode("latin-1"), b"[1]", b"", b"text"], ids=repr)
def test_what_is_no_object(page):
    with pytest.raises(ValueError, match=r"it is no JSON|Expecting value"):
        replies.read_reply(page)


# --- refusals -----------------------------------------------------------------------------------------------------

MOST = "This model's maximum context length is 2048 tokens."
BOTH = (
    MOST + " However, you requested {} tokens ({} in the messages, 2048 in the completion). Please reduce the length."
)
TOO_LONG = {
    "OpenAI's": (BOTH.format(2060, 12), True),
    "OpenAI's of the prompt": (BOTH.format(5060, 3012), False),
    "vLLM's": (
        f"'max_tokens' is too large: 2048. {MOST[:-1]} and your request has 12 input tokens (2048 > 2036).",
        True,
    ),
    "vLLM's of the prompt": (
        f"{MOST} However, your prompt contains 3012 input tokens, which exceeds this limit even without output tokens.",
        False,
    ),
    "TGI's": ("`inputs` tokens + `max_new_tokens` must be <= 2048. Given: 12 `inputs` tokens and 2048 others", True),
    "Anthropic's": ("input length and `max_tokens` exceed context limit: 12 + 2048 > 2048", True),
    "Anthropic's of the prompt": ("prompt is too long: 3000 tokens > 2048 maximum", False),
    "Mistral's of the prompt": ("Prompt contains 3012 tokens, too large for a model with 2048 context length", False),
    "llama.cpp's of the prompt": ("the request exceeds the available context size. try increasing it", False),
}


@pytest.mark.parametrize(("message", "no_room"), TOO_LONG.values(), ids=TOO_LONG.keys())
def test_what_is_too_long_is_a_rows_own_fault(message, no_room):
    given = {"message": message, "param": "max_tokens"}
    assert replies.is_too_long(given)
    assert replies.leaves_no_room(given) == no_room
    assert replies.rejected_field(given) is None
    assert not replies.is_unknown("max_tokens", given)


def forbidden(*places: object) -> list[dict]:
    return [{"type": "extra_forbidden", "loc": ["body", *places], "msg": "Extra inputs are not permitted"}]


REJECTED = {
    "by its param": ({"message": "no", "param": "temperature"}, "temperature"),
    "by its name": ({"message": "Unrecognized request argument supplied: top_k"}, "top_k"),
    "pydantic's": ({"detail": forbidden("min_p")}, "min_p"),
    "Mistral's": ({"message": {"detail": forbidden("seed")}}, "seed"),
    "a word in quotes": ({"message": "Unknown parameter: 'seed'"}, "seed"),
    "a word after a colon": ({"message": "Unrecognized request argument supplied: seed"}, "seed"),
    "the first of two": ({"message": "'max_tokens' is not supported: use 'max_completion_tokens'"}, "max_tokens"),
    "a word of the prompt": ({"message": "I cannot talk of the seed of evil"}, None),
    "a quoted word of the prompt": ({"message": "flagged: 'seed'"}, None),
    "a message": ({"detail": [{"loc": ["body", "messages", 0], "msg": "no", "input": "top_k"}]}, None),
    "a page": ("<html>no</html>", None),
    "nothing": (None, None),
}


@pytest.mark.parametrize(("given", "field"), REJECTED.values(), ids=REJECTED.keys())
def test_the_field_that_is_rejected(given, field):
    assert replies.rejected_field(given) == field


UNSUPPORTED = "Unsupported parameter: 'max_tokens' is not supported here. Use 'max_completion_tokens' instead."
UNKNOWN = {
    "OpenAI's": ("max_tokens", {"message": UNSUPPORTED, "param": "max_tokens"}, True),
    "without a param": ("max_tokens", {"message": UNSUPPORTED}, True),
    "the other way round": ("max_tokens", {"message": "please use max_completion_tokens instead of max_tokens"}, True),
    "by its code": ("max_tokens", {"message": "no", "code": "unsupported_parameter", "param": "max_tokens"}, True),
    "pydantic's": ("max_tokens", {"detail": forbidden("max_tokens")}, True),
    "the newer one": ("max_completion_tokens", {"detail": forbidden("max_completion_tokens")}, True),
    "another field": ("max_tokens", {"detail": forbidden("top_k")}, False),
    "its value": ("max_tokens", {"message": "max_tokens is too large: 5000, the model supports 4096"}, False),
    "its value, not supported": ("max_tokens", {"message": "max_tokens of 5000 is not supported"}, False),
}


@pytest.mark.parametrize(("name", "given", "unknown"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_a_limit_of_another_name(name, given, unknown):
    assert replies.is_unknown(name, given) == unknown


@pytest.mark.parametrize(
    ("given", "spent"),
    [
        ({"message": "You exceeded your current quota", "code": "insufficient_quota"}, True),
        ({"message": "You exceeded your current quota", "code": 429}, False),
        ("slow down", False),
    ],
    ids=["spent", "per minute", "busy"],
)
def test_a_quota_that_is_spent(given, spent):
    assert replies.has_no_quota(given) == spent
