"""AlpacaEval 2.0 from end to end without a network: `alpaca_eval` itself, a local hub, and a judge that can be counted.

The hub has a small AlpacaEval: instructions, answers to beat, and the two files from which the length-controlled win
rate is made. The judge calls the longer answer better with probability 0.9.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

from evaluations import alpaca, results
from evaluations.pairs import FAILED_ROWS
from evaluations.smoke import judge_server
from evaluations.smoke.setting import check, models, without_network
from expo.files import json_text

ROWS = 24
ALPHA = 1.0
NAMES = ("tiny-dpo", f"tiny-dpo-ExPO-a{ALPHA}")
UNSURE = 3
JUDGE = "a-judge/that-counts-letters"
GAMED = (("concise", -1.0), ("verbose", 1.0))
"""Two made models that answered short and long on purpose, as AlpacaEval has them for its regression."""


def run(output_dir: Path) -> int:
    """Run it, and check what comes out.

    Raises:
        CheckFailed: A score is not what the judge's rule says.
    """
    from tests.hub_server import FakeHub

    trio, folder = models(), output_dir / "smoke_alpaca_eval"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with FakeHub().serve() as hub, judge_server.serve(JUDGE) as judge:
        hub.add(alpaca.REFERENCE[0], data_set(), kind="dataset")
        with without_network(HF_ENDPOINT=hub.endpoint, HF_HOME=str(folder / "hub")):
            pair = ["--sft", str(trio / "tiny-sft"), "--dpo", str(trio / "tiny-dpo"), "--alpha", str(ALPHA)]
            flags = ["--generate-args", "--engine transformers --dtype float32 --max-tokens 48 --top-k 5"]
            to = ["--judge", JUDGE, "--base-url", judge.address, "--output-dir", str(folder)]
            judge.unsure = UNSURE
            code = alpaca.main([*pair, *flags, *to])
            check(f"{UNSURE} judgments that name no answer are said to be missing", code == FAILED_ROWS, code)
            before, there = judge.answered, [folder / "outputs_alpaca" / f"{name}.json" for name in NAMES]
            code = alpaca.main([*to, "--answers", *map(str, there)])
            check("every instruction was answered and judged", code == 0, code)
            again = judge.answered - before
            check(f"a rerun asks for what is missing, and no more ({again} requests)", again == UNSURE, again)
            check_scores(folder)
            fetched = {file.rpartition("/")[2] for file in hub.fetched()}
            wanted = {"alpaca_eval.json", "alpaca_eval_gpt4_baseline.json", "df_gamed.csv"}
            check("instructions, answers to beat and df_gamed.csv came from the hub", wanted <= fetched, fetched)
    return 0


def data_set() -> dict[str, bytes]:
    """The files of AlpacaEval's repository that are read."""
    from demo import task

    rng = random.Random(0)
    prompts = task.prompts(ROWS, 3)
    about = {"dataset": "made", "generator": "baseline"}
    rows = [{**about, "instruction": one, "output": to_beat(one, rng)} for one in prompts]
    difficulty = [rng.gauss(0, 1) for _ in prompts]
    lines = [
        f"{name},{rng.random()},{row},{lean},{difficulty[row]},False" for name, lean in GAMED for row in range(ROWS)
    ]
    gamed = "\n".join(["model,preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline", *lines])
    listed = "\n".join([",instruction_difficulty", *(f"{row},{one}" for row, one in enumerate(difficulty))])
    files: dict[str, Any] = {"alpaca_eval.json": rows, "alpaca_eval_gpt4_baseline.json": rows}
    texts = {name: json_text(content) for name, content in files.items()}
    texts |= {"df_gamed.csv": gamed + "\n", "instruction_difficulty.csv": listed + "\n"}
    return {name: text.encode() for name, text in texts.items()}


def to_beat(prompt: str, rng: random.Random) -> str:
    """An answer of the baseline: three of ten are longer than the tiny models', the others shorter."""
    from demo import task

    answer = task.write_answer(prompt, rng)
    return " ".join([answer] * 9)[: rng.randrange(80, 140)] if rng.random() < 0.3 else answer[: rng.randrange(1, 20)]


def record_of(folder: Path, name: str) -> Path:
    """The record of a model's scores."""
    return folder / "results_alpaca_eval" / JUDGE.replace("/", "--") / f"{name}.json"


def check_scores(folder: Path) -> None:
    """The win rates are those that one counts from the answers and the judge's rule."""
    from demo import task

    baseline = [row["output"] for row in json.loads(data_set()["alpaca_eval_gpt4_baseline.json"])]
    found = []
    for name in NAMES:
        record = results.read(record_of(folder, name))
        assert record is not None
        answers = [row["output"] for row in json.loads((folder / "outputs_alpaca" / f"{name}.json").read_text())]
        counted = 100 * fmean(judge_server.preference(a, b) for a, b in zip(baseline, answers, strict=True))
        scores, length = record.scores, sum(map(len, answers)) // len(answers)
        win_rate, controlled = scores["win_rate"] or 0.0, scores["length_controlled_winrate"] or 0.0
        check(f"{name}: win rate {win_rate:.2f} %, as counted", abs(win_rate - counted) < 1e-6, counted)
        check(f"{name}: {length} characters on average", scores["avg_length"] == length, scores)
        leans = "less" if abs(controlled - 50) < abs(win_rate - 50) else "more"
        check(f"{name}: {controlled:.1f} % at equal length, which is nearer to a draw", leans == "less", scores)
        judged = json.loads((record_of(folder, name).with_name(name) / "annotations.json").read_text(encoding="utf-8"))
        asked = [row["instruction"] for row in judged]
        check(f"{name}: each at the place by which its difficulty is found", asked == task.prompts(ROWS, 3), asked)
        check(
            f"{name}: the judge's true name and its server's word",
            record.judge is not None and record.judge["served"] == f"made/{JUDGE}",
            record.judge,
        )
        found.append(answers)
    check("θ(α) answers otherwise than DPO", found[0] != found[1])
