"""Byte ranges of a file on the hub, each fetched over as many answers as it takes.

An answer counts only if it is the one that was asked for: status 206, these bytes of a file of this size, of this
commit, the same file as before, and as many bytes as were named. An answer that ends early is continued at the byte
reached. What cannot be seen is a wrong byte in a right answer: the hub has checksums of whole files, none of a part.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast
from urllib.parse import urlsplit

from expo.checkpoint.hub import explain, network_errors
from expo.errors import EnvironmentFailure, first_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MOST_TRIES = 6
"""Answers in a row that bring nothing, until the range is given up."""
FIRST_WAIT_S, MOST_WAIT_S = 1.0, 16.0
"""Between two such answers; the wait doubles."""
MOST_ASKED_WAIT_S = 300.0
"""The hub counts requests over five minutes."""
PROGRESS_BYTES = 1 << 16
"""With less, an answer has brought nothing."""

BUSY = (408, 429, 500, 502, 503, 504)
DENIED = (401, 403, 404)

ADVICE = "leave out --stream-sft to download the model instead"


class _Response(Protocol):
    """What is used of an answer, whichever HTTP library the hub's package has."""

    status_code: int
    reason_phrase: str
    headers: Mapping[str, str]
    url: object
    history: Sequence[_Response]

    def iter_raw(self) -> Iterator[bytes]:
        """The body as it comes."""


