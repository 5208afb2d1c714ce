"""Generation through a server's OpenAI-compatible chat completions API: vLLM's, another engine's, or a service's.

The server has the model, its tokenizer and its chat template: it receives conversations and returns text. The `openai`
package sends the requests and retries those that failed temporarily (429, 5xx), timed out or were cut off. Here are
the fields of a request, the concurrency, and whether a failure concerns one row or the whole run.

Every sampling setting is sent, so that a server's defaults from the model's generation_config.json do not matter.
`top_k`, `min_p`, `repetition_penalty` and `stop_token_ids` are vLLM's own fields: OpenAI's servers reject them.

The requests run on an event loop, since a thread that waits in the synchronous client cannot be cancelled. In a trial
(openai 3.54) with a pool of 32 daemon threads, signals ended the program as fast, but after the first error the other
requests stayed open and were retried for as long as the process lived. Nor was a response whose headers trickle in cut
off at `TIMEOUT_S`: the synchronous client's timeout is for each read.
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
"""Retries of one request. The waits between them double from 0.5 s to 8 s, a minute in all, unless the server sends
Retry-After (up to two minutes each)."""
TIMEOUT_S = 600.0
"""The longest wait for one whole answer."""
PROBE_TIMEOUT_S = 30.0
PROBE_RETRIES = 1
"""For the first request, which checks that a server is there: a wrong URL fails quickly."""
NO_KEY = "none"
"""Sent where OPENAI_API_KEY is not set; a local server needs no key."""

ROW_STATUSES = (400, 413, 422)
"""Statuses that reject one row, whose prompt is too long, for example."""
RUN_STATUSES = {
    401: "does not accept the key in OPENAI_API_KEY",
    403: "denies access with the key in OPENAI_API_KEY",
    404: "does not know the model, or is not a chat completions API (does --base-url end in /v1?)",
    405: "is not a chat completions API (does --base-url end in /v1?)",
}
"""Statuses that every row would get, and what they say about the server."""

OMIT_VLLM_FIELDS = "--top-k -1 omits the fields that only vLLM has"
ADVICE = {
    "top_k": OMIT_VLLM_FIELDS,
    "min_p": OMIT_VLLM_FIELDS,
    "repetition_penalty": OMIT_VLLM_FIELDS,
    "stop_token_ids": "run without --stop-token-id",
    **{name: f"choose another --{name.replace('_', '-')}" for name in ("max_tokens", "top_p", "temperature", "seed")},
    "presence_penalty": "choose another --presence-penalty",
    "frequency_penalty": "choose another --frequency-penalty",
    "model": "choose another --model",
}
"""Fields that are the same in every row, and what to do where the server rejects one."""

MAX_REASON_CHARACTERS = 300


class OpenaiGenerator:
    """See `expo.engines.Generator`.

    Args:
        setup: What to generate with; of the model, only the name `config.model` is used.

    Raises:
        MissingExtra: The `openai` package is not installed.
        InputError: The API key contains invalid characters.
        EnvironmentFailure: No server answers at the URL.
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
                OpenAI(**self._client_settings, timeout=PROBE_TIMEOUT_S, max_retries=PROBE_RETRIES) as client,
                client.models.with_streaming_response.list(),
            ):
                return  # the list of models itself does not matter
        except APIStatusError:
            return  # a server answers; not every one has a list of models, and not every key may read it
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
        with closing(results(partial(self._complete_all, todo))) as batches:
            started = time.perf_counter()
            for outcomes in batches:
                self.step_seconds += time.perf_counter() - started
                yield outcomes
                started = time.perf_counter()

    async def _complete_all(self, todo: Sequence[Request], finished: Callable[[Outcome], None]) -> None:
        """Request every row, `concurrency` at a time; the first error that is not a row's own cancels the others."""
        from asyncio import TaskGroup

        from openai import AsyncOpenAI

        waiting = iter(todo)

        async def worker(client: AsyncOpenAI) -> None:
            for request in waiting:
                finished(await self._complete(client, request))

        settings = {**self._client_settings, "timeout": TIMEOUT_S, "http_client": bounded_client(TIMEOUT_S)}
        async with AsyncOpenAI(**settings, max_retries=MAX_RETRIES) as client:
            try:
                async with TaskGroup() as workers:
                    for _ in range(min(self._setup.config.concurrency, len(todo))):
                        workers.create_task(worker(client))
            except ExceptionGroup as failed:
                raise failed.exceptions[0]  # noqa: B904 - the group adds nothing

    async def _complete(self, client: Any, request: Request) -> Outcome:  # noqa: ANN401 - openai.AsyncOpenAI
        from openai import APIConnectionError, APIStatusError

        try:
            answer = await client.chat.completions.with_raw_response.create(**self._fields(request))
        except UnicodeEncodeError:
            return Failure(request, "the prompt contains half of a surrogate pair, which UTF-8 cannot encode")
        except APIStatusError as error:
            return self._refused(request, error)
        except APIConnectionError as error:
            raise EnvironmentFailure(
                f"{self._name} did not answer in {1 + MAX_RETRIES} tries: {_cause(error)}; "
                "rerun the same command to continue"
            ) from error
        return self._outcome(request, answer.http_response.content)

    def _fields(self, request: Request) -> dict[str, Any]:
        """The fields of a request.

        `max_tokens`, not its successor `max_completion_tokens`: a server that does not know the latter would ignore
        it and generate without a limit.
        """
        config = self._setup.config
        vllm_fields = {"top_k": config.top_k, "min_p": 0.0, "repetition_penalty": 1.0} if config.top_k != -1 else {}
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
            "extra_body": {**vllm_fields, **stop},
        }

    def _outcome(self, request: Request, content: bytes) -> Outcome:
        """The completion in a response's body, or why there is none.

        Raises:
            EnvironmentFailure: It is not a chat completion.
        """
        answer = self._read(content)
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices:
            return Failure(request, f"the server gave no answer: {reason_in(answer)}")
        choice = _object(choices[0])
        if choice.get("finish_reason") not in ("stop", "length"):
            return Failure(request, f"the server ended the answer with {shown(choice.get('finish_reason'))}")
        text = _object(choice.get("message")).get("content")
        if not isinstance(text, str):
            return Failure(request, "the server's answer contains no text")
        usage = _object(answer.get("usage"))
        length, prompt_tokens = usage.get("completion_tokens"), usage.get("prompt_tokens")
        if not isinstance(length, int) or not isinstance(prompt_tokens, int) or min(length, prompt_tokens) < 0:
            raise EnvironmentFailure(f"{self._name} does not report how many tokens an answer has (usage)")
        return TextCompletion(request, text, length, prompt_tokens, choice["finish_reason"])

    def _read(self, content: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise EnvironmentFailure(
                f"{self._name} returned no JSON object but {reason_in(content.decode(errors='replace'))}; "
                "does --base-url end in /v1?"
            )
        return answer

    def _refused(self, request: Request, error: Any) -> Failure:  # noqa: ANN401 - openai.APIStatusError
        """The failed row, where the status concerns only this row.

        Raises:
            ExpoError: It concerns the whole run.
        """
        status = int(error.status_code)
        reason = f"{reason_in(error.body)} (HTTP {status})"
        if status not in ROW_STATUSES:
            raise self._run_error(status, reason) from error
        field = rejected_field(error.body)
        if field is not None:
            raise InputError(f"{self._name} rejects {field}: {reason}; {ADVICE[field]}") from error
        return Failure(request, f"the server rejects it: {reason}")

    def _run_error(self, status: int, reason: str) -> ExpoError:
        if status in RUN_STATUSES:
            return InputError(f"{self._name} {RUN_STATUSES[status]}: {reason}")
        return EnvironmentFailure(f"{self._name} cannot answer now: {reason}; rerun the same command to continue")

    def load(self, setup: GeneratorSetup) -> None:
        """Go on with other settings."""
        self._setup = setup

    def close(self) -> None:
        """Nothing is held between two runs."""

    def versions(self) -> dict[str, str]:
        """The version of the openai package."""
        return {"openai": version("openai")}


def bounded_client(seconds: float) -> Any:  # noqa: ANN401 - openai.DefaultAsyncHttpxClient
    """An HTTP client that limits the time for a whole response; the library's own timeout is for each read."""
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
        InputError: It contains characters that no header can hold; the HTTP library's own error would show the key.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise InputError("OPENAI_API_KEY contains invalid characters")
    return key or NO_KEY


def reason_in(body: object) -> str:
    """The error message in a response's body, on one line and without secrets."""
    if isinstance(body, dict):
        error = body.get("error", body)
        found = error.get("message") or error.get("detail") or error if isinstance(error, dict) else error
        text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    else:
        text = str(body or "no reason given")
    text = " ".join(without_secrets(text).split())
    return text if len(text) <= MAX_REASON_CHARACTERS else f"{text[:MAX_REASON_CHARACTERS]}…"


def rejected_field(body: object) -> str | None:
    """The field that the server rejects in every row; None where it rejects this row only."""
    text = reason_in(body)
    if "context length" in text.lower():
        return None
    param = body.get("param") if isinstance(body, dict) else None
    by_name = (name for name in ADVICE if "_" in name and re.search(rf"\b{name}\b", text))
    return param if isinstance(param, str) and param in ADVICE else next(by_name, None)


def _object(value: object) -> dict[str, Any]:
    """A JSON value that should be an object; empty where it is not."""
    return value if isinstance(value, dict) else {}


def _cause(error: BaseException) -> str:
    return without_secrets(first_line(error.__cause__ or error))
