"""AlpacaEval 2.0 over expo's answers: `alpaca_eval evaluate`, the real package, with the paper's annotator.

The judge is asked which of two answers is better, the model's or that of GPT-4 Turbo; the win rate is the mean of the
probability that it gives the model's. Another judge gets the same question with the same settings.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from evaluations import judge as judges, pairs, results
from evaluations.judge import Judge
from evaluations.results import Column, Result
from expo.errors import EnvironmentFailure, InputError
from expo.files import Row, hash_file, json_text, read_rows, write_atomic

PAPER = "gpt-4-1106-preview"
ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
PROMPT = "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
REFERENCE = ("tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json")
NAMES = ["m", "M"]
"""What the judge is to answer: the reference's name, and the model's."""
ANSWERS, REFERENCE_COPY, CLIENT = "answers.json", "reference.json", "client.yaml"
UNJUDGED = -1
"""What AlpacaEval keeps where the judge gave no verdict."""
FEWEST = 10
"""So many answers have a length-controlled win rate: its regression needs some in each of five parts."""
CHATTER = rb"(INFO:|WARNING:root:Saving_path).*\n?"
"""What AlpacaEval logs with every request."""
COLUMNS = (
    Column("win_rate", "win rate", published="alpaca_eval_win_rate"),
    Column("standard_error", "± se"),
    Column("length_controlled_winrate", "length-controlled", published="alpaca_eval_length_controlled"),
    Column("avg_length", "characters", digits=0),
)
EXAMPLES = """examples:
  bash scripts/alpaca_eval.sh --smoke
  bash scripts/alpaca_eval.sh zephyr-7b-beta
  bash scripts/alpaca_eval.sh zephyr-7b-beta --judge meta-llama/Llama-3.3-70B-Instruct --base-url http://localhost:8000/v1
  bash scripts/alpaca_eval.sh --answers outputs_alpaca/mine.json"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    about = "Answer AlpacaEval's 805 instructions with DPO and θ(α), and have AlpacaEval 2.0 judge them."
    made = pairs.new_parser("alpaca_eval.sh", about, EXAMPLES)
    judges.add_judge_options(made, PAPER)
    made.add_argument("--answers", type=Path, nargs="+", metavar="FILE", help="judge these answers; none is generated")
    made.add_argument("--reference", type=Path, metavar="FILE", help="the answers to beat (default: AlpacaEval 2.0's)")
    pairs.add_generate_args(made)
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Answer, judge, and print the table; the exit code."""
    given = parser().parse_args(words)
    if given.smoke:
        from evaluations.smoke import alpaca as smoke

        return smoke.run(given.output_dir)
    judge = judges.judge_of(given)
    pair = None if given.answers else pairs.pair_of(given)
    if pair is not None and judge.address == judges.OPENAI and not given.dry_run:
        judges.look_up(judge)  # a key that is refused is better known before hours of answers
    files = given.answers if pair is None else pairs.answers(pair, "alpaca", given)
    if given.dry_run:
        for file in files:
            pairs.run(
                command(file.stem, judge, folder_of(given.output_dir, judge, file.stem), whole=True), dry_run=True
            )
        return 0
    reference = given.reference or download_reference()
    read = [read_answers(file, reference) for file in files]
    results.require_different(name for _, name, _ in read)
    found = [evaluate(file, *one, reference, judge, given.output_dir) for file, one in zip(files, read, strict=True)]
    return pairs.show(found, COLUMNS, pair, as_json=given.json)


def download_reference() -> Path:
    """GPT-4 Turbo's answers, which AlpacaEval 2.0 compares with.

    AlpacaEval itself asks for them by a script that `datasets` 4 and later refuses, so its file is named here.

    Raises:
        EnvironmentFailure: The hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(*REFERENCE, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise EnvironmentFailure(
            f"the reference answers cannot be had from the hub ({error}): see --reference"
        ) from error


def folder_of(output_dir: Path, judge: Judge, name: str) -> Path:
    """Where AlpacaEval's files of a model lie."""
    return judges.folder_of(output_dir, "alpaca_eval", judge) / results.file_name(name)


def evaluate(
    file: Path, rows: Sequence[Row], name: str, whole: bool, reference: Path, judge: Judge, output_dir: Path
) -> Result:
    """Judge one file of answers, or take the result that is there.

    Args:
        file: The answers.
        rows: Its rows.
        name: Whose they are.
        whole: Whether they are the reference's first instructions, in its order.
        reference: The answers to beat.
        judge: Who judges.
        output_dir: Where results go.

    Raises:
        InputError: The judge does not answer as asked.
        EnvironmentFailure: AlpacaEval failed.
    """
    folder = folder_of(output_dir, judge, name)
    length_controlled = whole and len(rows) >= FEWEST
    made_from = {
        "answers_sha256": hash_file(file),
        "reference_sha256": hash_file(reference),
        "annotator": annotator(judge),
        "length_controlled": length_controlled,
        **results.versions_of("alpaca_eval"),
    }

    def judged() -> Result:
        served = judges.look_up(judge)
        judgments = folder / f"judgments-{results.digest([annotator(judge), judge.asked_as, served])}.json"
        lay_out(folder, rows, name, reference, judge)
        keep_judgments(judgments)
        environment = {
            **judge.environment,
            "OPENAI_CLIENT_CONFIG_PATH": str(folder / CLIENT),
            "PYTHONWARNINGS": "ignore",
        }
        words = command(name, judge, folder, length_controlled, judgments)
        pairs.run(words, env=environment, log=folder / "log.txt", chatter=CHATTER)
        require_verdicts(judgments, judge)
        scores = read_scores(folder, judge, name)
        return Result(
            "AlpacaEval 2.0",
            name,
            scores,
            len(rows),
            made_from,
            judge.describe(served),
            results.versions_of("alpaca_eval", "llm-expo"),
            date_of(judgments),
            failed=len(rows) - int(scores["n_total"]),
            unanswered=pairs.unanswered(file),
        )

    return results.once(folder, made_from, judged)


def read_answers(file: Path, reference: Path) -> tuple[list[Row], str, bool]:
    """The answers, who gave them, and whether they are the reference's first instructions, in its order.

    The length-controlled win rate finds an instruction's difficulty by its position, so that only those have one.

    Raises:
        InputError: An answer has no instruction of the reference's, or two have the same.
    """
    rows = read_rows(file)
    asked = [row.get("instruction") for row in read_rows(reference)]
    answered = [row.get("instruction") for row in rows]
    if not rows or (unknown := [one for one in answered if one not in set(asked)]):
        what = "has no answers" if not rows else f"answers {len(unknown)} instructions that {reference} does not have"
        raise InputError(f"{file} {what}: give a file as `expo generate alpaca` writes it")
    if len(set(answered)) < len(answered):
        raise InputError(f"{file} answers an instruction twice; AlpacaEval takes one answer to each")
    name = rows[0].get("generator")
    if not isinstance(name, str) or {row.get("generator") for row in rows} != {name}:
        raise InputError(f"{file} does not say in `generator` whose its answers are, the same in every row")
    if empty := sum(not row.get("output") for row in rows):
        print(f"{name}: {empty} of {len(rows)} answers are empty, and are judged so", file=sys.stderr)
    return rows, name, answered == asked[: len(answered)]


def annotator(judge: Judge) -> str:
    """AlpacaEval's own configuration for the paper's judge; another judge has one of its name."""
    return ANNOTATOR if judge.model == PAPER else f"{ANNOTATOR}@{judge.folder}"


def configuration(judge: Judge) -> dict[str, Any]:
    """How another judge is asked: as the paper's, one token, of whose 5 likeliest the two names count."""
    import alpaca_eval.constants

    chat = {"requires_chatml": True, "price_per_token": "nan"}  # else "instruct" in a name is no chat model
    kwargs = {"model_name": judge.asked_as, "max_tokens": 1, "temperature": 1, "logprobs": True, "top_logprobs": 5}
    return {
        "prompt_template": str(alpaca_eval.constants.EVALUATORS_CONFIG_DIR / PROMPT),
        "fn_completions": "openai_completions",
        "completions_kwargs": {**kwargs, **chat},
        "fn_completion_parser": "logprob_parser",
        "completion_parser_kwargs": {"numerator_token": NAMES[0], "denominator_tokens": NAMES, "is_binarize": False},
        "completion_key": "completions_all",
        "batch_size": 1,
    }


def lay_out(folder: Path, rows: Sequence[Row], name: str, reference: Path, judge: Judge) -> None:
    """Give AlpacaEval copies: it reads fewer kinds of files than expo does, and takes some names for numbers."""
    contents = {
        ANSWERS: json_text([{**row, "generator": name} for row in rows]),
        REFERENCE_COPY: json_text(read_rows(reference)),
        CLIENT: "default: [{client_class: openai.OpenAI}]\n",
    }
    if judge.model != PAPER:
        contents[f"{annotator(judge)}/configs.yaml"] = json_text({annotator(judge): configuration(judge)}, indent=2)
    for file, content in contents.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / file, content)