class _Interrupted(Exception):
    """No answer, or one that ended early; the same bytes may come later.

    Args:
        reason: What happened.
        wait_s: How long the server asked to be left alone; None if it did not.
    """

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class HubFile:
    """A file of one commit on the hub, read by ranges; used by several threads.

    Args:
        repository: The hub id.
        commit: The commit.
        name: The file's name in the repository.
        nbytes: Its size.
        digest: What the hub knows it by: the SHA-256 of a large file, the git id of another.
    """

    def __init__(self, repository: str, commit: str, name: str, nbytes: int, digest: str) -> None:
        self.repository, self.commit, self.name, self.nbytes, self.digest = repository, commit, name, nbytes, digest
        self._etag: str | None = None
        self._place: str | None = None
        """Where the hub's redirect led: asked there, the next range needs no redirect. Signed, so never shown."""
        self._places_last = True
        self._place_served = False

    def __str__(self) -> str:
        return f"{self.name} of {self.repository}"

    def fetch(
        self,
        start: int,
        buffer: memoryview,
        on_bytes: Callable[[int], object] = lambda _: None,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        """Fill `buffer` from byte `start` of the file.

        Args:
            start: The first byte.
            buffer: Where the bytes go.
            on_bytes: Called with the number of bytes that are there; what it raises ends the request.
            pause: Waits for some seconds.

        Raises:
            InputError: The hub denies access.
            EnvironmentFailure: The hub does not answer, or answers something else.
        """
        done = counted = tries = 0
        while done < len(buffer):
            try:
                for data in self._answer(start + done, start + len(buffer)):
                    buffer[done : done + len(data)] = data
                    done += len(data)
                    on_bytes(done)
                if done < len(buffer):
                    raise _Interrupted("the answer ended early")
            except _Interrupted as reason:
                tries, counted = (tries + 1, counted) if done - counted < PROGRESS_BYTES else (0, done)
                if tries == MOST_TRIES:
                    raise EnvironmentFailure(
                        f"reading {self} from the hub failed {tries} times in a row: {reason}; rerun the same command "
                        "to continue"
                    ) from reason
                if tries:
                    own = min(FIRST_WAIT_S * 2 ** (tries - 1), MOST_WAIT_S)
                    pause(own if reason.wait_s is None else min(reason.wait_s, MOST_ASKED_WAIT_S))

    def _answer(self, first: int, end: int) -> Iterator[bytes]:
        """The bytes of one answer, which may end early.

        Raises:
            _Interrupted: There is none, or it was cut off.
        """
        try:
            for place in dict.fromkeys((self._place, None)):
                with self._ask(place, first, end) as response:
                    if place and response.status_code != 206 and response.status_code not in BUSY:
                        self._forget_place()  # its signature has expired, or holds for another range
                        continue
                    self._require_right(response, place, first, end)
                    yield from self._body(response, end - first)
                    return
        except network_errors() as error:
            raise _Interrupted(first_line(error)) from error

    def _ask(self, place: str | None, first: int, end: int) -> AbstractContextManager[_Response]:
        from huggingface_hub import constants, get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public by its documentation

        headers = build_hf_headers(token=False if place else None)
        headers |= {"Range": f"bytes={first}-{end - 1}", "Accept-Encoding": "identity"}
        url = place or hf_hub_url(self.repository, self.name, revision=self.commit)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT  # of each read
        answer = get_session().stream("GET", url, headers=headers, timeout=timeout)
        return cast(AbstractContextManager[_Response], answer)

    def _body(self, response: _Response, nbytes: int) -> Iterator[bytes]:
        for data in response.iter_raw():
            nbytes -= len(data)
            if nbytes < 0:
                self._fail("more bytes than were asked for")
            yield data

    def _require_right(self, response: _Response, place: str | None, first: int, end: int) -> None:
        status, headers = response.status_code, response.headers
        if status in BUSY:
            reason = f"the server answered {status} {response.reason_phrase}"
            raise _Interrupted(reason, _asked_wait_s(headers.get("Retry-After")))
        if status == 200:
            self._fail("the whole file where a part was asked for")
        if status != 206:
            self._refuse(response)
        if problem := self._problem(headers, first, end) or self._change(response):
            self._fail(problem)
        if place:
            self._place_served = True
        elif self._places_last and response.history and _host(response.url) != _host(response.history[0].url):
            self._place = str(response.url)

    def _forget_place(self) -> None:
        self._places_last, self._place = self._place_served, None

    def _fail(self, what: str) -> NoReturn:
        raise EnvironmentFailure(f"reading {self} from the hub failed: the server sent {what}; {ADVICE}")

    def _refuse(self, response: _Response) -> NoReturn:
        from huggingface_hub import hf_raise_for_status

        status = response.status_code
        if status in DENIED and not response.history:
            try:
                hf_raise_for_status(cast(Any, response))
            except network_errors() as error:
                raise explain(error, self.repository, self.commit) from error
        raise EnvironmentFailure(
            f"reading {self} from the hub failed: the server answered {status} {response.reason_phrase}; {ADVICE}"
        )

    def _problem(self, headers: Mapping[str, str], first: int, end: int) -> str | None:
        """Why an answer is not the part that was asked for; None if it is."""
        said, length = headers.get("Content-Range", "no range"), headers.get("Content-Length")
        if "html" in headers.get("Content-Type", ""):
            return "a web page"
        if re.sub(r"\s+", " ", said.strip()) != f"bytes {first}-{end - 1}/{self.nbytes}":
            return f"{said[:60]!r} where bytes {first}-{end - 1}/{self.nbytes} were asked for"
        if length is not None and length != str(end - first):
            return f"{length[:20]} bytes where {end - first} were asked for"
        if headers.get("Content-Encoding", "identity") != "identity":
            return "compressed bytes"
        return None

    def _change(self, response: _Response) -> str | None:
        """Whether an answer is of another file than the one that was found at first."""
        for answer in (*response.history, response):
            commit, digest = (answer.headers.get(name) for name in ("X-Repo-Commit", "X-Linked-Etag"))
            if commit not in (None, self.commit) or _bare(digest) not in (None, self.digest):
                return "another file than the one it named at first"
        etag = _bare(response.headers.get("ETag"))
        if None not in (etag, self._etag) and etag != self._etag:
            return "a part of another file than before (its ETag differs)"
        self._etag = self._etag or etag
        return None


def _bare(etag: str | None) -> str | None:
    return None if etag is None else etag.removeprefix("W/").strip('"')


def _host(url: object) -> str:
    return urlsplit(str(url)).netloc


def _asked_wait_s(value: str | None) -> float | None:
    """The seconds that a Retry-After header asks for; None if there is none, or not a sensible one."""
    if value is None or value.strip().isdecimal():
        return float(value) if value else None
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
