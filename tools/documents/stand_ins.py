"""What the names in a text resolve to: a hub, a judge and files of this machine, all of them tiny.

The hub (`tests/hub_server.py`) has every model that a recipe or a page names, and the tasks' data sets with a few rows
each; it refuses and notes whatever it does not know. A page's working directory is a copy of the tree, as after a
clone, with the files that its text takes as given.

To have a page find one more thing, add a line to `MODELS`, `DATA_SETS`, `FILES` or `REPOSITORIES`.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.documents.pages import ROOT

if TYPE_CHECKING:
    from tests.hub_server import Files

ROWS = 24
"""Of each task's prompts; AlpacaEval's length-controlled win rate needs ten."""


@dataclass(frozen=True)
class Trio:
    """The folders of the three models that stand in for all others, and of an adapter of the SFT model."""

    sft: Path
    dpo: Path
    rm: Path
    adapter: Path


def trio(folder: Path) -> Trio:
    """The tiny trained models (`tests/made_inputs.py`), with an adapter made in `folder`."""
    from tests import made_inputs

    models = Path(made_inputs.made().models)
    made = Trio(models / "tiny-sft", models / "tiny-dpo", models / "tiny-rm", folder / "adapter")
    write_adapter(made.adapter, made.sft)
    return made


def write_adapter(folder: Path, base: Path) -> None:
    """A LoRA adapter of rank 2 on the queries of each layer."""
    import numpy as np
    from safetensors.numpy import save_file

    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    width, out = config["hidden_size"], heads * (config.get("head_dim") or config["hidden_size"] // heads)
    rng, tensors = np.random.default_rng(0), {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = rng.normal(0, 0.02, (2, width)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.normal(0, 0.02, (out, 2)).astype(np.float32)
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**about, "base_model_name_or_path": "my-sft"}))


# --- the hub ------------------------------------------------------------------------------------------------------

MODELS: dict[str, str] = {"my/rm": "rm", "me/my-rm": "rm"}
"""Models of the hub that no recipe names → which of the trio stands in for it."""


def models() -> dict[str, str]:
    """Every hub id (with its revision) that a recipe or a page names → which of the trio stands in for it."""
    from expo import recipes

    found = dict(MODELS)
    for name in recipes.names():
        recipe = recipes.load(name)
        assert isinstance(recipe, recipes.Recipe)
        found |= {recipe.sft: "sft", recipe.dpo: "dpo"}
    for name in recipes.reward_model_names():
        known = recipes.load(name)
        assert isinstance(known, recipes.RewardRecipe)
        found[known.reward_model] = "rm"
    return found


def alpaca_eval() -> Files:
    """AlpacaEval's instructions, the answers to beat, and what the length-controlled win rate is made from."""
    from evaluations.smoke.alpaca import data_set

    return data_set()


def ultrafeedback() -> Files:
    """UltraFeedback's test prompts and preference pairs."""
    from demo import task

    rng, rows = random.Random(1), []
    for number, prompt in enumerate(task.prompts(ROWS, 7, held_out=True)):
        asked = {"role": "user", "content": prompt}
        chosen, rejected = ([asked, {"role": "assistant", "content": task.write_answer(prompt, rng)}] for _ in range(2))
        name = f"{number:064x}"
        row = {"prompt": prompt, "prompt_id": name, "chosen": chosen, "rejected": rejected, "messages": chosen}
        rows.append(row)
    return {f"data/{split}-00000-of-00001.parquet": parquet(rows) for split in ("test_gen", "test_prefs")}


def mt_bench() -> Files:
    """MT-Bench's questions, as FastChat's space has them."""
    import tempfile

    from evaluations.smoke.mt_bench import write_data
    from tests.hub_server import read_folder

    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        return {f"data/{name}": content for name, content in read_folder(Path(folder)).items()}


def parquet(rows: list[dict[str, Any]]) -> bytes:
    """Rows as the hub keeps them."""
    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


def choices(count: int, **more: object) -> list[dict[str, Any]]:
    """Questions with four answers, in the columns of ARC, HellaSwag, TruthfulQA, MMLU, Winogrande and GSM8K at once."""
    rng, rows = random.Random(count), []
    for number in range(count):
        things = rng.sample(["teapot", "lantern", "bicycle", "piano", "kitten"], 4)
        question = f"What is in the {rng.choice(['garden', 'attic', 'harbor'])}?"
        targets = {"choices": things, "labels": [1, 0, 0, 0]}
        rows.append(
            {
                "id": str(number),
                "question": question,
                "answerKey": "A",
                "subject": "made",
                "ind": number,
                "activity_label": "Made",
                "ctx_a": question,
                "ctx_b": "it is",
                "ctx": question,
                "endings": things,
                "mc1_targets": targets,
                "mc2_targets": targets,
                "source_id": str(number),
                "split": "made",
                "sentence": f"The {things[0]} is by _ .",
                "option1": things[1],
                "option2": things[2],
                "answer": "1",
                "label": "0",
                "split_type": "made",
                **more,
            }
        )
    return rows


