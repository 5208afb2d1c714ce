"""The openai engine against a server that misbehaves: what is sent again, what fails a row, what ends the run."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import helpers
import pytest
from chat_server import KEY, USAGE, ChatServer, answer, cut, drip_until, error, reply, wait_for

from expo.cli import program as cli
from expo.config import GenerateConfig
from expo.engines import openai as backend
from expo.errors import EnvironmentFailure, InputError
from expo.journal import read_journal
from expo.verbs import generate as verb

CERTIFICATES = functools.cache(ssl.create_default_context)
PROMPTS = [f"prompt {number}" for number in range(8)]


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer().serve() as server:
        yield server


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return file


@pytest.fixture(autouse=True)
def _one_set_of_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every client would read them anew, for a tenth of a second."""
    monkeypatch.setattr(ssl, "create_default_context", CERTIFICATES)


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between two tries, in seconds; none is really waited for."""
    from openai import AsyncOpenAI, OpenAI

    seen: list[float] = []
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for kind in (AsyncOpenAI, OpenAI):
        original = kind._calculate_retry_timeout

        def at_once(self, *args, _original=original, **kwargs) -> float:
            seen.append(_original(self, *args, **kwargs))
            return 0.0

        monkeypatch.setattr(kind, "_calculate_retry_timeout", at_once)
    return seen


@pytest.fixture
def generate(server: ChatServer, prompt_file: Path, tmp_path: Path):
    """`expo generate` on the prompts with this server."""

    def run(**others) -> verb.Generated:
        given = {"task": str(prompt_file), "model": "org/name", "base_url": server.url, "output_dir": str(tmp_path)}
        return verb.run(GenerateConfig(**{**given, "engine": "openai", **others}))

    return run


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def journal_of(folder: Path) -> list[dict]:
    return read_journal(folder / "outputs_questions" / ".name.journal.jsonl")[1:]


# --- what is sent and what comes back -----------------------------------------------------------------------------


def test_rows_are_the_servers_text_and_its_count_of_tokens(generate, server, tmp_path):
    server.script = {
        PROMPTS[2]: [answer(" Ünicode\n", finish_reason="length", usage={**USAGE, "completion_tokens": 9})]
    }
    result = generate()
    rows = rows_of(result.output)
    assert result.output == tmp_path / "outputs_questions" / "name.jsonl"
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["output"] for row in rows] == [p.upper() if p != PROMPTS[2] else " Ünicode\n" for p in PROMPTS]
    assert (rows[2]["length"], rows[2]["finish_reason"]) == (9, "length")
    meta = json.loads(result.meta.read_text())
    assert (meta["tokens_in"], meta["tokens_out"]) == (3 * 8, 2 * 7 + 9)
    assert (meta["engine"], meta["repeatable"]) == ("openai", False)
    assert meta["model"] == {"name": "org/name", "revision": None}
    assert generate().status == "already complete"
    assert sorted(server.asked) == PROMPTS


@pytest.mark.parametrize(
    ("settings", "extra"),
    [
        ({}, {"top_k": 50, "min_p": 0.0, "repetition_penalty": 1.0}),
        ({"top_k": 0}, {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}),
        ({"top_k": -1}, {}),
        ({"top_k": -1, "stop_token_id": (7, 9)}, {"stop_token_ids": [7, 9]}),
    ],
)
def test_the_fields_of_a_request(generate, server, settings, extra):
    generate(limit=1, n=2, system="be brief", max_tokens=5, temperature=0.25, seed_mode="shared", **settings)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": PROMPTS[0]}]
    expected = {"model": "org/name", "messages": messages, "max_tokens": 5, "temperature": 0.25, "top_p": 0.9}
    expected |= {"presence_penalty": 0.1, "frequency_penalty": 0.1, **extra}
    assert sorted(server.seen, key=lambda body: body["seed"]) == [{**expected, "seed": 42}, {**expected, "seed": 43}]


@pytest.mark.parametrize("concurrency", [1, 3, 100])
def test_so_many_requests_are_under_way_at_once(generate, server, concurrency):
    generate(concurrency=concurrency)
    assert sorted(server.asked) == PROMPTS
    assert server.most_at_once <= concurrency
    server.gate = threading.Event()
    opener = threading.Thread(target=open_when_full, args=(server, min(concurrency, 8)))
    opener.start()
    generate(concurrency=concurrency, name="again")
    opener.join()
    assert server.most_at_once == min(concurrency, 8)


def open_when_full(server: ChatServer, requests: int) -> None:
    deadline = time.monotonic() + 60
    while server.most_at_once < requests and time.monotonic() < deadline:
        time.sleep(0.01)
    server.gate.set()


def test_the_key_is_sent_and_a_server_without_one_gets_a_placeholder(generate, server, monkeypatch):
    generate(limit=1)
    monkeypatch.delenv("OPENAI_API_KEY")
    generate(limit=1, name="again")
    assert server.keys == {f"Bearer {KEY}", f"Bearer {backend.NO_KEY}"}


# --- what is sent again -------------------------------------------------------------------------------------------

BUSY = error(429, "slow down")
SENT_AGAIN = {
    "busy": [BUSY],
    "broken twice": [error(500, "oops"), error(503, "oops")],
    "cut in its middle": [cut],
    "a gateway's page": [reply(502, b"<html>bad gateway</html>")],
}


@pytest.mark.parametrize("replies", SENT_AGAIN.values(), ids=SENT_AGAIN.keys())
def test_what_fails_for_now_is_sent_again(generate, server, waits, replies):
    server.script = {PROMPTS[3]: list(replies)}
    result = generate()
    assert result.failed == 0
    assert rows_of(result.output)[3]["output"] == PROMPTS[3].upper()
    assert server.asked.count(PROMPTS[3]) == 1 + len(replies) == 1 + len(waits)


def test_the_server_says_how_long_to_wait(generate, server, waits):
    server.script = {PROMPTS[3]: [reply(429, {}, retry_after="47")]}
    assert generate().failed == 0
    assert waits == [47.0]


def test_a_server_that_hangs_is_asked_again(generate, server, waits, monkeypatch):
    monkeypatch.setattr(backend, "TIMEOUT_S", 1.0)
    never = threading.Event()
    server.script = {PROMPTS[3]: [wait_for(never)]}
    result = generate()
    never.set()
    assert rows_of(result.output)[3]["output"] == PROMPTS[3].upper()
    assert waits


def test_an_answer_that_never_ends_is_asked_for_again(generate, server, waits, monkeypatch):
    monkeypatch.setattr(backend, "TIMEOUT_S", 1.0)
    never = threading.Event()
    server.script = {PROMPTS[3]: [drip_until(never)]}
    result = generate()
    never.set()
    assert rows_of(result.output)[3]["output"] == PROMPTS[3].upper()
    assert waits


# --- what fails a row ---------------------------------------------------------------------------------------------

TOO_LONG = "This model's maximum context length is 512 tokens. However, you requested max_tokens=600 (parameter=x)"
FAILED = {
    "too long": (error(400, TOO_LONG, param="input_tokens"), "maximum context length is 512 .*(HTTP 400)"),
    "too large": (reply(413, b"<html>too\nlarge</html>"), r"<html>too large</html> \(HTTP 413\)"),
    "unprocessable": (reply(422, {"detail": [{"loc": ["body", "messages"], "msg": "no"}]}), "messages.*HTTP 422"),
    "filtered": (answer("", finish_reason="content_filter"), "ended the answer with 'content_filter'"),
    "a tool's": (answer(None, finish_reason="tool_calls"), "ended the answer with 'tool_calls'"),
    "no text": (answer(None), "contains no text"),
    "no choices": (reply(200, {"choices": [], "usage": USAGE}), "gave no answer"),
    "choices of another kind": (reply(200, {"choices": {"0": {}}, "usage": USAGE}), "gave no answer"),
    "a choice of another kind": (reply(200, {"choices": ["text"], "usage": USAGE}), "ended the answer with None"),
    "no message": (
        reply(200, {"choices": [{"message": None, "finish_reason": "stop"}], "usage": USAGE}),
        "the server's answer contains no text",
    ),
    "half a pair in the reason": (error(400, "no \ud83d"), "rejects it: no \ud83d"),
    "a field of another kind": (error(400, "not this one", param=["messages"]), "not this one"),
    "an error inside": (reply(200, {"error": {"message": "the provider fell over", "code": 502}}), "fell over"),
}


@pytest.mark.parametrize(("given", "reason"), FAILED.values(), ids=FAILED.keys())
def test_a_row_that_is_refused_is_marked_and_the_others_go_on(generate, server, given, reason):
    server.script = {PROMPTS[3]: [given]}
    result = generate()
    rows = rows_of(result.output)
    assert result.failed == 1
    assert [row["finish_reason"] == "error" for row in rows] == [number == 3 for number in range(8)]
    assert (rows[3]["output"], rows[3]["length"]) == ("", 0)
    errors = json.loads(result.meta.read_text())["errors"]
    assert [(one["row"], one["id"]) for one in errors] == [(3, "3")]
    assert re.search(reason, errors[0]["reason"])
    again = generate()
    assert (again.failed, server.asked.count(PROMPTS[3])) == (0, 2)
    assert len(server.asked) == 9


def test_half_a_pair_in_an_answer_is_replaced_and_can_be_sent_back(generate, server, tmp_path):
    questions = tmp_path / "question.jsonl"
    rows = [{"question_id": row, "category": "math", "turns": [f"{row}?", f"{row}!"]} for row in (81, 82)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    server.script = {"81?": [answer("half a pair: \ud83d")]}
    result = generate(task="mtbench", dataset=str(questions))
    assert result.failed == 0
    assert rows_of(result.output)[0]["choices"][0]["turns"] == ["half a pair: \ufffd", "81!"]
    sent = [body["messages"] for body in server.seen if body["messages"][-1]["content"] == "81!"]
    assert sent[0][1] == {"role": "assistant", "content": "half a pair: \ufffd"}


def test_half_a_pair_in_an_answer_of_an_older_run_fails_the_next_turn(generate, server, tmp_path, monkeypatch):
    monkeypatch.setattr("expo.engines.chat_replies.whole_pairs", lambda text: text)
    questions = tmp_path / "question.jsonl"
    questions.write_text(json.dumps({"question_id": 81, "category": "math", "turns": ["81?", "81!"]}) + "\n")
    server.script = {"81?": [answer("half a pair: \ud83d")]}
    result = generate(task="mtbench", dataset=str(questions))
    assert (result.failed, result.can_retry, server.asked) == (1, False, ["81?"])
    assert "UTF-8 cannot encode" in result.reason


def test_an_answer_in_another_encoding_fails_its_row(generate, server):
    server.script = {PROMPTS[3]: [reply(200, '{"choices": "ä"}'.encode("latin-1"))]}
    result = generate()
    assert (result.failed, result.reason) == (1, "row 3: the server's answer is not UTF-8 text (byte 0xe4 at 13)")


@pytest.mark.parametrize("usage", [None, [2, 3], {"completion_tokens": None}], ids=["none", "another kind", "null"])
def test_an_answer_of_unknown_length(generate, server, usage):
    server.script = {PROMPTS[3]: [answer("text", usage=usage)]}
    result = generate()
    rows = rows_of(result.output)
    assert (rows[3]["output"], rows[3]["length"], rows[3]["finish_reason"]) == ("text", None, "stop")
    meta = json.loads(result.meta.read_text())
    assert (meta["tokens_in"], meta["tokens_out"], meta["rows_of_unknown_length"]) == (3 * 7, 2 * 7, 1)
    assert meta["per_row"]["length"] == [2, 2, 2, None, 2, 2, 2, 2]
    assert generate().status == "already complete"


def test_rows_of_unknown_length_are_joined_extended_and_continued(generate, server):
    server.script = {"*": [answer("text", usage=None)]}
    assert generate(limit=4).rows == 4
    assert generate().rows == 8
    for part in ("0/2", "1/2"):
        generate(name="parts", part=part)
    result = generate(name="parts", join=2)
    assert [row["length"] for row in rows_of(result.output)] == [None] * 8
    assert json.loads(result.meta.read_text())["tokens_out"] == 0


# --- what a server wants in another form --------------------------------------------------------------------------

UNSUPPORTED = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)


def test_the_limit_has_its_newer_name_once_a_server_says_so(generate, server):
    no = error(400, UNSUPPORTED, param="max_tokens", code="unsupported_parameter")
    server.look = lambda body: no if "max_tokens" in body else None
    result = generate(concurrency=1, max_tokens=7)
    assert result.failed == 0
    assert [row["output"] for row in rows_of(result.output)] == [prompt.upper() for prompt in PROMPTS]
    assert server.asked == [PROMPTS[0], *PROMPTS]
    assert [body.get("max_completion_tokens") for body in server.seen] == [None, *[7] * 8]
    assert all("max_tokens" not in body for body in server.seen[1:])


def test_many_requests_under_way_change_to_the_newer_name(generate, server):
    server.look = lambda body: error(422, UNSUPPORTED) if "max_tokens" in body else None
    assert generate(concurrency=8).failed == 0


def test_a_server_that_takes_neither_name_ends_the_run(generate, server):
    def refuse(body):
        name = "max_tokens" if "max_tokens" in body else "max_completion_tokens"
        return reply(422, {"detail": [{"type": "extra_forbidden", "loc": ["body", name], "msg": "no"}]})

    server.look = refuse
    with pytest.raises(InputError, match="rejects max_completion_tokens"):
        generate(concurrency=1)
    assert len(server.asked) == 2


def test_a_server_that_only_streams(generate, server):
    chunk = {"choices": [{"delta": {"content": "streamed"}, "finish_reason": "stop"}]}
    content = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode()
    whole = error(400, "This server only supports streaming: set stream to true")
    server.look = lambda body: reply(200, content) if body.get("stream") else whole
    rows = rows_of(generate(concurrency=1).output)
    assert [(row["output"], row["length"]) for row in rows] == [("streamed", None)] * 8
    assert len(server.asked) == 9


def test_penalties_of_zero_are_not_sent(generate, server):
    generate(limit=1, presence_penalty=0.0, frequency_penalty=0.0)
    assert not {"presence_penalty", "frequency_penalty"} & server.seen[0].keys()


# --- what is one row's own fault ----------------------------------------------------------------------------------

MODERATED = error(403, "Your input was flagged by moderation")
POISON = {
    "moderated": (MODERATED, "the server refuses it: Your input was flagged by moderation (HTTP 403)", False),
    "always broken": (error(500, "oops"), "the server refuses it: oops (HTTP 500)", True),
    "always too much": (error(429, "Request too large"), "the server refuses it: Request too large (HTTP 429)", True),
    "always cut": (cut, "the server did not answer in 11 tries: ", True),
    "a legal matter": (error(451, "not here"), "the server refuses it: not here (HTTP 451)", True),
}


@pytest.mark.parametrize(("row", "concurrency"), [(0, 1), (7, 1), (3, 8)])
@pytest.mark.parametrize(("given", "reason", "can_retry"), POISON.values(), ids=POISON.keys())
def test_a_row_that_is_never_answered_is_marked(generate, server, given, reason, can_retry, row, concurrency):
    server.look = lambda body: given if body["messages"][-1]["content"] == PROMPTS[row] else None
    result = generate(concurrency=concurrency)
    assert (result.rows, result.failed, result.can_retry) == (8, 1, can_retry)
    assert result.reason.startswith(f"row {row}: {reason}")
    assert [line["finish_reason"] == "error" for line in rows_of(result.output)] == [n == row for n in range(8)]
    assert generate(concurrency=concurrency).failed == 1, "a rerun tries it, and no other"
    assert all(server.asked.count(prompt) == 1 for prompt in PROMPTS if prompt != PROMPTS[row])
    server.look = lambda _: None
    assert generate(concurrency=concurrency).failed == 0


@pytest.mark.parametrize("concurrency", [1, 8])
def test_many_moderated_rows(generate, server, concurrency):
    server.look = lambda body: MODERATED if body["messages"][-1]["content"] in PROMPTS[1:7] else None
    assert generate(concurrency=1).failed == 6
    assert generate(concurrency=concurrency).failed == 6


def test_a_server_that_refuses_all_rows_is_not_asked_for_all(generate, server):
    server.look = lambda body: MODERATED if body["messages"][-1]["content"] in PROMPTS else None
    with pytest.raises(InputError, match="denies access with the key in OPENAI_API_KEY: Your input"):
        generate(concurrency=1)
    assert PROMPTS[4] not in server.asked


@pytest.mark.parametrize(
    ("given", "kind"),
    [(MODERATED, InputError), (error(503, "down"), EnvironmentFailure), (cut, EnvironmentFailure)],
    ids=["refused", "down", "cut"],
)
def test_a_server_that_refuses_everything_from_some_row_on_ends_the_run(generate, server, tmp_path, given, kind):
    server.look = lambda _: given if len(server.seen) > 3 else None
    with pytest.raises(kind):
        generate(concurrency=1)
    assert [row["id"] for row in journal_of(tmp_path)] == ["0", "1", "2"]
    server.look = lambda _: None
    assert generate().failed == 0


def test_a_field_that_other_rows_were_answered_with_fails_only_its_row(generate, server):
    server.script = {PROMPTS[3]: [error(400, "max_tokens must be at most 5 for this prompt", param="max_tokens")]}
    result = generate(concurrency=1)
    assert (result.failed, result.can_retry) == (1, False)


def test_a_quota_that_is_spent_is_not_asked_for_again(generate, server):
    server.script = {"*": [error(429, "You exceeded your current quota", code="insufficient_quota")]}
    with pytest.raises(EnvironmentFailure, match=r"has no quota left for the key in OPENAI_API_KEY: .*add credit"):
        generate(concurrency=1)
    assert len(server.asked) == 1


def test_a_wait_that_is_too_long_is_told(generate, server):
    server.script = {"*": [reply(429, {"error": {"message": "slow down"}}, retry_after="3600")]}
    with pytest.raises(EnvironmentFailure, match=r"slow down \(HTTP 429, retry after 3600\)"):
        generate(concurrency=1)


# --- what ends the run --------------------------------------------------------------------------------------------

ENDS = {
    "another key": (error(401, f"Incorrect API key: {KEY}"), InputError, r"OPENAI_API_KEY: Incorrect API key: sk-… \("),
    "no access": (error(403, "not you"), InputError, "denies access with the key in OPENAI_API_KEY: not you"),
    "another model": (error(404, "The model does not exist"), InputError, "does not know the model, .*does not exist"),
    "another API": (reply(405, b""), InputError, "is not a chat completions API"),
    "vLLM's fields": (
        error(400, "Unrecognized request argument supplied: top_k"),
        InputError,
        "rejects top_k: .*; --top-k -1 omits the fields that only vLLM has",
    ),
    "FastAPI's refusal": (
        reply(422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "min_p"], "msg": "not permitted"}]}),
        InputError,
        "rejects min_p: .*; --top-k -1",
    ),
    "a value": (error(400, "only 1 here", param="temperature"), InputError, "rejects temperature: .*--temperature"),
    "too many tokens": (
        error(400, "max_tokens=2048 cannot be greater than max_model_len=512", param="max_tokens"),
        InputError,
        "choose another --max-tokens",
    ),
    "no money": (
        error(402, "pay first"),
        EnvironmentFailure,
        "cannot answer now: pay first .*rerun the same command to continue",
    ),
    "always busy": (BUSY, EnvironmentFailure, "cannot answer now: slow down .*rerun the same command to continue"),
    "always cut": (cut, EnvironmentFailure, "did not answer in 11 tries: .*rerun the same command to continue"),
    "no JSON": (
        reply(200, b"<html>log in</html>"),
        EnvironmentFailure,
        r"did not return a JSON object but <html>log in.*/v1\?",
    ),
    "too deep": (reply(200, b"[" * 200_000), EnvironmentFailure, r"did not return a JSON object but \[\["),
    "no seed": (error(400, "Unknown parameter: 'seed'"), InputError, "rejects seed: .*this server cannot be used"),
}


@pytest.mark.parametrize(("given", "kind", "message"), ENDS.values(), ids=ENDS.keys())
def test_what_every_row_would_get_ends_the_run(generate, server, tmp_path, given, kind, message):
    generate(limit=3)
    server.script = {"*": [given]}
    with pytest.raises(kind, match=message) as caught:
        generate()
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    server.script = {}
    assert generate().rows == 8
    assert all(server.asked.count(prompt) == 1 for prompt in PROMPTS[:3]), "finished rows were kept"


def test_rows_that_were_answered_before_the_end_are_kept(generate, server, tmp_path):
    server.script = {PROMPTS[5]: [error(401, "no")]}
    with pytest.raises(InputError):
        generate(concurrency=1)
    assert [row["id"] for row in journal_of(tmp_path)] == ["0", "1", "2", "3", "4"]
    assert generate(concurrency=1).failed == 0
    assert [server.asked.count(prompt) for prompt in PROMPTS] == [1, 1, 1, 1, 1, 2, 1, 1]


def test_nothing_listens(generate, tmp_path):
    with pytest.raises(EnvironmentFailure, match=r"no server answers at http://…@127\.0\.0\.1:9/v1: .*--base-url"):
        generate(base_url="http://me:secretive@127.0.0.1:9/v1")
    assert not (tmp_path / "outputs_questions").exists()


def test_a_dead_proxy_is_named(generate, monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://me:secretive@127.0.0.1:9")
    words = r"through the proxy of HTTP_PROXY \(http://…@127\.0\.0\.1:9\): .*; set NO_PROXY=127\.0\.0\.1 to"
    with pytest.raises(EnvironmentFailure, match=words):
        generate()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ALL_PROXY": "socks://a:9/"}, "ALL_PROXY=socks://a:9/ cannot be used"),
        ({"SSL_CERT_FILE": "/no/ca.pem"}, "SSL_CERT_FILE is not a file: /no/ca.pem"),
        ({"HTTPS_PROXY": "socks://a:9/"}, None),
        ({"ALL_PROXY": "socks://a:9/", "NO_PROXY": "127.0.0.1"}, None),
    ],
    ids=["a proxy", "certificates", "a proxy for others", "around the proxy"],
)
def test_variables_that_cannot_be_used(generate, server, monkeypatch, given, message):
    for name in ("no_proxy", "NO_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if message is None:
        assert generate().rows == 8
        return
    with pytest.raises(InputError, match=message):
        generate()
    assert server.seen == []


# --- what is refused before anything is asked ---------------------------------------------------------------------

REFUSED = [
    ({"base_url": None}, "--engine openai needs the server's --base-url"),
    ({"engine": "transformers"}, "--base-url works only with the openai engine, and this run uses transformers"),
    ({"engine": "transformers", "base_url": None, "concurrency": 2}, "--concurrency works only with the openai engine"),
    ({"engine_arg": ("x=1",)}, "--engine-arg works only with the vllm engine, and this run uses openai"),
    (
        {"chat_template": "x"},
        "--chat-template works only with the vllm and transformers engines, and this run uses openai",
    ),
    ({"dtype": "float32"}, "--dtype works only with"),
    ({"device": "cpu"}, "--device works only with"),
    ({"tensor_parallel": 2}, "--tensor-parallel works only with"),
    ({"trust_remote_code": True}, "--trust-remote-code works only with"),
    ({"model": "../"}, "no output name can be derived from --model '../'; pass --name"),
    ({"concurrency": 0}, "--concurrency must be positive"),
    *(
        ({"base_url": url}, "--base-url must be a URL such as http://localhost:8000/v1, not ")
        for url in ("localhost:8000", "ftp://a/v1", "http://", "http://a:b/v1", "http://a/v1?k=1", "http://a/v 1")
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_settings_that_do_not_fit_are_refused(generate, server, tmp_path, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        generate(**settings)
    assert "\n" not in str(caught.value)
    assert server.seen == []
    assert not (tmp_path / "outputs_questions").exists()


def test_another_url_is_the_same_model_and_another_name_is_not(generate, server):
    generate(limit=4, name="mine")
    assert generate(name="mine", base_url=server.url.replace("127.0.0.1", "localhost")).rows == 8
    assert len(server.asked) == 8
    with pytest.raises(InputError, match=r"made with a different model \('org/name' then, 'other' now\)"):
        generate(name="mine", model="other")


def test_the_plan_asks_no_server(server, prompt_file, tmp_path, capsys):
    words = arguments(server, prompt_file, tmp_path, "--dry-run", "--json")
    assert cli.run([*map(str, words)]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["model"], described["engine"], described["rows"]) == ("org/name", "openai", 8)
    assert described["prompt_tokens"] is described["context_length"] is None
    assert server.seen == []


def test_a_key_that_cannot_be_sent_is_refused_unseen(generate, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-first-half\nsk-second-half")
    with pytest.raises(InputError, match=r"OPENAI_API_KEY contains invalid characters$"):
        generate()


def test_a_missing_package_names_its_command(generate, monkeypatch):
    monkeypatch.setattr(backend, "find_spec", lambda _: None)
    with pytest.raises(EnvironmentFailure, match=r"pip install 'llm-expo\[openai\]'"):
        generate()


# --- the program --------------------------------------------------------------------------------------------------


def arguments(server: ChatServer, prompt_file: Path, folder: Path, *more: object) -> list[object]:
    url = server.url.replace("//", "//me:secretive@")
    given = ["generate", prompt_file, "--engine", "openai", "--base-url", url, "--model", "org/name"]
    return [*given, "--output-dir", folder, *more]


TOLD = {
    "one, for now": (
        {PROMPTS[3]: [answer(None)]},
        "1 row failed and is marked: row 3: the server's answer contains no text; the same command tries it again",
    ),
    "one, for good": (
        {PROMPTS[3]: [error(400, "no")]},
        "1 row failed and is marked: row 3: the server rejects it: no (HTTP 400)",
    ),
    "several": (
        {PROMPTS[3]: [error(400, "no")], PROMPTS[5]: [answer(None)]},
        "2 rows failed and are marked; the first is row 3: the server rejects it: no (HTTP 400); "
        "the same command tries them again",
    ),
    "no room": (
        {"*": [error(400, "maximum context length is 99 tokens, max_tokens is 2048")]},
        "8 rows failed and are marked; the first is row 0: the server rejects it: maximum context length is 99 tokens, "
        "max_tokens is 2048 (HTTP 400); a smaller --max-tokens leaves the prompt more room",
    ),
}


@pytest.mark.parametrize(("script", "line"), TOLD.values(), ids=TOLD.keys())
def test_why_rows_failed_is_told_and_whether_to_try_again(server, prompt_file, tmp_path, capsys, caplog, script, line):
    server.script = script
    cli.log.addHandler(caplog.handler)
    try:
        assert cli.run([*map(str, arguments(server, prompt_file, tmp_path, "--json"))]) == 3
    finally:
        cli.log.removeHandler(caplog.handler)
    assert caplog.messages[-1] == line
    said = json.loads(capsys.readouterr().out)
    assert said["reason"] in line
    assert said["can_retry"] == ("tries" in line)


ECHOED = {
    "an echo fails a row": (error(400, f"no: {KEY} http://me:secretive@host"), 3),
    "an echo ends the run": (error(401, f"no: {KEY}"), 2),
    "no server": (None, 1),
}


@pytest.mark.parametrize(("given", "code"), ECHOED.values(), ids=ECHOED.keys())
def test_neither_key_nor_password_is_printed_or_written(server, prompt_file, tmp_path, capsys, given, code):
    server.script = {"*": [given]}
    words = arguments(server, prompt_file, tmp_path, "--debug")
    level = cli.log.level
    if given is None:
        words[words.index("--base-url") + 1] = "http://me:secretive@127.0.0.1:9/v1"
    assert cli.run([*map(str, words)]) == code
    cli.log.setLevel(level)
    out, err = capsys.readouterr()
    written = b"".join(helpers.tree(tmp_path).values()).decode()
    assert given is None or "sk-…" in err + written
    for secret in (KEY, "secretive"):
        assert secret not in out + err + written


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_process_loses_only_what_was_under_way(server, prompt_file, tmp_path, stop):
    hold = threading.Event()
    server.script = {PROMPTS[5]: [wait_for(hold)], PROMPTS[6]: [wait_for(hold)]}
    words = arguments(server, prompt_file, tmp_path, "--concurrency", 2)
    command, env = helpers.expo_command(*words), helpers.environment(OPENAI_API_KEY=KEY)
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: len(journal_of(tmp_path)) == 5 and {PROMPTS[5], PROMPTS[6]} <= set(server.asked), process)
        os.kill(process.pid, stop)
        code = process.wait(30)
        hold.set()
        assert "Traceback" not in process.stderr.read()
    assert code == {signal.SIGKILL: -9, signal.SIGINT: 130}[stop]
    done = {row["id"] for row in journal_of(tmp_path)}
    assert done == {"0", "1", "2", "3", "4"}
    again = cli.run([*map(str, words)])
    assert again == 0
    assert sorted(server.asked) == sorted([*PROMPTS, PROMPTS[5], PROMPTS[6]])


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)
