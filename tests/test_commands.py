"""Every command that is printed anywhere is one that the program takes, and those marked `<!-- ci -->` are run.

`tools/run_documents.py --all` runs all of them, in `tools/full_check.sh`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools import run_documents
from tools.documents import check, pages, session, shortened, stand_ins
from tools.documents.pages import SHELL, Block, blocks, commands

PAGE = """# A page

<!-- ci -->
```sh
expo recipes     # all of them

words="a b"
expo compare A.json \\
    B.json
for alpha in 0.1 0.2; do
    expo extrapolate --alpha $alpha
done
```

A [link](x) and text.
```toml title="settings.toml"
[common]
```

1. In a list:

    ```python
    print("```")
    ```

```
output
```
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the files are that pages bring along."""
    for block in pages.printed():
        if block.title is not None:
            (tmp_path / block.title).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.title).write_text(block.text)
    return tmp_path


def test_blocks_are_found_with_their_lines_marks_and_titles() -> None:
    found = blocks("x.md", PAGE)
    assert [(one.language, one.line, one.in_ci, one.title) for one in found] == [
        ("sh", 5, True, None),
        ("toml", 17, False, "settings.toml"),
        ("python", 23, False, None),
        ("", 27, False, None),
    ]
    assert found[2].text == 'print("```")'


def test_a_command_is_what_the_shell_takes_as_one() -> None:
    found = commands(blocks("x.md", PAGE)[0])
    assert [(one.line, one.text.partition("\n")[0]) for one in found] == [
        (5, "expo recipes     # all of them"),
        (7, 'words="a b"'),
        (8, "expo compare A.json \\"),
        (10, "for alpha in 0.1 0.2; do"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("expo recipes   # all", [["expo", "recipes"]]),
        ("A=1 B='2 3' expo x && cd y", [["expo", "x"], ["cd", "y"]]),
        ("expo compare a b --markdown > table.md 2>&1", [["expo", "compare", "a", "b", "--markdown"]]),
        ("for a in 1 2; do expo x --alpha $a; done", [["expo", "x", "--alpha", "$a"]]),
        ("sbatch --wrap 'expo x'", [["sbatch", "--wrap", "expo x"], ["expo", "x"]]),
        ("ls  # a; b\nexpo x", [["ls"], ["expo", "x"]]),
        ("made=$(expo x)\nls \\\n  y", [["expo", "x"], ["ls", "y"]]),
        ("time python -m expo x &", [["python", "-m", "expo", "x"]]),
    ],
)  # fmt: skip
def test_words_of_a_line(text: str, words: list[list[str]]) -> None:
    assert list(check.words_of(text)) == words


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("expo recipes --show zephyr-7b-beta", None),
        ("expo --version && expo sweep --help", None),
        ("expo generate alpaca --model M --part slurm", None),
        ("sbatch --array=1,5 --wrap 'expo generate alpaca --model M --part slurm/8'", None),
        ("expo extrapolate --sft a --dpo b --alpha $alpha", None),
        ("expo extrapolate --sft a --dpo b --alpha 0.1 --verfiy", "No such option: --verfiy"),
        ("expo extrapolate --sft a --alpha 0.1", "--dpo is missing"),
        ("expo extrapolate --sft a --dpo b --alpha high", "valid number"),
        ("expo sweep --recipe zephyr-7b-gamma", "no recipe 'zephyr-7b-gamma'"),
        ("expo compare A.json --task", "requires an argument"),
        ("expo polish", "No such command 'polish'"),
        ("expo generate alpaca --model M --alpha 0.3", "--alpha"),
        ("sbatch --array=0-7 --wrap 'expo generate alpaca --modell M'", "No such option: --modell"),
        ("bash scripts/mt_bench.sh zephyr-7b-beta --jugde x", "unrecognized arguments: --jugde x"),
        ("bash scripts/mt_bench.sh zephyr-7b-beta --judge x", None),
        ("make all", "make is not a program that the harness knows"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(text: str, says: str | None, folder: Path) -> None:
    found = check.problem(text, folder)
    assert found is None if says is None else says in (found or "")


def test_the_program_takes_every_command_that_is_printed(folder: Path) -> None:
    lines = [command for block in pages.printed() if block.language == SHELL for command in commands(block)]
    assert len(lines) > 100
    assert [f"{one}\n  {wrong}" for one in lines if (wrong := check.problem(one.text, folder))] == []


def test_the_program_knows_what_is_mentioned_in_sentences() -> None:
    assert check.mentions("expo extrapolate --alpha-for") is None
    assert check.mentions("expo extrapolate --alpha-of") == "No such option: --alpha-of"
    lines = list(pages.mentioned())
    assert len(lines) > 50
    assert [f"{one}\n  {wrong}" for one in lines if (wrong := check.mentions(one.text))] == []


def test_the_languages_of_blocks_are_those_that_say_what_is_done_with_them() -> None:
    known = {"sh", "python", "text", "toml", "console", "json", "bibtex", "yaml", ""}
    assert [f"{one.page}:{one.line}: {one.language}" for one in pages.printed() if one.language not in known] == []


def test_words_are_added_where_the_table_says_so() -> None:
    places = {"judge": "http://x/v1", "data": "/data", "models": "/models"}

    def changed(text: str) -> str:
        return " + ".join(" ".join(words) for words in shortened.changed(text.split(), **places))

    assert changed("expo score alpaca --data-parallel=8") == "expo score alpaca --data-parallel=8 + --data-parallel 2"
    assert changed("expo score alpaca") == "expo score alpaca + "
    judged = "python -P -m evaluations.alpaca zephyr-7b-beta"
    assert changed(judged) == f"{judged} + --base-url http://x/v1"
    assert changed(f"{judged} --base-url y") == f"{judged} --base-url y + "
    assert changed("python benchmarks/sweep.py trio large").startswith("python benchmarks/sweep.py trio + --work ")


def test_what_a_page_names_is_there_and_nothing_else(tmp_path: Path) -> None:
    for name in ("sft", "dpo", "rm", "adapter"):
        (tmp_path / name).mkdir()
    trio = stand_ins.Trio(*(tmp_path / name for name in ("sft", "dpo", "rm", "adapter")))
    stand_ins.furnish(tmp_path / "page", "x.md", "expo compare rewards_alpaca/A.jsonl B.json --sft my-sft", trio)
    found = sorted(path.relative_to(tmp_path / "page").as_posix() for path in (tmp_path / "page").rglob("*.*"))
    assert found == ["B.json", "outputs_alpaca/A.json", "rewards_alpaca/A.jsonl"]
    assert (tmp_path / "page" / "my-sft").is_dir()


CI = run_documents.select([], in_ci=True)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory):
    """What pages share: a hub, a judge, the trained trio; vLLM is not there, so that nothing waits for its start."""
    with session.world(tmp_path_factory.mktemp("documents"), vllm=False) as made:
        yield made
        assert session.refused(made) == []


