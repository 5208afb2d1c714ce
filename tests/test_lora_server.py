"""One vLLM server with θ(α) of several α as LoRA adapters: under each name the answers are that α's checkpoint's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import helpers
import pytest
import torch
from adapters import CASES, Maker, save_adapter, wide_llama
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from expo.cli import program as cli

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

STARTED, LATER = (0.0, 0.3, 0.5), 1.0
OWN = {0.5: ("q_proj=2",)}
"""`--alpha-for` of some: modules with an α of their own, in `alpha_pattern`."""
NAMES = ("sft", *(f"a{alpha}" for alpha in STARTED))
LONG = 140
"""Tokens of a prompt: more than a block of vLLM's cache, which must not be shared by two α."""
NEW = 48
ROWS = 8
PLACES = len(STARTED) + 1
"""The last one stays empty: on a CPU vLLM 0.32 gives requests without an adapter what is in it, if others have one."""

Answers = list[list[int]]


@dataclass(frozen=True)
class Served:
    """What is served, and what it must answer."""

    folder: Path
    prompts: Answers
    expected: dict[str, Answers]
    """Of each name, by transformers; of `LATER` too."""
    url: str

    def post(self, path: str, **content: object) -> bytes:
        """What the server replies."""
        data = json.dumps(content).encode()
        with urlopen(Request(f"{self.url}{path}", data, {"Content-Type": "application/json"}), timeout=120) as reply:
            return bytes(reply.read())

    def refusal(self, path: str, **content: object) -> tuple[int, str]:
        """The status with which it refuses, and why."""
        with pytest.raises(HTTPError) as refused:
            self.post(path, **content)
        return refused.value.code, refused.value.read().decode()

    def answers(self, name: str, prompts: Answers) -> Answers:
        """New tokens of a name, greedily."""
        greedy = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "return_token_ids": True}
        reply = json.loads(self.post("/v1/completions", model=name, prompt=prompts, **greedy))
        assert reply["model"] == name
        return [choice["token_ids"] for choice in sorted(reply["choices"], key=lambda choice: choice["index"])]

    def at_once(self, names: Sequence[str]) -> dict[str, Answers]:
        """The same of all names, with every prompt of every name as a request of its own."""
        asked = list(product(range(ROWS), names))
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(lambda one: self.answers(one[1], [self.prompts[one[0]]]), asked))
        return {
            name: [answer for (_, of), (answer,) in zip(asked, answers, strict=True) if of == name] for name in names
        }

    def steps(self) -> int:
        """Steps that the engine has made."""
        with urlopen(f"{self.url}/metrics") as reply:
            lines = reply.read().decode().splitlines()
        (count,) = (line.split()[-1] for line in lines if line.startswith("vllm:iteration_tokens_total_count"))
        return int(float(count))

    def listed(self) -> set[str]:
        """The names that it says it has."""
        with urlopen(f"{self.url}/v1/models") as reply:
            return {model["id"] for model in json.load(reply)["data"]}


