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

import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from expo.checkpoint.network import advice, require_usable, through, without_unusable_proxies
from expo.engines import Failure, GeneratorSetup, Key, Outcome, Request
from expo.engines.chat_replies import (
    ADVICE,
    LENGTH_FIELDS,
    has_no_quota,
    is_too_long,
    is_unknown,
    leaves_no_room,
    outcome_of,
    read_reply,
    reason_in,
    rejected_field,
    wants_stream,
)
from expo.engines.event_loop import results
from expo.errors import EnvironmentFailure, ExpoError, InputError, MissingExtra, first_line
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
    404: "does not know the model, or is not a chat completions API (does --base-url end in /v1?)",
    405: "is not a chat completions API (does --base-url end in /v1?)",
}
"""Statuses that every row would get, and what they say about the server."""
UNPAID, FORBIDDEN, BUSY = 402, 403, 429
"""403 is what a key without access gets, and a prompt that a service moderates. As after any other failure that lasts,
the server is asked for something else: if it answers, the row is at fault."""

GREETING = ({"role": "user", "content": "Hi"},)
CHECK_TIMEOUT_S = 60.0
MAX_FAILED_FIRST = 3
"""How many rows may fail so before one is answered."""


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
        self._has_answered = False
        self._answered_at = -math.inf
        self._failed = 0
        self._unknown: set[str] = set()
        self._stream = False
        require_usable(self._url)
        self._require_server()
        self.step_seconds = 0.0

    def _require_server(self) -> None:
        from openai import APIConnectionError, APIStatusError, OpenAI

        with without_unusable_proxies():
            asking = OpenAI(**self._client_settings, timeout=PROBE_TIMEOUT_S, max_retries=PROBE_RETRIES)
        try:
            with asking as client, client.models.with_streaming_response.list():
                return  # the list of models itself does not matter
        except APIStatusError:
            return  # a server answers; not every one has a list of models, and not every key may read it
        except APIConnectionError as error:
            cause = _cause(error)
            raise EnvironmentFailure(
                f"no server answers at {self._name}{through(self._url)}: {cause}; {advice(self._url, cause)}"
            ) from error

    @property
    def _name(self) -> str:
        return without_secrets(self._url)

    def generate(self, requests: Sequence[Request], done: set[Key]) -> Iterator[list[Outcome]]:
        """Yield rows as the server answers them."""
        todo = [request for request in requests if request.key not in done]
        self._has_answered |= len(todo) < len(requests)
        with closing(results(partial(self._complete_all, todo))) as batches:
            started = time.perf_counter()
            for outcomes in batches:
                self.step_seconds += time.perf_counter() - started
                yield outcomes
                started = time.perf_counter()

    async def _complete_all(self, todo: Sequence[Request], finished: Callable[[Outcome], None]) -> None:
        """Request every row, `concurrency` at a time; the first error that is not a row's own cancels the others."""
        from asyncio import Lock, TaskGroup

        from openai import AsyncOpenAI

        waiting = iter(todo)
        self._checking = Lock()

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
        """A row's outcome.

        Raises:
            ExpoError: No row is answered any more.
        """
        from openai import APIConnectionError, APIStatusError

        fields = self._fields(request)
        try:
            answer = await client.chat.completions.with_raw_response.create(**fields)
        except UnicodeEncodeError:
            reason = "the prompt contains half of a surrogate pair, which UTF-8 cannot encode"
            return Failure(request, reason, lasting=True)
        except APIStatusError as error:
            if self._adapts(fields, error):
                return await self._complete(client, request)
            if error.status_code in ROW_STATUSES:
                return self._rejected(request, error)
            of_all = error.status_code in (*RUN_STATUSES, UNPAID) or has_no_quota(error.body)
            if of_all or not await self._answers_others(client, request):
                raise self._run_error(error) from error
            reason = f"the server refuses it: {_reason(error)}"
            return Failure(request, reason, lasting=error.status_code == FORBIDDEN)
        except APIConnectionError as error:
            failure = f"did not answer in {1 + MAX_RETRIES} tries: {_cause(error)}"
            if not await self._answers_others(client, request):
                raise EnvironmentFailure(
                    f"{self._name}{through(self._url)} {failure}; rerun the same command to continue"
                ) from error
            return Failure(request, f"the server {failure}")
        self._has_answered, self._answered_at = True, time.monotonic()
        return self._outcome(request, answer.http_response)

    async def _answers_others(self, client: Any, request: Request) -> bool:  # noqa: ANN401 - openai.AsyncOpenAI
        """Whether the server answers others than a row that has just failed; it is asked for a token to `GREETING`."""
        from openai import APIConnectionError, APIStatusError

        failed_at = time.monotonic()
        async with self._checking:
            self._failed += 1
            if not self._has_answered and self._failed > MAX_FAILED_FIRST:
                return False
            if self._answered_at > failed_at:
                return True
            asking = client.with_options(max_retries=PROBE_RETRIES, timeout=CHECK_TIMEOUT_S)
            try:
                fields = self._fields(replace(request, messages=GREETING, max_tokens=1))
                await asking.chat.completions.with_raw_response.create(**fields)
            except APIStatusError as error:
                if error.status_code not in ROW_STATUSES:
                    return False
            except APIConnectionError:
                return False
            self._answered_at = time.monotonic()
        return True

    def _adapts(self, fields: dict[str, Any], error: Any) -> bool:  # noqa: ANN401 - openai.APIStatusError
        """Whether the server wants a request in another form, which all later ones then have."""
        if error.status_code not in ROW_STATUSES:
            return False
        name = next(name for name in LENGTH_FIELDS if name in fields)
        if is_unknown(name, error.body):
            self._unknown.add(name)
            return self._unknown != set(LENGTH_FIELDS)
        if wants_stream(error.body) and "stream" not in fields["extra_body"]:
            self._stream = True
            return True
        return False

    def _fields(self, request: Request) -> dict[str, Any]:
        """The fields of a request."""
        config = self._setup.config
        length = next((name for name in LENGTH_FIELDS if name not in self._unknown), LENGTH_FIELDS[-1])
        penalties = {name: getattr(config, name) for name in ("presence_penalty", "frequency_penalty")}
        vllm_fields = {"top_k": config.top_k, "min_p": 0.0, "repetition_penalty": 1.0} if config.top_k != -1 else {}
        stop = {"stop_token_ids": list(self._setup.stop_ids)} if self._setup.stop_ids else {}
        return {
            "model": config.model,
            "messages": list(request.messages),
            "temperature": request.temperature,
            "top_p": config.top_p,
            **{name: penalty for name, penalty in penalties.items() if penalty},  # no server has another default than 0
            "seed": request.seed,
            length: request.max_tokens,
            "extra_body": {**vllm_fields, **stop, **({"stream": True} if self._stream else {})},
        }

    def _outcome(self, request: Request, response: Any) -> Outcome:  # noqa: ANN401 - httpx.Response
        """The completion in a response, or why there is none.

        Raises:
            EnvironmentFailure: It is not a chat completion.
        """
        try:
            answer = read_reply(response.content, response.charset_encoding)
        except UnicodeDecodeError as error:
            where = f"byte 0x{error.object[error.start]:02x} at {error.start}"
            return Failure(request, f"the server's answer is not {error.encoding.upper()} text ({where})", lasting=True)
        except (ValueError, RecursionError) as error:
            raise EnvironmentFailure(
                f"{self._name} did not return a JSON object but "
                f"{reason_in(response.content.decode(errors='replace'))}; does --base-url end in /v1?"
            ) from error
        return outcome_of(request, answer)

    def _rejected(self, request: Request, error: Any) -> Failure:  # noqa: ANN401 - openai.APIStatusError
        """The failed row, where the server rejects only this one.

        Raises:
            InputError: It rejects a field that is the same in all rows, and has answered none of them.
        """
        field = rejected_field(error.body)
        if field is not None and self._answered_at == -math.inf:
            raise InputError(f"{self._name} rejects {field}: {_reason(error)}; {ADVICE[field]}") from error
        shorter = is_too_long(error.body) and leaves_no_room(error.body)
        advised = "; a smaller --max-tokens leaves the prompt more room" if shorter else ""
        return Failure(request, f"the server rejects it: {_reason(error)}{advised}", lasting=True)

    def _run_error(self, error: Any) -> ExpoError:  # noqa: ANN401 - openai.APIStatusError
        """The error of a run in which no row is answered any more."""
        status, reason = error.status_code, _reason(error)
        if status == FORBIDDEN:
            return InputError(
                f"{self._name}{through(self._url)} denies access with the key in OPENAI_API_KEY: {reason}"
            )
        if status in RUN_STATUSES:
            return InputError(f"{self._name} {RUN_STATUSES[status]}: {reason}")
        if has_no_quota(error.body):
            return EnvironmentFailure(
                f"{self._name} has no quota left for the key in OPENAI_API_KEY: {reason}; add credit, then rerun the "
                "same command to continue"
            )
        return EnvironmentFailure(
            f"{self._name}{through(self._url)} cannot answer now: {reason}; rerun the same command to continue"
        )

    def load(self, setup: GeneratorSetup) -> None:
        """Go on with other settings."""
        if setup.config.model != self._setup.config.model:
            self._has_answered, self._failed, self._stream = False, 0, False
            self._unknown.clear()
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
                    response = await super().send(*args, **named)
            except TimeoutError as error:
                raise library.ReadTimeout(f"no complete answer in {seconds:g} seconds") from error
            if response.is_closed and response.status_code == BUSY and has_no_quota(response.text):
                response.headers["x-should-retry"] = "false"
            return response

    with without_unusable_proxies():
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


def _reason(error: Any) -> str:  # noqa: ANN401 - openai.APIStatusError
    """Why a request was refused, with its status."""
    wait = error.response.headers.get("retry-after")
    asked = f", retry after {first_line(ValueError(wait))}" if wait and error.status_code == BUSY else ""
    return f"{reason_in(error.body)} (HTTP {error.status_code}{asked})"


def _cause(error: BaseException) -> str:
    return without_secrets(first_line(error.__cause__ or error))
