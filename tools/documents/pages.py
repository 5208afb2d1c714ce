"""What is printed: pages with blocks of commands, settings and Python, and where else command lines stand.

In Markdown a fenced block of `sh` is commands, `python` is run by the page's interpreter, and a block with
`title="NAME"` is a file of that name. `<!-- ci -->` directly above a block has it run by the tests, too. Blocks of
other languages are output.

To have commands of another place found, add a function and a line to `PRINTED`.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"\s*<!--\s*ci\s*-->\s*")
FENCE = re.compile(r"(?P<indent>\s*)(?P<fence>`{3,}|~{3,})\s*(?P<language>[\w+-]*)(?P<attributes>[^`]*)")
TITLE = re.compile(r'title="([^"]+)"')
INLINE = re.compile(r"`(expo [^`]+)`")
SHELL, PYTHON = "sh", "python"


@dataclass(frozen=True)
class Block:
    """A fenced block, or lines of another place that are read as one."""

    page: str
    """The file, from the root of the repository."""
    line: int
    """Of its first line, from 1."""
    language: str
    text: str
    in_ci: bool = False
    title: str | None = None
    """The file that it is."""


@dataclass(frozen=True)
class Command:
    """A command of a block, which may go over several lines."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def blocks(page: str, text: str) -> list[Block]:
    """The fenced blocks of a Markdown page, in order; indented ones (of lists and tabs) too."""
    lines, found, above = iter(enumerate(text.splitlines(), 1)), [], ""
    for number, line in lines:
        if opened := FENCE.fullmatch(line):
            indent, last, inside = opened["indent"], number, []
            for last, within in lines:  # noqa: B007 - it counts beyond the loop
                if within.strip().startswith(opened["fence"]) and not within.strip().strip(opened["fence"][0]):
                    break
                inside.append(within.removeprefix(indent))
            title = TITLE.search(opened["attributes"])
            found.append(
                Block(
                    page,
                    last - len(inside),
                    opened["language"],
                    "\n".join(inside),
                    in_ci=MARK.fullmatch(above) is not None,
                    title=title[1] if title else None,
                )
            )
        above = line
    return found


def commands(block: Block) -> list[Command]:
    """A block's commands, as the shell takes them: continued lines, quotes and loops are one each."""
    found: list[Command] = []
    begun: list[str] = []
    for number, line in enumerate(block.text.splitlines(), block.line):
        if not begun and (not line.strip() or line.lstrip().startswith("#")):
            continue
        begun.append(line)
        if _is_whole("\n".join(begun)):
            found.append(Command(block.page, number - len(begun) + 1, "\n".join(begun)))
            begun = []
    if begun:  # the shell says what is wrong with it
        found.append(Command(block.page, block.line + len(block.text.splitlines()) - len(begun), "\n".join(begun)))
    return found


def _is_whole(text: str) -> bool:
    if text.endswith("\\"):
        return False
    if not re.search(r"""['"<({]|\b(for|while|if|case)\b""", text):
        return True
    return not subprocess.run(["bash", "-n", "-c", text], capture_output=True, check=False).stderr


# --- where commands are printed -----------------------------------------------------------------------------------


def markdown() -> Iterator[Block]:
    """README.md, CONTRIBUTING.md, the documentation (its reference is made of the helps), the figures' commands."""
    for path in [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), ROOT / "benchmarks" / "RESULTS.md"]:
        if not path.is_relative_to(ROOT / "docs" / "reference"):
            yield from blocks(_name(path), path.read_text(encoding="utf-8"))


def helps() -> Iterator[Block]:
    """The examples below the helps of `expo` and its commands."""
    from expo.cli import program, recipes as known

    texts = {str(module.__file__): str(module.EXAMPLES) for module in program.COMMANDS.values()}
    texts |= {str(program.__file__): str(program.app.info.epilog), str(known.__file__): known.EXAMPLES}
    for file, text in texts.items():
        for line in text.replace("\b", "").splitlines():
            if re.match(r"\s*(expo|sbatch) ", line):
                yield Block(_name(Path(file)), _line_of(file, line.strip()), SHELL, line.strip())


def evaluations() -> Iterator[Block]:
    """The examples below the helps of the evaluations' scripts."""
    for module in sorted((ROOT / "evaluations").glob("*.py")):
        text = module.read_text(encoding="utf-8")
        lines = re.findall(r"^ +((?:bash scripts|python -m evaluations)\S* .*?)(?:\"\"\")?$", text, re.MULTILINE)
        yield from (Block(_name(module), _line_of(module, line), SHELL, line) for line in lines)


def benchmarks() -> Iterator[Block]:
    """The examples in the docstrings of the benchmarks; a line with `…` or `[` is a synopsis."""
    for module in sorted((ROOT / "benchmarks").glob("*.py")):
        text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
        for line in re.findall(r"^    (python benchmarks/[^…\[\n]*)$", text, re.MULTILINE):
            yield Block(_name(module), _line_of(module, line), SHELL, line)


def script_headers() -> Iterator[Block]:
    """The examples in the comments at the top of scripts."""
    for script in sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("tools/*.sh"), *ROOT.glob("demo/*.sh")]):
        for number, line in enumerate(script.read_text(encoding="utf-8").splitlines(), 1):
            if not line.startswith("#"):
                break
            if example := re.match(r"#   ((?:\w+=\S+ )*(?:bash |expo |scripts/).*?)(?:  .*)?$", line):
                yield Block(_name(script), number, SHELL, example[1])


def recipes() -> Iterator[Block]:
    """The commands of `expo recipes --show`, with a number in the place of an α that is not published."""
    from expo import recipes as known
    from expo.cli.recipes import show_one

    for name in [*known.names(), *known.reward_model_names()]:
        text = "\n".join(show_one(known.load(name)).data["commands"])
        yield Block(f"expo recipes --show {name}", 1, SHELL, text.replace("--alpha A", "--alpha 0.3"))


PRINTED: tuple[Callable[[], Iterator[Block]], ...] = (markdown, helps, evaluations, benchmarks, script_headers, recipes)
"""Where whole commands are printed."""


@cache
def printed() -> tuple[Block, ...]:
    """All blocks that are printed anywhere."""
    return tuple(block for place in PRINTED for block in place())


def mentioned() -> Iterator[Command]:
    """Command lines within sentences: of Markdown, of docstrings, of help texts and messages. Some are cut short."""
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        text, fenced = page.read_text(encoding="utf-8"), False
        for number, line in enumerate(text.splitlines(), 1):
            fenced ^= bool(FENCE.fullmatch(line))
            if not fenced:
                yield from (Command(_name(page), number, one) for one in INLINE.findall(line))
    for folder in ("expo", "evaluations", "demo"):
        for module in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
                if (text := _text(node)) is not None:
                    yield from (Command(_name(module), node.lineno, one) for one in INLINE.findall(text))


def _text(node: ast.AST) -> str | None:
    """A text of a source; what is filled in when it is printed is `…`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return " ".join(node.value.split())
    if isinstance(node, ast.JoinedStr):
        parts = [str(one.value) if isinstance(one, ast.Constant) else "…" for one in node.values]
        return " ".join("".join(parts).split())
    return None


def _name(path: Path) -> str:
    return path.resolve().relative_to(ROOT).as_posix()


def _line_of(file: str | Path, text: str) -> int:
    """Where a text stands in a source, which may have it in pieces."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return next((number for number, line in enumerate(lines, 1) if text[:60] in line), 1)
