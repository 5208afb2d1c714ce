"""Generation by a server that speaks OpenAI's chat completions: vLLM's, another engine's, or a service's.

The server has the model, its tokenizer and its chat template; it is sent conversations and gives text. The `openai`
package sends them, and sends again what was refused for now (429, 5xx), timed out or broke off. What is here: the
fields of a request, how many are under way at once, and whose fault it is when one fails.

Every sampling setting is sent, so that those a server takes from the model's generation_config.json do not matter.
`top_k`, `min_p`, `repetition_penalty` and `stop_token_ids` are vLLM's own fields: OpenAI's servers refuse them.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from expo.engines import Failure, GeneratorSetup, Key, Outcome, Request, TextCompletion
from expo.engines.event_loop import results
from expo.errors import EnvironmentFailure, ExpoError, InputError, MissingExtra, first_line
from expo.files import shown
from expo.redact import without_secrets

MAX_RETRIES = 10
"""Further tries of one request. The waits between them double from 0.5 s to 8 s, a minute in all; where the server
says Retry-After, that long (up to two minutes each)."""
TIMEOUT_S = 600.0
"""The longest wait for one answer."""
FIRST_TIMEOUT_S = 30.0
FIRST_RETRIES = 1
"""Of the question whether anything answers at the URL: a wrong one is told at once."""
NO_KEY = "none"
"""Sent where there is no OPENAI_API_KEY; a server of one's own wants none."""

ROW_AT_FAULT = (400, 413, 422)
"""Statuses by which a server refuses one row: its prompt is too long, say."""
RUN_AT_FAULT = {
    401: "does not take the key in OPENAI_API_KEY",
    403: "does not give access with the key in OPENAI_API_KEY",
    404: "does not know the model, or is no chat completions API (does --base-url end in /v1?)",
    405: "is no chat completions API (does --base-url end in /v1?)",
}
"""Statuses that every row would get, and what they say of the server."""

VLLMS_OWN = "--top-k -1 leaves out the fields that are vLLM's own"
ADVICE = {
    "top_k": VLLMS_OWN,
    "min_p": VLLMS_OWN,
    "repetition_penalty": VLLMS_OWN,
    "stop_token_ids": "run without --stop-token-id",
    **{name: f"choose another --{name.replace('_', '-')}" for name in ("max_tokens", "top_p", "temperature", "seed")},
    "presence_penalty": "choose another --presence-penalty",
    "frequency_penalty": "choose another --frequency-penalty",
    "model": "choose another --model",
}
"""Fields that are the same in every row, and what to do where the server refuses one."""

MAX_SAID_CHARACTERS = 300