def split(place: str, **columns: object) -> Files:
    """The splits of one data set of the leaderboard, in the folder of its configuration."""
    return {
        f"{place}/{name}-00000-of-00001.parquet": parquet(choices(count, **columns))
        for name, count in (("train", 30), ("validation", 4), ("test", 4), ("dev", 5))
    }


def configured(*configurations: str, **columns: object) -> Callable[[], Files]:
    """A data set of several configurations, which its card names."""

    def made() -> Files:
        files, lines = {}, ["---", "configs:"]
        for name in configurations:
            one = split(name, **columns)
            files |= one
            lines += [f"- config_name: {name}", "  data_files:"]
            for path in one:
                part = path.rpartition("/")[2].partition("-")[0]
                lines += [f"  - split: {part}", f"    path: {path}"]
        return {**files, "README.md": "\n".join([*lines, "---", ""]).encode()}

    return made


def subjects() -> list[str]:
    """MMLU's 57 subjects, as lm-evaluation-harness knows them."""
    import importlib.util

    place = importlib.util.find_spec("lm_eval")
    folder = Path(str(place and place.origin)).parent / "tasks" / "mmlu" / "default"
    return sorted(
        re.findall(r'"?dataset_name"?: "?(\w+)', "\n".join(f.read_text() for f in folder.glob("mmlu_*.yaml")))
    )


LABELLED = {"choices": {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]}}
DATA_SETS: dict[tuple[str, str], Callable[[], Files]] = {
    ("dataset", "tatsu-lab/alpaca_eval"): alpaca_eval,
    ("dataset", "HuggingFaceH4/ultrafeedback_binarized"): ultrafeedback,
    ("space", "lmsys/mt-bench"): mt_bench,
    ("dataset", "allenai/ai2_arc"): configured("ARC-Challenge", **LABELLED),
    ("dataset", "Rowan/hellaswag"): lambda: split("data"),
    ("dataset", "truthfulqa/truthful_qa"): configured("multiple_choice"),
    ("dataset", "cais/mmlu"): lambda: configured(*subjects(), choices=["a", "b", "c", "d"], answer=1)(),
    ("dataset", "allenai/winogrande"): configured("winogrande_xl"),
    ("dataset", "openai/gsm8k"): configured("main", answer="It is 3.\n#### 3"),
}
"""Data sets and spaces of the hub → their files."""


@contextmanager
def hub(models_: Trio) -> Iterator[Any]:
    """The hub with all of these, at work; a data set is made when it is first asked for."""
    from tests.hub_server import FakeHub, read_folder

    with FakeHub().serve() as served:
        content = {name: read_folder(getattr(models_, name)) for name in ("sft", "dpo", "rm")}
        for identifier, side in models().items():
            name, _, revision = identifier.partition("@")
            if ("model", name) not in served.repositories:
                served.add(name, content[side])
            if revision:
                served.model(name).commit(content[side], revision)
        served.repositories = Lazily(served, DATA_SETS)
        yield served


class Lazily(dict[tuple[str, str], Any]):
    """The hub's repositories; those in a table are made when they are first asked for."""

    def __init__(self, served: Any, table: dict[tuple[str, str], Callable[[], Files]]) -> None:  # noqa: ANN401
        super().__init__(served.repositories)
        self.table = table

    def get(self, key: tuple[str, str], default: Any = None) -> Any:  # noqa: ANN401
        """The repository of that kind and name."""
        from tests.hub_server import Repository

        if key not in self and key in self.table:
            made = Repository(*key)
            made.commit(self.table[key]())
            self[key] = made
        return super().get(key, default)


# --- the working directory ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """What a page takes as given under a name, in the pages that match."""

    name: str
    make: Callable[[Path, Trio], None]
    pages: tuple[str, ...] = ("*",)


def model(side: str) -> Callable[[Path, Trio], None]:
    """One of the models, under a name of its own: outputs are called after it."""

    def make(path: Path, models_: Trio) -> None:
        shutil.copytree(getattr(models_, side), path)

    return make


