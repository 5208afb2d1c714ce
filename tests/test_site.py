"""The documentation site: it builds without a warning, its links lead somewhere, its search finds what one wants."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import pytest

from expo.cli import program
from expo.config import COMMANDS
from expo.settings import settings_of, spelling

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md", *(f"docs/{page}" for page in PAGES)]

HOSTS = {"arxiv.org", "github.com", "huggingface.co"}
"""Where links may lead to; a further one is a decision."""
EXAMPLES = {"localhost"}
"""Hosts of servers in commands."""

FINDS = {
    "LoRA": "guides/lora/",
    "cluster": "guides/cluster/",
    "serve": "guides/serving/",
    "sft": "#the-words-sft-dpo-alpha",
    "alpha": "guides/choosing_alpha/",
    "70B": "guides/large_models/",
    "resume": ("files/#rerun-resume-overwrite", "troubleshooting/#a-job-was-killed-how-to-resume"),
    "token": "troubleshooting/#tokens-gated-private-and-rejected-models",
    "install": "quickstart/#install",
    "exit code": "reference/#exit-codes",
}
"""What a newcomer types, and what comes first: a place, or one of several."""


# --- pages as they are written ------------------------------------------------------------------------------------


def prose(document: str) -> str:
    """A document without code, in which nothing is a link."""
    text = re.sub(
        r"^(`{3,}).*?^\1`*$", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    return re.sub(r"`[^`\n]*`", lambda code: re.sub(r"[\[\]()<>]", "", code[0]), text)


def links(document: str) -> list[str]:
    """The targets of its links and pictures."""
    text = prose(document)
    return [*re.findall(r"\]\(([^()\s]+)\)", text), *re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)]


def headings(document: str) -> list[str]:
    return [line.strip("# ").replace("\\", "") for line in re.findall(r"^#+ .*", prose(document), re.MULTILINE)]


def anchor(heading: str) -> str:
    """As GitHub names a heading, and the site."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_its_links_lead_somewhere(document: str) -> None:
    wrong = []
    for link in links(document):
        if urlsplit(link).scheme or link.startswith("//"):
            wrong += [] if is_well_formed(link) else [link]
            continue
        place, _, name = unquote(link).partition("#")
        target = ((ROOT / document).parent / place).resolve() if place else ROOT / document
        ends_well = target.exists() and target.is_relative_to(ROOT)
        if ends_well and name and name not in ("only-light", "only-dark"):
            ends_well = name in map(anchor, headings(target.relative_to(ROOT).as_posix()))
        wrong += [] if ends_well else [link]
    assert wrong == []


def is_well_formed(link: str) -> bool:
    """Whether it is https, to a host that links may lead to, and nothing else is in it than an address has."""
    parts = urlsplit(link)
    plain = link.isascii() and link.isprintable() and not re.search(r"[\s<>\"\\^`{|}]", link)
    return plain and parts.scheme == "https" and parts.netloc in HOSTS and not parts.netloc.startswith("www.")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_addresses_in_text_and_code_are_known(document: str) -> None:
    addresses = re.findall(r"(https?)://([\w.-]+)", (ROOT / document).read_text(encoding="utf-8"))
    assert {host for scheme, host in addresses if scheme == "https"} <= HOSTS
    assert {host for scheme, host in addresses if scheme == "http"} <= EXAMPLES


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_one_title_and_each_heading_once(page: str) -> None:
    text = prose(f"docs/{page}")
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1
    found = headings(f"docs/{page}")
    assert len(set(map(anchor, found))) == len(found)


def test_no_two_pages_have_one_title() -> None:
    titles = [headings(f"docs/{page}")[0] for page in PAGES]
    assert len(set(titles)) == len(titles)


def test_messages_that_are_quoted_are_the_programs() -> None:
    """What stands in quotes in headings and in bold; `…` is what the program fills in."""
    text = prose("docs/troubleshooting.md")
    quoted = [*re.findall(r"^## \"(.+)\"$", text, re.MULTILINE), *re.findall(r"\*\*\"(.+?)\"\*\*", text)]
    pieces = [piece.strip(" ,:") for one in quoted for piece in one.split("…")]
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "expo").rglob("*.py")))
    sources = re.sub(r"\"\s*\n\s*f?\"", "", sources).replace("{name}", "vllm")
    assert len(quoted) >= 8
    assert [piece for piece in pieces if piece not in sources] == []


def test_every_page_is_in_the_navigation() -> None:
    def targets(entries: list[Any]) -> Iterator[str]:
        for entry in entries:
            for value in entry.values():
                yield from targets(value) if isinstance(value, list) else [value]

    config = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))
    assert sorted(targets(config["project"]["nav"])) == PAGES


def test_pictures_are_small_and_described() -> None:
    for document in DOCUMENTS:
        assert re.findall(r"!\[\]\(|<img(?![^>]*\balt=\"[^\"])", prose(document)) == []
    assert all(path.stat().st_size < 150_000 for path in DOCS.rglob("*.png"))


# --- the command reference ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "tools" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_program_says(maker: ModuleType) -> None:
    assert maker.stale(maker.pages()) == []


