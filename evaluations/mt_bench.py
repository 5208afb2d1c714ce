"""MT-Bench over expo's answers: FastChat's `llm_judge`, the real package, in an environment of its own.

The judge rates each of two turns of 80 questions from 1 to 10. FastChat takes a judge under eleven names only: another
one passes under one of these, by which its server has to know it, and its true name is recorded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from evaluations import judge as judges, pairs, results
from evaluations.judge import Judge
from evaluations.results import Column, Result
from evaluations.web import httpx
from expo.errors import EnvironmentFailure, InputError, MissingExtra
from expo.files import Row, hash_file, read_rows, write_atomic

PAPER = "gpt-4"
NAMES = (
    *("gpt-3.5-turbo", "gpt-3.5-turbo-0301", "gpt-3.5-turbo-0613", "gpt-3.5-turbo-1106", "gpt-3.5-turbo-0125"),
    *("gpt-4", "gpt-4-0314", "gpt-4-0613", "gpt-4-turbo", "gpt-4-1106-preview", "gpt-4-0125-preview"),
)
"""Under which FastChat 0.2.36 asks a judge."""
DATA = "https://raw.githubusercontent.com/lm-sys/FastChat/v0.2.36/fastchat/llm_judge/data"
PROMPTS, QUESTIONS, REFERENCES = (
    "judge_prompts.jsonl",
    "mt_bench/question.jsonl",
    "mt_bench/reference_answer/gpt-4.jsonl",
)
"""FastChat's data, which its package leaves out."""
PYTHON = Path(__file__).parents[1] / ".venv-fastchat" / "bin" / "python"
TURNS = (1, 2)
ANSWERS = "data/mt_bench/model_answer"
"""Where FastChat looks for answers."""
COLUMNS = (
    Column("first_turn", "turn 1", digits=2),
    Column("second_turn", "turn 2", digits=2),
    Column("average", "average", digits=2, published="mt_bench"),
)
Ratings = Mapping[tuple[object, int], float]
"""(question, turn) → rating."""
EXAMPLES = """examples:
  bash scripts/mt_bench.sh --smoke
  bash scripts/mt_bench.sh zephyr-7b-beta
  bash scripts/mt_bench.sh zephyr-7b-beta --judge meta-llama/Llama-3.3-70B-Instruct --base-url http://localhost:8000/v1
    (served with: vllm serve meta-llama/Llama-3.3-70B-Instruct --served-model-name gpt-4)
  bash scripts/mt_bench.sh --answers outputs_mtbench/mine.jsonl"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    about = "Answer MT-Bench's 80 questions with DPO and θ(α), and have FastChat's judge rate them."
    made = pairs.new_parser("mt_bench.sh", about, EXAMPLES)
    judges.add_judge_options(made, PAPER)
    made.add_argument(
        "--asked-as", choices=NAMES, metavar="NAME", help=f"the name it is asked under: {', '.join(NAMES)}"
    )
    made.add_argument("--answers", type=Path, nargs="+", metavar="FILE", help="judge these answers; none is generated")
    made.add_argument("--data", default=DATA, metavar="PLACE", help="folder or address of FastChat's llm_judge/data")
    made.add_argument("--parallel", type=pairs.positive, default=4, metavar="N", help="requests at a time (default: 4)")
    pairs.add_generate_args(made)
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Answer, judge, and print the table; the exit code."""
    given = parser().parse_args(words)
    if given.smoke:
        from evaluations.smoke import mt_bench as smoke

        return smoke.run(given.output_dir)
    judge = judge_from(given)
    pair = None if given.answers else pairs.pair_of(given)
    data, fastchat = Path("DATA"), None
    if not given.dry_run:  # what is missing is better known before hours of answers
        data, fastchat = fetch_data(given.data, given.output_dir), FastChat(fastchat_python())
        if pair is not None and judge.address == judges.OPENAI:
            judges.look_up(judge)
    files = given.answers if pair is None else pairs.answers(pair, "mtbench", given, dataset=data / QUESTIONS)
    if fastchat is None:
        for file in files:
            pairs.run(command(fastchat_python(), judge, file.stem, given.parallel), dry_run=True)
        return 0
    results.require_different(file.stem for file in files)
    found = [evaluate(file, data, fastchat, judge, given) for file in files]
    return pairs.show(found, COLUMNS, pair, as_json=given.json)


def judge_from(given: argparse.Namespace) -> Judge:
    """The judge, under its own name where FastChat takes that, and else under the paper's."""
    return judges.judge_of(given, asked_as=given.asked_as or (given.judge if given.judge in NAMES else PAPER))