def keep_judgments(judgments: Path) -> None:
    """Have answers that got no judgment judged again, and lose none of the others: AlpacaEval writes its file in place.

    What a kill tore is read as far as it goes, and a copy of what was there before each run is kept.
    """
    copy = judgments.with_suffix(".kept.json")
    found = max((whole_rows(file) for file in (judgments, copy)), key=len)
    kept = [row for row in found if row.get("preference") not in (UNJUDGED, None)]
    judgments.unlink(missing_ok=True)
    if kept:
        write_atomic(copy, json_text(kept))
        write_atomic(judgments, json_text(kept))


def whole_rows(file: Path) -> list[Row]:
    """The rows of a JSON list, up to where it is torn."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    decoder, rows, place = json.JSONDecoder(), [], text.find("{")
    with contextlib.suppress(ValueError):
        while place >= 0:
            row, end = decoder.raw_decode(text, place)
            rows.append(row)
            place = text.find("{", end)
    return rows


def require_verdicts(judgments: Path, judge: Judge) -> None:
    """Refuse a judge whose token is seldom one of the two names: what is left of their probability is noise.

    Raises:
        InputError: In more than a tenth of its verdicts the names have less than half of the probability.
    """
    verdicts = [row for row in whole_rows(judgments) if row.get("preference") not in (UNJUDGED, None)]
    noise = sum(named(row) < 0.5 for row in verdicts)
    if noise > len(verdicts) / 10:
        raise InputError(
            f"{judge.model} gives the two names little probability in {noise} of {len(verdicts)} verdicts: its first "
            "token is something else, as that of a model that thinks first; take a judge that answers at once"
        )


def named(row: Row) -> float:
    """The probability of the two names in a verdict; 1 where AlpacaEval kept no completion."""
    completion: Any = row.get("preference_raw_completion")
    try:
        said = json.loads(completion) if isinstance(completion, str) else completion
        likeliest = said["logprobs"]["content"][0]["top_logprobs"]
    except (KeyError, TypeError, ValueError, IndexError):
        return 1.0
    return sum(math.exp(one["logprob"]) for one in likeliest if one["token"] in NAMES)


def date_of(judgments: Path) -> str:
    """When the last judgment was made; AlpacaEval writes the local time."""
    dates = [str(row["preference_date"]) for row in whole_rows(judgments) if row.get("preference_date")]
    return results.moment(datetime.fromisoformat(max(dates)).timestamp()) if dates else results.now()


def command(name: str, judge: Judge, folder: Path, whole: bool, judgments: Path = Path("judgments.json")) -> list[str]:
    """AlpacaEval's own command. Everything that it keeps goes into the folder, and nothing into its package."""
    official = judge.model == PAPER
    words = {
        "model_outputs": str(folder / ANSWERS),
        "reference_outputs": str(folder / REFERENCE_COPY),
        "annotators_config": ANNOTATOR if official else str((folder / annotator(judge)).resolve()),
        "name": name,
        "output_path": str(folder),
        "caching_path": str(folder / judgments.name),
        "precomputed_leaderboard": None,
        "fn_metric": "get_length_controlled_winrate" if whole else "get_winrate",
        "sort_by": "length_controlled_winrate" if whole else "win_rate",
    }
    quoted = {key: json.dumps(value, ensure_ascii=False) if value else "None" for key, value in words.items()}
    flags = [f"--{key}={value}" for key, value in quoted.items()]  # its command line reads values as Python
    weights = json.dumps({"save_weights_dir": str(folder / "weights")}, ensure_ascii=False)
    return ["alpaca_eval", "evaluate", *flags, *([f"--metric_kwargs={weights}"] if whole else [])]


def read_scores(folder: Path, judge: Judge, name: str) -> dict[str, Any]:
    """What AlpacaEval's leaderboard says of a model; figures that it does not have are left out."""
    file = folder / (ANNOTATOR if judge.model == PAPER else "") / "leaderboard.csv"
    with file.open(encoding="utf-8", newline="") as lines:
        row = next(row for row in csv.DictReader(lines) if row[""] == name)
    numbers = {key: float(value) for key, value in row.items() if key not in ("", "mode") and value}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


if __name__ == "__main__":
    sys.exit(pairs.script(main))