def test_the_check_names_what_is_stale(maker: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = tmp_path / "reference"
    shutil.copytree(maker.FOLDER, folder)
    monkeypatch.setattr(maker, "FOLDER", folder)
    monkeypatch.setattr(sys, "argv", ["make_reference.py", "--check"])
    assert maker.main() == 0
    (folder / "sweep.md").write_text("# expo sweep\n")
    (folder / "old.md").write_text("# expo old\n")
    (folder / "score.md").unlink()
    capsys.readouterr()
    assert maker.main() == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        f"docs/reference/{name}.md" for name in ("old", "score", "sweep")
    ]
    assert (folder / "sweep.md").read_text() == "# expo sweep\n", "a check writes nothing"
    monkeypatch.setattr(sys, "argv", ["make_reference.py"])
    (folder / "old.md").unlink()
    assert maker.main() == 0
    assert (folder / "score.md").read_bytes() == (DOCS / "reference" / "score.md").read_bytes()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_of_a_command_is_there(command: str) -> None:
    text = (DOCS / "reference" / f"{command}.md").read_text(encoding="utf-8")
    rows = [
        re.split(r"[`, ]+", line.split("|")[1].replace("…", "").strip("` "))
        for line in re.findall(r"^\| `.*", text, re.M)
    ]
    words = {word for row in rows for word in row}
    lacking = [name for name in settings_of(COMMANDS[command]) if spelling(COMMANDS[command], name) not in words]
    assert lacking == []
    assert {"--json", "--config", "--debug"} <= words
    for setting in settings_of(COMMANDS[command]).values():
        said = re.sub(r"\s*\[[^\[\]]*(\[[^\[\]]*\])?[^\[\]]*\]$", "", setting.help)
        assert plain(said) in plain(text)


def plain(text: str) -> str:
    """What is read, without what Markdown needs."""
    return re.sub(r"\s+", " ", re.sub(r"[\\`]", "", text).replace("&lt;", "<").replace("&amp;", "&"))


def test_every_command_is_there() -> None:
    names = {one.name for one in program.app.registered_commands if not one.hidden}
    assert {path.stem for path in (DOCS / "reference").glob("*.md")} == {"index", *names}


# --- the built site -----------------------------------------------------------------------------------------------

needs_builder = pytest.mark.skipif(
    importlib.util.find_spec("zensical") is None, reason="zensical is not installed; tests/run.sh installs it"
)


@dataclass
class Html(HTMLParser):
    """What a built page has: names that links may end at, links, and what a browser fetches to show it."""

    text: str
    names: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = {name: value or "" for name, value in attrs}
        self.names |= {of["id"]} if "id" in of else set()
        self.links += [of["href"]] if tag == "a" and "href" in of else []
        self.fetched += [of[name] for name in ("src", "poster", "data") if name in of]
        self.fetched += [one.split()[0] for one in of.get("srcset", "").split(",") if one.strip()]
        self.fetched += [of["href"]] if tag == "link" and of.get("rel") not in ("canonical", "next", "prev") else []


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built in strict mode, in which a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "zensical.toml", folder)
    shutil.copytree(DOCS, folder / "docs")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stdout + done.stderr
    return folder / "site"


@needs_builder
def test_links_of_the_built_site_lead_somewhere_and_nothing_is_fetched_from_elsewhere(built: Path) -> None:
    pages = {path: Html(path.read_text(encoding="utf-8")) for path in built.rglob("*.html")}
    assert len(pages) == len(PAGES) + 1, "and the page of an address that does not exist"
    wrong = []
    for path, page in pages.items():
        here = f"https://here/{path.relative_to(built).as_posix()}"
        for link in {*page.links, *page.fetched}:
            to = urlsplit(urljoin(here, link))
            if to.netloc != "here":
                wrong += [(path.name, link)] if link in page.fetched or not is_well_formed(link) else []
                continue
            target = built / unquote(to.path).lstrip("/")
            target = target / "index.html" if target.is_dir() else target
            there = target.is_file() and (not to.fragment or target.suffix != ".html" or path.name == "404.html")
            if target in pages and to.fragment:
                there = unquote(to.fragment) in pages[target].names or "only-" in to.fragment
            wrong += [] if there else [(path.relative_to(built).as_posix(), link)]
    assert wrong == []
    styles = "".join(path.read_text(encoding="utf-8") for path in built.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"']*", styles) == []


@needs_builder
@pytest.mark.xdist_group("browser")
def test_the_search_finds_what_one_wants_and_asks_no_other_host(built: Path, browser: Any) -> None:
    with served(built) as address:
        page = browser.new_page()
        page.set_default_timeout(20_000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.add_init_script(LISTENS)
        page.goto(address)
        page.wait_for_selector("input[role=combobox]", state="attached")
        page.locator(".md-search__button").click()
        found = {query: first_hit(page, query).removeprefix(address) for query in FINDS}
        for place in ("guides/cluster/", "reference/sweep/"):
            page.goto(address + place)
        page.close()
    wanted = {query: (place,) if isinstance(place, str) else place for query, place in FINDS.items()}
    assert {query: hit for query, hit in found.items() if hit not in wanted[query]} == {}
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


LISTENS = """
    window.Worker = class extends Worker {
        constructor(...words) {
            super(...words);
            window.asked = window.answered = 0;
            this.addEventListener("message", ({data}) => { window.answered += data.type === 3; });
        }
        postMessage(message, ...rest) {
            if (message.type === 2) { window.asked += 1; window.query = message.data.input; }
            super.postMessage(message, ...rest);
        }
    };
"""
"""Counts what the page asks the process that searches, and what that answers."""


def first_hit(page: Any, query: str) -> str:
    """Put a query into the search, and take the first hit when it is answered and shown."""
    page.locator("input[role=combobox]").fill(query)
    page.wait_for_function("query => window.query === query && window.answered === window.asked", arg=query)
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return re.sub(r"\?h=[^#]*", "", unquote(page.locator("a[role=option]").first.evaluate("one => one.href")))


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder's files on this machine."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Logs nothing."""

    def log_message(self, *_: object) -> None:
        pass