class FastChat:
    """The environment that has FastChat.

    Args:
        python: Its interpreter.

    Raises:
        MissingExtra: It has none.
    """

    def __init__(self, python: Path) -> None:
        self.python = python
        asked = "from importlib.metadata import version as v; print(v('fschat'), v('openai'))"
        try:
            said = subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout.split()
        except (OSError, subprocess.CalledProcessError) as error:
            raise MissingExtra(f"no FastChat at {python}: `bash scripts/mt_bench.sh` installs it") from error
        self.versions = dict(zip(("fschat", "openai"), said, strict=True))


def fastchat_python() -> Path:
    """The interpreter of the environment that `EXPO_FASTCHAT_VENV` names, or of this checkout's."""
    venv = os.environ.get("EXPO_FASTCHAT_VENV")
    return Path(venv).absolute() / "bin" / "python" if venv else PYTHON


def fetch_data(place: str, output_dir: Path) -> Path:
    """The folder with FastChat's questions, judge prompts and reference answers; fetched once from an address.

    Raises:
        InputError: The folder lacks a file.
        EnvironmentFailure: The address cannot be read.
    """
    if "://" not in place:
        if lacking := [name for name in (PROMPTS, QUESTIONS, REFERENCES) if not (Path(place) / name).is_file()]:
            raise InputError(f"{place} has no {lacking[0]}: --data is llm_judge/data of FastChat's repository")
        return Path(place)
    folder = output_dir / "results_mt_bench" / ".data" / results.digest(place)
    for name in (PROMPTS, QUESTIONS, REFERENCES):
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / name, _fetched(f"{place.rstrip('/')}/{name}"))
    return folder


def _fetched(address: str) -> bytes:
    try:
        content: bytes = httpx.get(address, timeout=60, follow_redirects=True).raise_for_status().content
        for line in content.splitlines():
            json.loads(line)
        return content
    except (httpx.HTTPError, ValueError) as error:
        raise EnvironmentFailure(f"{address} cannot be read ({error}): pass --data FOLDER") from error


def evaluate(file: Path, data: Path, fastchat: FastChat, judge: Judge, given: argparse.Namespace) -> Result:
    """Have one file of answers rated, or take the result that is there.

    What a run left is kept: only questions without both ratings are asked again.
    """
    answers = read_rows(file)
    asked = questions_answered(file, answers, data)
    folder = judges.folder_of(given.output_dir, "mt_bench", judge) / results.file_name(file.stem)
    on = {
        "questions_sha256": hash_file(data / QUESTIONS),
        "judge_prompts_sha256": hash_file(data / PROMPTS),
        "references_sha256": hash_file(data / REFERENCES),
        "asked_as": judge.asked_as,
        "fschat": fastchat.versions["fschat"],
    }
    made_from = {"answers_sha256": hash_file(file), **on}

    def rated() -> Result:
        served = judges.look_up(judge)
        work = folder / results.digest([on, judge.model, served])
        rate(file, asked, data, fastchat, judge, work, given.parallel)
        ratings, last = read_ratings(judgments_of(work, judge))
        return Result(
            "MT-Bench",
            file.stem,
            scores_of(ratings),
            len(asked),
            made_from,
            judge.describe(served),
            {**fastchat.versions, **results.versions_of("llm-expo")},
            last,
            failed=2 * len(asked) - len(ratings),
            unanswered=pairs.unanswered(file),
        )

    return results.once(folder, made_from, rated)


def rate(
    file: Path, asked: Sequence[Row], data: Path, fastchat: FastChat, judge: Judge, work: Path, parallel: int
) -> None:
    """Have FastChat ask for what is not rated yet, below `work`, and show its table.

    Raises:
        InputError: The judge thinks aloud, of which FastChat would take the first rating.
    """
    environment = {name: value for name, value in judge.environment.items() if name != "PYTHONPATH"}
    judgments = judgments_of(work, judge)
    forget_others(judgments, work, file)
    ratings, _ = read_ratings(judgments)
    if unrated := [row for row in asked if not all((row["question_id"], turn) in ratings for turn in TURNS)]:
        lay_out(work, data, file, judge, unrated)
        words, log = command(fastchat.python, judge, file.stem, parallel), work / "log.txt"
        pairs.run(words, env=environment, cwd=work, typed=b"\n", log=log, chatter=rb"question: .*\n?")
        if "<think>" in judgments.read_text(encoding="utf-8"):
            raise InputError(
                f"{judge.model} thinks aloud, and FastChat takes the first rating that it finds there: serve it "
                f"without thinking, and delete {judgments}"
            )
        forget_others(judgments, work, file)  # a turn that was asked again counts once
    if read_ratings(judgments)[0]:
        show = [str(fastchat.python), "-m", "fastchat.llm_judge.show_result", "--judge-model", judge.asked_as]
        pairs.run(show, env=environment, cwd=work, log=work.with_name("show_result.txt"))


