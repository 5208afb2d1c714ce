"""What a chat completions server replies: an answer, in any of the forms that servers give it, or why there is none.

Pure functions of a response's body. What is done about a refusal is decided in `openai.py`.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from expo.engines import Failure, Outcome, Request, TextCompletion
from expo.files import Row, shown
from expo.redact import without_secrets

FINISHED: dict[str, Literal["stop", "length"]] = {
    **dict.fromkeys(("stop", "eos", "eos_token", "stop_token", "stop_sequence", "end_turn", "complete"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "max_length", "model_length"), "length"),
}
"""What servers call the end of an answer, in lower case, and which of the two ends it is."""

MAX_REASON_CHARACTERS = 300

# --- answers -------------------------------------------------------------------------------------------------------


def read_reply(content: bytes, charset: str | None = None) -> Row:
    """The JSON object in a response's body; the pieces of a streamed answer are put together.

    Args:
        content: The body.
        charset: What its Content-Type says; servers that send another encoding than UTF-8 may not say so.

    Raises:
        UnicodeDecodeError: It looks like an object, but is no text in that encoding.
        ValueError: It is not an object.
        RecursionError: It is nested too deep.
    """
    try:
        text = _decoded(content, charset).strip()
    except UnicodeDecodeError:
        if content.lstrip().startswith((b"{", b"data:")):
            raise
        raise ValueError("it is no JSON") from None
    answer = _put_together(text) if re.match(r"data:|event:|:", text) else json.loads(text)
    if not isinstance(answer, dict):
        raise ValueError("it is no JSON object")
    return answer


def _decoded(content: bytes, charset: str | None) -> str:
    own = json.detect_encoding(content)
    try:
        return content.decode(charset if charset and own == "utf-8" else own, "surrogatepass")
    except LookupError:
        return content.decode(own, "surrogatepass")


def _put_together(stream: str) -> Row:
    """A completion made of the server-sent events of one, which some servers send whatever is asked for."""
    pieces, finish, usage, ended = [], None, None, False
    for line in stream.split("\n"):
        data = line.strip().removeprefix("data:").strip() if line.startswith("data:") else ""
        ended |= data == "[DONE]"
        if not data.startswith("{"):
            continue
        chunk = json.loads(data)
        choices = chunk.get("choices")
        if "error" in chunk:
            return {"error": chunk["error"]}
        choice = _object(choices[0]) if isinstance(choices, list) and choices else {}
        pieces.append(text_of(_object(choice.get("delta") or choice.get("message")).get("content")) or "")
        finish, usage = choice.get("finish_reason") or finish, chunk.get("usage") or usage
    if not any(pieces) and finish is None:
        return {"error": "an empty stream"}
    finish = finish if finish or ended else "the end of an unfinished stream"
    return {"choices": [{"message": {"content": "".join(pieces)}, "finish_reason": finish}], "usage": usage}


def outcome_of(request: Request, answer: Row) -> Outcome:
    """The completion that a response holds, or why it holds none."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices:
        return Failure(request, f"the server gave no answer: {reason_in(answer)}")
    choice, usage = _object(choices[0]), _object(answer.get("usage"))
    message, said = _object(choice.get("message")), choice.get("finish_reason")
    text = text_of(message.get("content"))
    length = _count(usage.get("completion_tokens")) or (None if text else 0)
    if said in (None, "") and text:
        finish: Literal["stop", "length"] | None = "length" if (length or 0) >= request.max_tokens else "stop"
    else:
        finish = FINISHED.get(said.lower()) if isinstance(said, str) else None
    if finish is None:
        return Failure(request, f"the server ended the answer with {shown(said)}")
    thoughts = message.get("reasoning_content") or message.get("reasoning") or isinstance(message.get("content"), list)
    if not text and thoughts and finish == "length":
        reason = "the server's answer contains no text, only reasoning; a larger --max-tokens leaves room for an answer"
        return Failure(request, reason, lasting=True)
    if text is None:
        refusal = message.get("refusal")
        why = f"the model refuses: {refusal}" if isinstance(refusal, str) else "the server's answer contains no text"
        return Failure(request, one_line(why))
    return TextCompletion(request, text, length, _count(usage.get("prompt_tokens")) or None, finish)


def text_of(content: object) -> str | None:
    """An answer's text, whole or in parts, of which thoughts are none; None where there is no text.

    Half of a surrogate pair, which a cut emoji leaves, is replaced: no file, tokenizer or later turn could hold it.
    """
    if isinstance(content, list):
        parts = [part if isinstance(part, str) else _text_part(_object(part)) for part in content]
        texts = [part for part in parts if part is not None]
        content = "".join(texts) if texts else None
    return whole_pairs(content) if isinstance(content, str) else None


def _text_part(part: dict[str, Any]) -> str | None:
    text = part.get("text")
    return text if part.get("type", "text") in ("text", "output_text") and isinstance(text, str) else None


