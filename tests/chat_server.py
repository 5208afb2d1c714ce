"""A server of chat completions for tests: it answers at once, and misbehaves as it is told to.

A script gives, for a prompt's text, what its successive requests get; when it is used up, and for all other prompts,
the answer is the prompt in capitals. It refuses fields and paths it does not know, so that nothing untested is sent.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-a-made-up-key-0123456789"
FIELDS = {
    *("model", "messages", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "max_tokens"),
    *("top_k", "min_p", "repetition_penalty", "stop_token_ids", "max_completion_tokens", "stream"),
}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}

Handler = BaseHTTPRequestHandler
Reply = Callable[[Handler], None]


def reply(status: int, body: object, **headers: str) -> Reply:
    """A whole answer; a body that is bytes is sent as it is."""

    def send(handler: Handler) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {"content-type": "application/json", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("content-length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return send


def answer(text: str | None, *, finish_reason: str | None = "stop", usage: object = USAGE, **others: object) -> Reply:
    """A chat completion."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return reply(200, {"object": "chat.completion", "choices": [choice], "usage": usage, **others})


def error(status: int, message: str, **others: object) -> Reply:
    """A refusal, as OpenAI spells it."""
    return reply(status, {"error": {"message": message, "type": "made", **others}})


def cut(handler: Handler) -> None:
    """Half a body, and the connection ends."""
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def wait_for(event: threading.Event) -> Reply:
    """Nothing until the event, then an answer."""

    def wait(handler: Handler) -> None:
        event.wait(60)
        answer("LATE")(handler)

    return wait


def drip_until(event: threading.Event) -> Reply:
    """A byte at a time until the event."""

    def drip(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", "1000000")
        handler.end_headers()
        while not event.wait(0.1):
            handler.wfile.write(b" ")

    return drip


@dataclass
class ChatServer:
    """What the server is told and what it saw."""

    script: dict[str, list[Reply]] = field(default_factory=dict)
    """Prompt → what its requests get, in order; `*` is for every prompt and does not run out."""
    look: Callable[[dict[str, Any]], Reply | None] = lambda _: None
    """What a request gets for its fields, before the script; None leaves it to the script."""
    seen: list[dict[str, Any]] = field(default_factory=list)
    """The bodies of all requests."""
    keys: set[str] = field(default_factory=set)
    """The Authorization headers of all requests."""
    most_at_once: int = 0
    gate: threading.Event | None = None
    """Where there is one, no request is answered before it."""
    url: str = ""
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def asked(self) -> list[str]:
        """The prompts of all requests, in order."""
        return [body["messages"][-1]["content"] for body in self.seen]

    def take(self, body: dict[str, Any], key: str) -> Reply:
        """Note a request and say what it gets."""
        prompt = body["messages"][-1]["content"]
        with self._lock:
            self.seen.append(body)
            self.keys.add(key)
            if refusal := self.look(body):
                return refusal
            replies = self.script.get(prompt, [])
            if "*" in self.script:
                return self.script["*"][0]
            return replies.pop(0) if replies else answer(prompt.upper())

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Count the requests that are here at once."""
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1

    @contextmanager
    def serve(self) -> Iterator[ChatServer]:
        """Answer on a free port of this machine until the end."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            yield self
        finally:
            if self.gate is not None:
                self.gate.set()
            server.shutdown()
            server.server_close()
            thread.join()


def _handler(state: ChatServer) -> type[Handler]:
    class Chat(Handler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:  # noqa: N802 - the name http.server looks for
            (error(404, "no list here") if self.path == "/v1/models" else error(500, self.path))(self)

        def do_POST(self) -> None:  # noqa: N802
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            unknown = sorted(body.keys() - FIELDS)
            if self.path != "/v1/chat/completions" or unknown:
                error(404, f"nothing here: {self.path} {unknown}")(self)
                return
            with state.one_more():
                given = state.take(body, self.headers.get("authorization", ""))
                if state.gate is not None:
                    state.gate.wait(60)
                try:
                    given(self)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    return Chat