def judgments_of(work: Path, judge: Judge) -> Path:
    """FastChat's file of judgments."""
    return work / "data" / "mt_bench" / "model_judgment" / f"{judge.asked_as}_single.jsonl"


def questions_answered(file: Path, answers: Sequence[Row], data: Path) -> list[Row]:
    """The questions that a file answers, in the order of FastChat's.

    Raises:
        InputError: It answers others, or one of them not in two turns.
    """
    questions = {row["question_id"]: row for row in read_rows(data / QUESTIONS)}
    if unknown := [row.get("question_id") for row in answers if row.get("question_id") not in questions]:
        raise InputError(f"{file} answers question {unknown[0]}, which {data / QUESTIONS} does not have")
    turns = {row["question_id"]: row["choices"][0]["turns"] for row in answers}
    for name, given in turns.items():
        if len(given) != len(questions[name]["turns"]):
            raise InputError(f"{file} answers question {name} in {len(given)} turns; it has two")
    if not turns:
        raise InputError(f"{file} has no answers: give a file as `expo generate mtbench` writes it")
    return [row for name, row in questions.items() if name in turns]


def read_ratings(judgments: Path) -> tuple[Ratings, str]:
    """The ratings in FastChat's file, and when the last judgment was made."""
    rows = [row for _, row in judged_rows(judgments) if is_rating(row)]
    last = max((float(row.get("tstamp", 0)) for row in rows), default=0.0)
    ratings = {(row["question_id"], row["turn"]): float(row["score"]) for row in rows}
    return ratings, results.moment(last) if last else results.now()


def judged_rows(judgments: Path) -> Iterator[tuple[str, Row]]:
    """The lines of FastChat's file and what is in them; one that a kill tore is left out."""
    text = judgments.read_text(encoding="utf-8") if judgments.exists() else ""
    for line in text.split("\n"):  # and nowhere else: texts may hold other ends of lines
        with contextlib.suppress(ValueError):
            yield line, json.loads(line)


def is_rating(row: Row) -> bool:
    """Whether a judgment has a rating from 1 to 10."""
    return isinstance(row["score"], int | float) and 1 <= row["score"] <= 10


def forget_others(judgments: Path, work: Path, file: Path) -> None:
    """Leave only judgments that count in FastChat's file, which it adds to and averages as it is.

    A judgment counts, once a turn, if it has a rating, and is of an answer that is still the same: the answers as they
    were given to FastChat lie beside it.
    """
    if not judgments.exists():
        return
    then, now = (_turns(one) for one in (work / ANSWERS / f"{file.stem}.jsonl", file))
    kept = {
        (row["question_id"], row["turn"]): line
        for line, row in judged_rows(judgments)
        if is_rating(row) and row["question_id"] in now and then.get(row["question_id"]) == now[row["question_id"]]
    }
    write_atomic(judgments, "".join(f"{line}\n" for line in kept.values()))


def _turns(file: Path) -> dict[object, list[str]]:
    return {row["question_id"]: row["choices"][0]["turns"] for row in read_rows(file)}


def lay_out(work: Path, data: Path, file: Path, judge: Judge, questions: Sequence[Row]) -> None:
    """The files that FastChat looks for below its working folder, with the questions that are to be asked."""
    contents: dict[str, str | bytes] = {
        f"data/{PROMPTS}": (data / PROMPTS).read_bytes(),
        f"data/{QUESTIONS}": "".join(f"{json.dumps(row)}\n" for row in questions),
        f"data/mt_bench/reference_answer/{judge.asked_as}.jsonl": (data / REFERENCES).read_bytes(),
        f"{ANSWERS}/{file.stem}.jsonl": "".join(f"{json.dumps(row)}\n" for row in read_rows(file)),
    }
    for name, content in contents.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(work / name, content)


def command(python: Path, judge: Judge, name: str, parallel: int) -> list[str]:
    """FastChat's own command; it waits for a key to be pressed before it begins."""
    flags = ["--model-list", name, "--judge-model", judge.asked_as, "--mode", "single", "--parallel", str(parallel)]
    return [str(python), "-m", "fastchat.llm_judge.gen_judgment", *flags]


def scores_of(ratings: Ratings) -> dict[str, float | None]:
    """Means of the first turns, of the second turns, and of both, as FastChat's `show_result` takes them."""
    by_turn = {turn: [rating for (_, one), rating in ratings.items() if one == turn] for turn in TURNS}
    first, second = (fmean(by_turn[turn]) if by_turn[turn] else None for turn in TURNS)
    return {"first_turn": first, "second_turn": second, "average": fmean(ratings.values()) if ratings else None}


if __name__ == "__main__":
    sys.exit(pairs.script(main))
