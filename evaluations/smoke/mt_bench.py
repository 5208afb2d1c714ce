"""MT-Bench from end to end without a network: FastChat itself, made questions and prompts, and a judge that counts.

FastChat's data are fetched from a server of this machine, as they are from its repository. The judge rates an answer
by its number of letters, so that each rating and each mean can be counted from the answers.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean
from typing import Any

from evaluations import mt_bench, results
from evaluations.smoke import judge_server
from evaluations.smoke.setting import check, models, without_network
from expo.files import json_lines, read_rows

ALPHA = 1.0
JUDGE = "a-judge/that-counts-letters"
FOLDER = JUDGE.replace("/", "--")
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
TORN = 5
"""So many judgments are taken away, and the last is torn, as by a kill."""


def run(output_dir: Path) -> int:
    """Run it, and check what comes out.

    Raises:
        CheckFailed: A score is not what the judge's rule says.
    """
    trio, folder = models(), output_dir / "smoke_mt_bench"
    shutil.rmtree(folder, ignore_errors=True)
    write_data(folder / "served")
    with serve_files(folder / "served") as data, judge_server.serve(mt_bench.PAPER) as judge, without_network():
        pair = ["--sft", str(trio / "tiny-sft"), "--dpo", str(trio / "tiny-dpo"), "--alpha", str(ALPHA)]
        flags = ["--generate-args", "--engine transformers --dtype float32 --max-tokens 48"]
        to = ["--judge", JUDGE, "--base-url", judge.address, "--data", data, "--output-dir", str(folder)]
        check("every answer of both turns was rated", mt_bench.main([*pair, *flags, *to]) == 0)
        names = ("tiny-dpo", f"tiny-dpo-ExPO-a{ALPHA}")
        there: list[str] = ["--answers", *(str(folder / "outputs_mtbench" / f"{name}.jsonl") for name in names)]
        texts = [check_scores(folder, name) for name in names]
        check("θ(α) answers otherwise than DPO", texts[0] != texts[1])
        tear(folder, names[0])
        before = judge.answered
        check("a run that was killed goes on", mt_bench.main([*to, *there]) == 0)
        asked = judge.answered - before
        check(
            f"it asks for the questions that lack a rating, and no others ({asked} requests)", asked == 2 * TORN, asked
        )
        check_scores(folder, names[0])
    return 0


def write_data(folder: Path) -> None:
    """Questions of two turns, one or two of each category, judge prompts, and reference answers."""
    from demo import task

    texts = task.prompts(4 * len(CATEGORIES), 5)
    questions: list[dict[str, Any]] = [
        {"question_id": 81 + row, "category": CATEGORIES[row % 8], "turns": texts[2 * row : 2 * row + 2]}
        for row in range(2 * len(CATEGORIES))
    ]
    needing = [row for row in questions if row["category"] in ("math", "reasoning", "coding")]
    references: list[dict[str, Any]] = [
        {"question_id": row["question_id"], "choices": [{"index": 0, "turns": ["42", "43"]}]} for row in needing
    ]
    rows: dict[str, list[dict[str, Any]]] = {
        mt_bench.PROMPTS: judge_prompts(),
        mt_bench.QUESTIONS: questions,
        mt_bench.REFERENCES: references,
    }
    for name, content in rows.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json_lines(content), encoding="utf-8")


def judge_prompts() -> list[dict[str, Any]]:
    """The four prompts that FastChat looks for where single answers are rated."""
    rate = "Rate the last answer, from [[1]] to [[10]]."
    one, two = (
        "{question}\n<answer>\n{answer}\n</answer>",
        ("{question_1}\n<answer>\n{answer_1}\n</answer>\n{question_2}\n<answer>\n{answer_2}\n</answer>"),
    )
    templates = {
        "single-v1": one,
        "single-math-v1": "A reference: {ref_answer_1}\n" + one,
        "single-v1-multi-turn": two,
        "single-math-v1-multi-turn": "References: {ref_answer_1}, {ref_answer_2}\n" + two,
    }
    about = {"type": "single", "system_prompt": rate, "output_format": "[[rating]]"}
    return [{"name": name, "prompt_template": text, **about} for name, text in templates.items()]


def check_scores(folder: Path, name: str) -> list[Sequence[str]]:
    """The record has the means that one counts, and FastChat's own table has the same; the answers."""
    record = results.read(folder / "results_mt_bench" / FOLDER / f"{name}.json")
    assert record is not None
    answers = [row["choices"][0]["turns"] for row in read_rows(folder / "outputs_mtbench" / f"{name}.jsonl")]
    counted = [[judge_server.rating(turn) for turn in turns] for turns in answers]
    first, second = (fmean(one[turn] for one in counted) for turn in (0, 1))
    wanted = {"first_turn": first, "second_turn": second, "average": (first + second) / 2}
    close = all(abs((record.scores[key] or 0.0) - value) < 1e-9 for key, value in wanted.items())
    check(f"{name}: {first:.3f} in the first turn, {second:.3f} in the second, as counted", close, record.scores)
    shown = (folder / "results_mt_bench" / FOLDER / name / "show_result.txt").read_text(encoding="utf-8")
    last = float(re.findall(rf"^{re.escape(name)}\s+([\d.]+)$", shown, re.MULTILINE)[-1])
    check(f"{name}: FastChat's table says {last}", abs(last - wanted["average"]) < 1e-4, wanted)
    judge = record.judge or {}
    known = (
        judge["model"] == JUDGE and judge["asked_as"] == mt_bench.PAPER and judge["served"] == f"made/{mt_bench.PAPER}"
    )
    check(f"{name}: the judge's true name is recorded, and the one it was asked under", known, judge)
    return answers


def tear(folder: Path, name: str) -> None:
    """Leave what a killed run leaves: no record, questions with no rating or with one of two, and a torn line."""
    place = folder / "results_mt_bench" / FOLDER
    (place / f"{name}.json").unlink()
    (judgments,) = (place / name).glob(f"*/data/mt_bench/model_judgment/{mt_bench.PAPER}_single.jsonl")
    rows = {line: json.loads(line) for line in judgments.read_text(encoding="utf-8").splitlines()}
    last = 81 + TORN - 1
    kept = [
        line
        for line, row in rows.items()
        if row["question_id"] > last or (row["question_id"], row["turn"]) == (last, 1)
    ]
    judgments.write_text("\n".join([*kept, next(iter(rows))[:40]]), encoding="utf-8")


@contextmanager
def serve_files(folder: Path) -> Iterator[str]:
    """A folder's files over HTTP; the address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