def prompts(path: Path, _: Trio) -> None:
    """A file of prompts."""
    from demo import task

    path.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in task.prompts(ROWS, 11, held_out=True)))


def answers(path: Path, _: Trio) -> None:
    """Answers to AlpacaEval, as its own files are."""
    from demo import task

    rng = random.Random(path.stem)
    rows = json.loads(alpaca_eval()["alpaca_eval.json"])
    answered = [{**row, "output": task.write_answer(row["instruction"], rng), "generator": path.stem} for row in rows]
    path.write_text(json.dumps(answered, indent=2))


def answered(path: Path, _: Trio) -> None:
    """Answers to `prompts.jsonl`, as the paper's code writes them."""
    from demo import task

    rng = random.Random(path.stem)
    asked = task.prompts(ROWS, 11, held_out=True)
    path.write_text("".join(json.dumps({"prompt": one, "output": task.write_answer(one, rng)}) + "\n" for one in asked))


def run(path: Path, models_: Trio) -> None:
    """Answers, and rewards beside them as the paper's code writes them: a number a line."""
    (answers if path.suffix == ".json" else answered)(path, models_)
    rng = random.Random(path.stem)
    rewards = path.parents[1] / path.parent.name.replace("outputs", "rewards") / f"{path.stem}.jsonl"
    rewards.parent.mkdir(parents=True, exist_ok=True)
    rewards.write_text("".join(f"{rng.gauss(0, 1)}\n" for _ in range(ROWS)))


def turns(path: Path, _: Trio) -> None:
    """Answers to MT-Bench, as FastChat writes them."""
    files = mt_bench()
    rows = [json.loads(line) for line in files["data/mt_bench/question.jsonl"].splitlines()]
    answered = [
        {
            "question_id": row["question_id"],
            "answer_id": f"answer{row['question_id']}",
            "model_id": path.stem,
            "choices": [{"index": 0, "turns": ["it is shiny .", "it is old ."]}],
            "tstamp": 0.0,
        }
        for row in rows
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in answered))


SCORED = ("expo/cli/score.py",)
DOUBTED = ("docs/guides/when_it_does_not_help.md",)
COMPARED = ("expo/cli/compare.py", "expo/cli/report.py")


def trained(path: Path, models_: Trio) -> None:
    """What the demo leaves: its trio, and prompts."""
    path.mkdir()
    for name in ("sft", "dpo", "rm"):
        shutil.copytree(getattr(models_, name), path / name)
    prompts(path / "prompts.jsonl", models_)


