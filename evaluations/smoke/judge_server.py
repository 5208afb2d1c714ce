"""A judge on a port of this machine: it speaks OpenAI's protocol, and judges by a rule that one can count.

Asked by AlpacaEval, it prefers the longer answer, with probability 0.9; asked by FastChat, it rates an answer by its
length. Requests that neither of them makes are refused, unless it is told how to answer them.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PREFERS = 0.9
"""The probability that the longer answer is called the better one."""

PAIR = re.compile(r'"output": """(.*?)"""\n    }', re.DOTALL)
RATED = (
    re.compile(r"<answer>\n(.*?)\n</answer>", re.DOTALL),
    re.compile(r"\[The Start of Assistant's Answer\]\n(.*?)\n\[The End of Assistant's Answer\]", re.DOTALL),
    re.compile(r"### Assistant A:\n((?:(?!### ).)*?)\n\n<\|The End of Assistant A's", re.DOTALL),
)
"""Where the answer to be rated is: in this folder's own judge prompts, and in FastChat's for one turn and for two."""


def preference(first: str, second: str) -> float:
    """The probability that `second` is called better."""
    if len(first) == len(second):
        return 0.5
    return PREFERS if len(second) > len(first) else 1 - PREFERS


def rating(answer: str) -> int:
    """From 1 to 10, by the answer's length."""
    return 1 + len(answer) % 10


def compare(question: str) -> dict[str, Any]:
    """The choice between the two answers in AlpacaEval's question, as one token with its probabilities."""
    first, second = PAIR.findall(question)
    better = preference(first, second)
    tokens = [{"token": t, "bytes": None, "logprob": math.log(p)} for t, p in (("m", 1 - better), ("M", better))]
    tokens.sort(key=lambda one: -float(str(one["logprob"])))
    content = [{**tokens[0], "top_logprobs": tokens}]
    return {"message": {"role": "assistant", "content": tokens[0]["token"]}, "logprobs": {"content": content}}


def rate(question: str) -> dict[str, Any]:
    """The rating of the last answer in FastChat's question."""
    answer = next(found[-1] for pattern in RATED if (found := pattern.findall(question)))
    text = f"It has {len(answer)} letters. Rating: [[{rating(answer)}]]"
    return {"message": {"role": "assistant", "content": text}}


def undecided(_: str) -> dict[str, Any]:
    """No choice and no rating."""
    token = {"token": "Both", "bytes": None, "logprob": 0.0}
    content = [{**token, "top_logprobs": [token]}]
    return {"message": {"role": "assistant", "content": "Both"}, "logprobs": {"content": content}}


@dataclass
class Judge:
    """A judge at work."""

    address: str = ""
    answered: int = 0
    """How many questions it has been asked."""
    unsure: int = 0
    """So many of the next questions it answers with neither name and no rating."""
    otherwise: Callable[[str], dict[str, Any]] | None = None
    """How it answers what neither AlpacaEval nor FastChat asks."""

    def rule(self, body: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
        """How the next question is answered."""
        self.answered += 1
        if self.unsure:
            self.unsure -= 1
            return undecided
        if body.get("logprobs") and body.get("top_logprobs") == 5:
            return compare
        question = body["messages"][-1]["content"]
        return self.otherwise if self.otherwise and not any(one.search(question) for one in RATED) else rate


@contextmanager
def serve(*models: str, port: int = 0, otherwise: Callable[[str], dict[str, Any]] | None = None) -> Iterator[Judge]:
    """Judge under these names until the end; under any, and without a list of models, where none is given."""
    judge = Judge(otherwise=otherwise)
    server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"models": models, "judge": judge}))
    judge.address = f"http://127.0.0.1:{server.server_port}/v1"
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    models: tuple[str, ...] = ()
    judge = Judge()
    counting = threading.Lock()

    def do_GET(self) -> None:
        listed = [{"id": name, "object": "model", "root": f"made/{name}"} for name in self.models]
        known = self.models and self.path == "/v1/models"
        self._reply(200, {"object": "list", "data": listed} if known else {"error": self.path})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != "/v1/chat/completions" or (self.models and body["model"] not in self.models):
            self._reply(404, {"error": {"message": f"no {body['model']} at {self.path}"}})
            return
        with self.counting:
            rule = self.judge.rule(body)
        choice = {"index": 0, "finish_reason": "stop", **rule(body["messages"][-1]["content"])}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        about = {"id": "judged", "object": "chat.completion", "created": 0, "model": body["model"]}
        self._reply(200, {**about, "choices": [choice], "usage": usage})

    def _reply(self, status: int, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