class OpenaiGenerator:
    """See `expo.engines.Generator`.

    Args:
        setup: What to ask; of the model only `config.model` is used.

    Raises:
        MissingExtra: The `openai` package is not installed.
        InputError: The key cannot be sent.
        EnvironmentFailure: Nothing answers at the URL.
    """

    repeatable = False

    def __init__(self, setup: GeneratorSetup) -> None:
        if find_spec("openai") is None:
            raise MissingExtra("the openai engine needs the openai package: pip install 'llm-expo[openai]'")
        self._setup = setup
        self._url = str(setup.config.base_url).rstrip("/")
        self._client_settings = {"base_url": self._url, "api_key": api_key()}
        self._require_server()
        self.step_seconds = 0.0

    def _require_server(self) -> None:
        from openai import APIConnectionError, APIStatusError, OpenAI

        try:
            with (
                OpenAI(**self._client_settings, timeout=FIRST_TIMEOUT_S, max_retries=FIRST_RETRIES) as client,
                client.models.with_streaming_response.list(),
            ):
                return  # the list itself does not matter
        except APIStatusError:
            return  # it answers; not every server has a list, nor does every key open it
        except APIConnectionError as error:
            raise EnvironmentFailure(
                f"no server answers at {self._name}: {_cause(error)}; start it, or correct --base-url"
            ) from error

    @property
    def _name(self) -> str:
        return without_secrets(self._url)

    def generate(self, requests: Sequence[Request], done: set[Key]) -> Iterator[list[Outcome]]:
        """Yield rows as the server answers them."""
        todo = [request for request in requests if request.key not in done]
        with closing(results(partial(self._ask_all, todo))) as answered:
            asked = time.perf_counter()
            for outcomes in answered:
                self.step_seconds += time.perf_counter() - asked
                yield outcomes
                asked = time.perf_counter()

    async def _ask_all(self, todo: Sequence[Request], finished: Callable[[Outcome], None]) -> None:
        """Ask for every row, so many at once; the first error that is not one row's own ends all."""
        from asyncio import TaskGroup

        from openai import AsyncOpenAI

        waiting = iter(todo)

        async def worker(client: AsyncOpenAI) -> None:
            for request in waiting:
                finished(await self._ask(client, request))

        settings = {**self._client_settings, "timeout": TIMEOUT_S, "http_client": bounded_client(TIMEOUT_S)}
        async with AsyncOpenAI(**settings, max_retries=MAX_RETRIES) as client:
            try:
                async with TaskGroup() as workers:
                    for _ in range(min(self._setup.config.concurrency, len(todo))):
                        workers.create_task(worker(client))
            except ExceptionGroup as failed:
                raise failed.exceptions[0]  # noqa: B904 - the group says no more

    async def _ask(self, client: Any, request: Request) -> Outcome:  # noqa: ANN401 - openai.AsyncOpenAI
        from openai import APIConnectionError, APIStatusError

        try:
            answer = await client.chat.completions.with_raw_response.create(**self._fields(request))
        except UnicodeEncodeError:
            return Failure(request, "the prompt holds half of a surrogate pair, which UTF-8 cannot hold")
        except APIStatusError as error:
            return self._refused(request, error)
        except APIConnectionError as error:
            raise EnvironmentFailure(
                f"{self._name} did not answer in {1 + MAX_RETRIES} tries: {_cause(error)}; "
                "the same command goes on with the rest"
            ) from error
        return self._outcome(request, answer.http_response.content)

    def _fields(self, request: Request) -> dict[str, Any]:
        """The fields of a request.

        `max_tokens` and not its successor `max_completion_tokens`: a server that does not know the second would
        ignore it and answer without end.
        """
        config = self._setup.config
        vllms = {"top_k": config.top_k, "min_p": 0.0, "repetition_penalty": 1.0} if config.top_k != -1 else {}
        stop = {"stop_token_ids": list(self._setup.stop_ids)} if self._setup.stop_ids else {}
        return {
            "model": config.model,
            "messages": list(request.messages),
            "temperature": request.temperature,
            "top_p": config.top_p,
            "presence_penalty": config.presence_penalty,
            "frequency_penalty": config.frequency_penalty,
            "seed": request.seed,
            "max_tokens": request.max_tokens,
            "extra_body": {**vllms, **stop},
        }

    def _outcome(self, request: Request, content: bytes) -> Outcome:
        """What the body of an answer says.

        Raises:
            EnvironmentFailure: It is no chat completion.
        """
        answer = self._read(content)
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices:
            return Failure(request, f"the server gave no answer: {said(answer)}")
        choice = _object(choices[0])
        if choice.get("finish_reason") not in ("stop", "length"):
            return Failure(request, f"the server ended the answer with {shown(choice.get('finish_reason'))}")
        text = _object(choice.get("message")).get("content")
        if not isinstance(text, str):
            return Failure(request, "the server's answer holds no text")
        usage = _object(answer.get("usage"))
        length, prompt_tokens = usage.get("completion_tokens"), usage.get("prompt_tokens")
        if not isinstance(length, int) or not isinstance(prompt_tokens, int) or min(length, prompt_tokens) < 0:
            raise EnvironmentFailure(f"{self._name} does not say how many tokens an answer has (usage)")
        return TextCompletion(request, text, length, prompt_tokens, choice["finish_reason"])

    def _read(self, content: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise EnvironmentFailure(
                f"{self._name} gave no JSON object but {said(content.decode(errors='replace'))}; "
                "does --base-url end in /v1?"
            )
        return answer

    def _refused(self, request: Request, error: Any) -> Failure:  # noqa: ANN401 - openai.APIStatusError
        """The failed row, where the status is one row's own.

        Raises:
            ExpoError: It is not.
        """
        status = int(error.status_code)
        reason = f"{said(error.body)} (HTTP {status})"
        if status not in ROW_AT_FAULT:
            raise self._ended(status, reason) from error
        field = refused_field(error.body)
        if field is not None:
            raise InputError(f"{self._name} refuses {field}: {reason}; {ADVICE[field]}") from error
        return Failure(request, f"the server refuses it: {reason}")

    def _ended(self, status: int, reason: str) -> ExpoError:
        if status in RUN_AT_FAULT:
            return InputError(f"{self._name} {RUN_AT_FAULT[status]}: {reason}")
        return EnvironmentFailure(f"{self._name} cannot answer now: {reason}; the same command goes on with the rest")

    def load(self, setup: GeneratorSetup) -> None:
        """Go on with other settings."""
        self._setup = setup

    def close(self) -> None:
        """Nothing is held between two runs."""

    def versions(self) -> dict[str, str]:
        """The version of the openai package."""
        return {"openai": version("openai")}


def bounded_client(seconds: float) -> Any:  # noqa: ANN401 - openai.DefaultAsyncHttpxClient
    """An HTTP client that waits so long for a whole answer; by itself it waits so long for each piece of one."""
    from asyncio import timeout

    from openai import DefaultAsyncHttpxClient

    parent: Any = DefaultAsyncHttpxClient.__base__
    library: Any = import_module(parent.__module__.partition(".")[0])  # httpx; since openai 3 httpx2

    class Bounded(DefaultAsyncHttpxClient):  # type: ignore[misc]  # openai is not type-checked
        async def send(self, *args: Any, **named: Any) -> Any:  # noqa: ANN401 - as the parent's
            try:
                async with timeout(seconds):
                    return await super().send(*args, **named)
            except TimeoutError as error:
                raise library.ReadTimeout(f"no whole answer in {seconds:g} seconds") from error

    return Bounded()


def api_key() -> str:
    """The key from the environment, or a placeholder.

    Raises:
        InputError: It cannot be sent; the HTTP library's own error would show it.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise InputError("OPENAI_API_KEY contains invalid characters")
    return key or NO_KEY


def said(body: object) -> str:
    """What a server's body says is wrong, on one line and without secrets."""
    if isinstance(body, dict):
        error = body.get("error", body)
        found = error.get("message") or error.get("detail") or error if isinstance(error, dict) else error
        text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    else:
        text = str(body or "no reason is given")
    text = " ".join(without_secrets(text).split())
    return text if len(text) <= MAX_SAID_CHARACTERS else f"{text[:MAX_SAID_CHARACTERS]}…"


def refused_field(body: object) -> str | None:
    """The field a server refuses whatever the row; None where it is the row that it refuses."""
    text = said(body)
    if "context length" in text.lower():
        return None
    param = body.get("param") if isinstance(body, dict) else None
    by_name = (name for name in ADVICE if "_" in name and re.search(rf"\b{name}\b", text))
    return param if isinstance(param, str) and param in ADVICE else next(by_name, None)


def _object(value: object) -> dict[str, Any]:
    """A part of an answer that is an object; empty where it is none."""
    return value if isinstance(value, dict) else {}


def _cause(error: BaseException) -> str:
    return without_secrets(first_line(error.__cause__ or error))