def pairs(path: Path, _: Trio) -> None:
    """Preference pairs of the demo's task."""
    from demo import task

    rows = (one._asdict() for one in task.pairs(ROWS, 0))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def swept(path: Path, models_: Trio) -> None:
    """The folder of a finished sweep with two samples of each prompt."""
    asked = path.with_name(f"{path.name}.jsonl")
    prompts(asked, models_)
    words = ["--sft", models_.sft, "--dpo", models_.dpo, "--reward-model", models_.rm, "--task", asked]
    words += ["--alpha", 1, "--alpha", 2, "--n", 2, "--max-tokens", 16, "--engine", "transformers", "--output", path]
    command = [sys.executable, "-m", "expo", "sweep", *map(str, words)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def mergekit(path: Path, _: Trio) -> None:
    """In the place of another environment's program: it copies the model that its settings name first."""
    first = r"""$(sed -n 's/.*model: "\([^"]*\)".*/\1/p' "$1" | head -n 1)"""
    path.write_text(f'#!/bin/sh\nmkdir -p "$2"\ncp "{first}"/* "$2"\n')
    path.chmod(0o755)


RESULTS = ("benchmarks/RESULTS.md", "benchmarks/race.py")
MEASURED = (
    *RESULTS,
    "docs/frontier.md",
    "benchmarks/likelihood.py",
    "benchmarks/dequantize.py",
    "benchmarks/modules.py",
)
FILES = (
    *(Given(name, model("sft")) for name in ("my-sft", "SFT")),
    *(Given(name, model("dpo")) for name in ("my-dpo", "M", "DPO", "MODEL", "tiny-dpo")),
    *(Given(name, model("rm")) for name in ("my-rm", "RM", "tiny-rm")),
    *(Given("my-expo", model("dpo"), (page,)) for page in ("docs/guides/cluster.md",)),
    *(Given(f"my-run/step-{step}", model("dpo")) for step in (100, 200, 300)),
    Given("my-lora-adapter", model("adapter")),
    Given("checkpoints/zephyr-7b-beta-ExPO-a0.1", model("dpo"), ("expo/cli/generate.py",)),
    *(Given(name, prompts) for name in ("prompts.jsonl", "first200.jsonl", "p64.jsonl")),
    *(Given(name, answers) for name in ("A.json", "B.json", "C.json", "alpaca_eval.json", "zephyr-7b-dpo-full.json")),
    *(Given(name, answers) for name in ("zephyr-7b-sft-full.json", "Starling-LM-7B-beta.json")),
    *(Given(f"outputs_alpaca/{name}.json", answers) for name in ("mine", "NAME")),
    *(Given(f"outputs_alpaca/{name}.json", answers, SCORED) for name in ("my-model", "my-dpo", "zephyr-7b-beta")),
    *(Given(f"outputs_alpaca/{name}.json", run) for name in ("A", "B", "dpo", "expo")),
    *(Given(f"outputs_alpaca/{name}.json", run, COMPARED) for name in ("zephyr-7b-dpo", "zephyr-7b-dpo-ExPO-a0.3")),
    *(Given(f"outputs_alpaca/{name}.json", run, COMPARED) for name in ("zephyr-7b-beta", "zephyr-7b-beta-ExPO-a0.1")),
    Given("outputs_prompts/my-model.jsonl", answered, SCORED),
    *(Given(f"outputs_prompts/{name}.jsonl", run, DOUBTED) for name in ("my-dpo", "my-expo")),
    Given("outputs_mtbench/mine.jsonl", turns),
    *(Given(name, swept, RESULTS) for name in ("own", "shared", "grid")),
    Given("demo-output", trained, MEASURED),
    Given("pairs.jsonl", pairs),
    Given("mergekit/bin/mergekit-yaml", mergekit),
    Given("FOLDER", lambda path, _: path.symlink_to(ROOT)),
)
"""What is in a page's working directory before its first command, where its text names it or the run of that name."""


def named(given: Given, text: str) -> bool:
    """Whether a text names it: its path, or, of a run's answers, its rewards or its name."""
    path, words = Path(given.name), {given.name}
    if len(path.parts) > 1 and path.suffix:
        words |= {f"rewards_alpaca/{path.stem}.jsonl", f"--name {path.stem}"} | (
            {path.stem} if "-" in path.stem else set()
        )
    return any(re.search(rf"(?<![\w./-]){re.escape(word)}(?![\w.-]|/\w)", text) for word in words)


def copy_tree(folder: Path) -> None:
    """The files of this tree that git knows or would add, as a clone has them."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    subprocess.run(["git", "init", "-q", str(folder)], check=True)


def furnish(folder: Path, page: str, text: str, models_: Trio) -> None:
    """Put what a page's text takes as given into its working directory."""
    for given in FILES:
        if any(fnmatch(page, one) for one in given.pages) and named(given, text) and not (folder / given.name).exists():
            (folder / given.name).parent.mkdir(parents=True, exist_ok=True)
            given.make(folder / given.name, models_)


# --- other places -------------------------------------------------------------------------------------------------


def released(folder: Path) -> None:
    """The authors' repository, with the files of one pair."""
    sys.path.append(str(ROOT / "tests"))  # where tests find each other
    from test_paper_tables import make

    make(folder, "clone")
    for name in ("zephyr-7b-beta", "zephyr-7b-beta-ExPO"):
        place = folder / "results_mtbench" / "mt_bench" / "model_answer" / f"{name}.jsonl"
        place.parent.mkdir(parents=True, exist_ok=True)
        turns(place, Trio(folder, folder, folder, folder))


REPOSITORIES: dict[str, Callable[[Path], None]] = {
    "https://github.com/chujiezheng/LLM-Extrapolation": released,
}
"""What `git clone` fetches → how its files are made."""


def repositories(folder: Path) -> dict[str, str]:
    """Make them, and return the settings by which git takes them from here."""
    settings = {}
    git = ["git", "-c", "user.name=made", "-c", "user.email=made@localhost", "-c", "init.defaultBranch=main"]
    for number, (address, make) in enumerate(REPOSITORIES.items()):
        place = folder / str(number)
        make(place)
        for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "made"]):
            subprocess.run([*git, *words], cwd=place, check=True)
        settings |= {f"GIT_CONFIG_KEY_{number}": f"url.{place}.insteadOf", f"GIT_CONFIG_VALUE_{number}": address}
    return {"GIT_CONFIG_COUNT": str(len(REPOSITORIES)), **settings}
