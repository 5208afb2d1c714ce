"""Who judges: a model behind an OpenAI-compatible address, the name it is asked under, and what its server says."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from evaluations.web import httpx
from expo.errors import EnvironmentFailure, InputError
from expo.files import name_problem

OPENAI = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Judge:
    """One judge."""

    model: str
    """What it truly is; results are filed under it."""
    asked_as: str
    """The name that its server is sent."""
    address: str
    """The server's base URL."""

    @property
    def folder(self) -> str:
        """The judge as the name of a folder."""
        return self.model.replace("/", "--")

    @property
    def environment(self) -> dict[str, str]:
        """This process' environment, with the address and a key where every version of the openai library looks."""
        key = os.environ.get("OPENAI_API_KEY") or "none"
        address = {"OPENAI_API_BASE": self.address, "OPENAI_BASE_URL": self.address, "OPENAI_API_KEY": key}
        return {**os.environ, **address}

    def describe(self, served: str | None) -> dict[str, str | None]:
        """The judge as a record has it; `served` is what `look_up` found."""
        return {**asdict(self), "served": served}


def add_judge_options(parser: argparse.ArgumentParser, paper: str) -> None:
    """The options that name a judge; `paper` is the default, the paper's."""
    parser.add_argument("--judge", metavar="MODEL", default=paper, help=f"who judges (default, the paper's: {paper})")
    parser.add_argument(
        "--base-url", metavar="URL", default=OPENAI, help=f"the judge's server, OpenAI-compatible (default: {OPENAI})"
    )


def judge_of(given: argparse.Namespace, *, asked_as: str | None = None) -> Judge:
    """The judge that the command line names.

    Args:
        given: The command line.
        asked_as: The name that it is sent, where it is another one.

    Raises:
        InputError: The address is none, or needs a key that is not there.
    """
    address = given.base_url.rstrip("/")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"--base-url {given.base_url!r} is no address: give one such as http://localhost:8000/v1")
    if parts.username or parts.password:
        raise InputError("--base-url holds a password, which results would show: put the key into OPENAI_API_KEY")
    if problem := name_problem(given.judge):
        raise InputError(
            f"--judge {given.judge!r} {problem}: give the judge's name, such as meta-llama/Llama-3.3-70B-Instruct"
        )
    if address == OPENAI and not os.environ.get("OPENAI_API_KEY") and not given.dry_run:
        raise InputError("the judge needs a key: set OPENAI_API_KEY, or name another server with --base-url")
    return Judge(given.judge, asked_as or given.judge, address)


def look_up(judge: Judge) -> str | None:
    """What the server says of the model it will be asked for; None where it keeps no list.

    vLLM's list says in `root` which checkpoint a name stands for.

    Raises:
        InputError: The server has models, and not that one, or does not take the key.
        EnvironmentFailure: It cannot be reached.
    """
    key = judge.environment["OPENAI_API_KEY"]
    try:
        reply = httpx.get(f"{judge.address}/models", headers={"authorization": f"Bearer {key}"}, timeout=30)
    except httpx.HTTPError as error:
        raise EnvironmentFailure(f"the judge's server {judge.address} cannot be reached: {error}") from error
    if reply.status_code in (401, 403):
        raise InputError(f"the judge's server {judge.address} does not take the key in OPENAI_API_KEY")
    try:
        models = {one["id"]: one for one in reply.json()["data"]}
    except (ValueError, KeyError, TypeError):
        return None
    if judge.asked_as not in models:
        known = ", ".join(sorted(models)[:8])
        raise InputError(f"{judge.address} serves no {judge.asked_as}: it serves {known}; see --judge")
    found = models[judge.asked_as].get("root") or models[judge.asked_as]["id"]
    return str(found)


def folder_of(output_dir: Path, benchmark: str, judge: Judge) -> Path:
    """Where a judge's results lie."""
    return output_dir / f"results_{benchmark}" / judge.folder