def whole_pairs(text: str) -> str:
    """Text with U+FFFD in place of halves of surrogate pairs."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _count(value: object) -> int | None:
    """A number of tokens that a server reports; None where it is none."""
    return value if type(value) is int and value >= 0 else None


def _object(value: object) -> dict[str, Any]:
    """A JSON value that should be an object; empty where it is not."""
    return value if isinstance(value, dict) else {}


# --- refusals ------------------------------------------------------------------------------------------------------

LENGTH_FIELDS = ("max_tokens", "max_completion_tokens")
"""What the limit of new tokens is called. A server that does not know the second would ignore it and generate without
a limit; one that knows the second may refuse the first."""

OMIT_VLLM_FIELDS = "--top-k -1 omits the fields that only vLLM has"
ADVICE = {
    "top_k": OMIT_VLLM_FIELDS,
    "min_p": OMIT_VLLM_FIELDS,
    "repetition_penalty": OMIT_VLLM_FIELDS,
    "stop_token_ids": "run without --stop-token-id",
    **dict.fromkeys(LENGTH_FIELDS, "choose another --max-tokens"),
    "top_p": "choose another --top-p, such as 1",
    "temperature": "choose another --temperature, such as 1",
    "seed": "expo sends one with every request, so this server cannot be used",
    "presence_penalty": "--presence-penalty 0 omits it",
    "frequency_penalty": "--frequency-penalty 0 omits it",
    "model": "choose another --model",
}
"""Fields that are the same in every row, and what to do where the server rejects one."""

UNKNOWN_FIELD = re.compile(
    r"un(?:supported|recogni[sz]ed|known|expected)[ _](?:request )?(?:parameter|argument|field|keyword|property)"
    r"|extra[ _](?:forbidden|inputs|fields)",
    re.IGNORECASE,
)
"""How servers say that they do not take a field at all, whatever its value."""
REFUSAL = re.compile(
    rf"{UNKNOWN_FIELD.pattern}|un(?:supported|expected)|not (?:support|supported|permitted|allowed)|deprecated|instead",
    re.IGNORECASE,
)
"""How servers say that they do not take a field, or its value."""

TOO_LONG = re.compile(
    r"context[ _-]?(?:length|size|window|limit)|(?:prompt|input|messages?) (?:is|are) too long|inputs?`? tokens"
    r"|too many (?:input |prompt )?tokens|longer than the maximum|reduce (?:the length|your prompt)",
    re.IGNORECASE,
)
"""How servers say that a prompt, or it and its answer, is longer than the model takes."""

OF_THE_ANSWER = re.compile(r"completion|max_(?:new_)?tokens|output|generat", re.IGNORECASE)
PROMPT_TOKENS = re.compile(
    r"(\d+) (?:input tokens|tokens (?:in|from) |in (?:the|your) (?:messages|prompt))|length (\d+)"
)
LIMIT = re.compile(r"(?:context[ _-]?(?:length|size|window|limit)|maximum|limit)\D{0,30}?(\d+)", re.IGNORECASE)


def reason_in(body: object) -> str:
    """The error message in a response's body, on one line and without secrets."""
    if isinstance(body, dict):
        error = body.get("error", body)
        found = error.get("message") or error.get("detail") or error if isinstance(error, dict) else error
        text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    else:
        text = str(body or "no reason given")
    return one_line(text)


def one_line(text: str) -> str:
    """Text from a server for a message: on one line, shortened, without secrets."""
    text = " ".join(without_secrets(text).split())
    return text if len(text) <= MAX_REASON_CHARACTERS else f"{text[:MAX_REASON_CHARACTERS]}…"


def is_too_long(body: object) -> bool:
    """Whether a prompt, or it and its answer, is too long for the model."""
    return bool(TOO_LONG.search(reason_in(body)) or _object(body).get("code") == "context_length_exceeded")


def leaves_no_room(body: object) -> bool:
    """Whether a refusal of a row that is too long is about its answer as well, so that fewer tokens would do."""
    text = reason_in(body)
    if not OF_THE_ANSWER.search(text) or "even without" in text:
        return False
    prompt, limit = PROMPT_TOKENS.search(text), LIMIT.search(text)
    return not prompt or not limit or int(prompt[1] or prompt[2]) < int(limit[1])


def rejected_field(body: object) -> str | None:
    """The field that the server rejects in every row; None where it rejects this row only."""
    if is_too_long(body):
        return None
    given = _object(body)
    param, details = given.get("param"), _details(given)
    if isinstance(param, str) and param in ADVICE:
        return param
    if details:
        places = [str(place) for detail in details for place in _places(detail)]
        return next((place for place in places if place in ADVICE), None)
    text = reason_in(body)
    named = {name: re.search(rf"\b{name}\b", text) for name in ADVICE if "_" in name}
    if REFUSAL.search(text):  # a word such as seed may be the prompt's own
        words = [name for name in ADVICE if "_" not in name]
        named |= {
            name: re.search(rf"(?:['\"`]|(?:argument|parameter|field|supplied)\b:? ){name}\b", text) for name in words
        }
    first = {name: found.start() for name, found in named.items() if found}
    return min(first, key=first.__getitem__, default=None)


def _details(body: dict[str, Any]) -> list[Any]:
    """What pydantic found, as FastAPI and services made with it report it."""
    inner = body.get("detail") or _object(body.get("message")).get("detail")
    return inner if isinstance(inner, list) else []


def _places(detail: object) -> list[Any]:
    places = _object(detail).get("loc")
    return places if isinstance(places, list) else []


def is_unknown(field: str, body: object) -> bool:
    """Whether a server does not take a name of the limit of new tokens, and may take the other one."""
    if is_too_long(body):
        return False
    text = f"{json.dumps(body)} {reason_in(body)}"
    if all(re.search(rf"\b{name}\b", text) for name in LENGTH_FIELDS):
        return bool(REFUSAL.search(text))
    return bool(UNKNOWN_FIELD.search(text)) and rejected_field(body) == field


def wants_stream(body: object) -> bool:
    """Whether a server answers in a stream only."""
    return bool(re.search(r"\bstream(?:ing)?\b", text := reason_in(body)) and re.search(r"only|must|require", text))


def has_no_quota(body: object) -> bool:
    """Whether a key's money is spent, which waiting does not change; a busy server says 429 as well."""
    return bool(re.search(r"insufficient_quota|billing_(?:hard_limit_reached|not_active)", json.dumps(body)))