@pytest.mark.slow
@pytest.mark.xdist_group("documents")  # they share a world
@pytest.mark.parametrize("page", CI)
def test_marked_commands_run(page: str, shared: session.World) -> None:
    outcomes = list(session.run_page(shared, page, CI[page]))
    assert [f"{one.command}\n{one.output}" for one in outcomes if not one.passed] == []


@pytest.mark.slow
@pytest.mark.xdist_group("documents")
def test_a_page_that_fails_says_where_and_leaves_nothing(shared: session.World) -> None:
    text = "export GREETING=hello\nsleep 600 &\ncd demo\ntest $GREETING = hello && test -f run.sh\nfalse\n"
    page = [
        Block("made.md", 3, SHELL, text),
        Block("made.md", 9, "python", "x = 1"),
        Block("made.md", 12, "python", "\n1 / (x - 1)"),
    ]
    outcomes = list(session.run_page(shared, "made.md", page))
    failed = [one for one in outcomes if not one.passed]
    assert [(one.command.line, one.code) for one in failed] == [(7, 1), (12, 1)]
    assert 'File "made.md", line 13' in failed[1].output
    assert "ZeroDivisionError" in failed[1].output
    assert [one for one in session.processes_of(shared.folder) if one.name() == "sleep"] == []
    assert run_documents.table(outcomes).splitlines()[-1].startswith("7 commands, 2 failed, ")