def by_transformers(model: Path, prompts: Answers) -> Answers:
    """New tokens, greedily."""
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    settings = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    found = network.generate(torch.tensor(prompts), **settings, output_logits=True, return_dict_in_generate=True)
    best = torch.stack(found.logits).topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 1e-4, "else roundings may decide"
    return found.sequences[:, LONG:].tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def served(
    made: Maker, llama_pair: helpers.Pair, serve_vllm: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """The server; what it must answer is found while it starts."""
    folder = tmp_path_factory.mktemp("several")
    base, lora = made((wide_llama, CASES["all linear"][1]), torch.float32)
    sft = shutil.copytree(base, folder / "sft")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(llama_pair[0] / file, sft)
    pair = sft, lora
    for alpha in (*STARTED, LATER):
        helpers.write(pair, folder / "adapters" / f"a{alpha}", alpha, alpha_for=OWN.get(alpha, ()), as_adapter=True)
    options = [
        *("--served-model-name", "sft", "--max-model-len", 512, "--kv-cache-memory-bytes", 64 << 20),
        *("--no-enable-chunked-prefill", "--max-num-batched-tokens", 8192),
        *("--enable-lora", "--max-lora-rank", 8, "--max-loras", PLACES),
        *("--lora-modules", *(f"a{alpha}={folder}/adapters/a{alpha}" for alpha in STARTED)),
    ]
    runtime = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with serve_vllm(sft, *options, folder=folder, **runtime) as answering:
        for alpha in (*STARTED, LATER):
            helpers.write(pair, folder / f"a{alpha}", alpha, alpha_for=OWN.get(alpha, ()))
        prompts = torch.randint(6, 64, (ROWS, LONG), generator=torch.Generator().manual_seed(0)).tolist()
        models = {"sft": sft, **{f"a{alpha}": folder / f"a{alpha}" for alpha in (*STARTED, LATER)}}
        expected = {name: by_transformers(model, prompts) for name, model in models.items()}
        yield Served(folder, prompts, expected, answering())


def test_each_name_answers_as_its_checkpoint(served: Served) -> None:
    assert served.listed() == {*NAMES}
    patterns = [json.loads((served.folder / f"adapters/a{alpha}/adapter_config.json").read_text()) for alpha in STARTED]
    assert [bool(one["alpha_pattern"]) for one in patterns] == [alpha in OWN for alpha in STARTED]
    for name in NAMES:
        assert served.answers(name, served.prompts) == served.expected[name], name


def test_the_answers_of_all_names_differ(served: Served) -> None:
    for row in zip(*served.expected.values(), strict=True):
        assert len({tuple(answer) for answer in row}) == len(row)


def test_all_names_in_one_batch_answer_the_same(served: Served) -> None:
    before = served.steps()
    assert served.at_once(NAMES) == {name: served.expected[name] for name in NAMES}
    assert served.steps() - before < len(NAMES) * NEW, "one name after the other takes as many steps"


def test_generate_asks_for_an_alpha_by_its_name(served: Served, tmp_path: Path) -> None:
    task, found = tmp_path / "task.jsonl", {}
    task.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("w1 w2", "w7 w40 w33")))
    asked = {
        **{name: ("openai", "--base-url", f"{served.url}/v1", "--model", name) for name in ("a0.3", "sft")},
        "checkpoint": ("transformers", "--model", served.folder / "a0.3"),
    }
    for name, words in asked.items():
        common = ("--temperature", 0, "--max-tokens", 32, "--output-dir", tmp_path, "--name", name)
        assert cli.run(["generate", str(task), "--engine", *map(str, (*words, *common))]) == 0
        lines = (tmp_path / "outputs_task" / f"{name}.jsonl").read_text().splitlines()
        found[name] = [json.loads(line)["output"].strip() for line in lines]
    assert found["a0.3"] == found["checkpoint"] != found["sft"]
    assert len(found["a0.3"]) == 2


def test_one_is_added_to_the_running_server_and_taken_away(served: Served) -> None:
    """It takes the last place, so that SFT is not asked beside it."""
    late = {"lora_name": f"a{LATER}", "lora_path": str(served.folder / "adapters" / f"a{LATER}")}
    served.post("/v1/load_lora_adapter", **late)
    assert served.listed() == {*served.expected}
    adapters = [name for name in served.expected if name != "sft"]
    assert served.at_once(adapters) == {name: served.expected[name] for name in adapters}
    served.post("/v1/unload_lora_adapter", lora_name=late["lora_name"])
    assert served.listed() == {*NAMES}
    code, why = served.refusal("/v1/completions", model=late["lora_name"], prompt="x")
    assert code == 404
    assert late["lora_name"] in why
    assert served.answers("a0.3", served.prompts) == served.expected["a0.3"]


def test_an_adapter_of_a_larger_rank_is_refused(served: Served, tmp_path: Path) -> None:
    wide = save_adapter(served.folder / "sft", tmp_path / "wide", LoraConfig(r=9, target_modules=["q_proj"]))
    code, why = served.refusal("/v1/load_lora_adapter", lora_name="wide", lora_path=str(wide))
    assert code == 500
    assert "max_lora_rank" in why
    assert served.listed() == {*NAMES}
