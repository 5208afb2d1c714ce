"""One vLLM server with several α as LoRA adapters beside a server for the checkpoint of each α.

Makes a Llama with the tokenizer of --model and a LoRA adapter of random values on all its linear layers, and writes
θ(α) both ways. Then it starts vLLM's server of the base with an adapter per α, and of each checkpoint, one after the
other, and asks the same prompts of all, greedily, in rounds, the two ways in turn: all α at once, or each α's own
server after the other. All servers live meanwhile, and each has the same number of threads. Prints how long a start
took, how long a round, and how many answers are the same; and how large the folders are, beside those of a 7B, which
are computed from its shapes.

    python benchmarks/lora_server.py --model MODEL --work /tmp/expo-lora-server
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
from extrapolate import ratio
from safetensors import safe_open
from safetensors.torch import save_file
from switch import make_pair

from expo.cli.program import PROCESS_ENVIRONMENT
from expo.config import ExtrapolateConfig
from expo.verbs import extrapolate

ALPHAS = (0.0, 0.3, 0.5)
RANK = 16
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "head_dim": 64}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8}
PROMPT = 32
"""Tokens of a prompt."""

LAYERS_7B = 32
LINEAR_7B = (*((4096, 4096),) * 2, *((1024, 4096),) * 2, *((14336, 4096),) * 2, (4096, 14336))
WEIGHTS_7B = LAYERS_7B * (sum(rows * columns for rows, columns in LINEAR_7B) + 2 * 4096) + 2 * 32_000 * 4096 + 4096
"""Of Mistral-7B: its linear layers and norms, embedding and head, and the last norm."""

Prompts = list[list[int]]
Answers = dict[tuple[float, int], list[int]]


def write_adapter(base: Path, folder: Path) -> Path:
    """A LoRA adapter of random values on all linear layers of a base, in its type; its head is left out, as by PEFT."""
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    tensors, targets = {}, set()
    with safe_open(base / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            shape = file.get_slice(name).get_shape()
            if "_proj." in name:
                module = name.removesuffix(".weight")
                targets.add(module.rpartition(".")[2])
                for side, size in (("A", (RANK, shape[1])), ("B", (shape[0], RANK))):
                    tensors[f"base_model.model.{module}.lora_{side}.weight"] = 0.05 * torch.randn(size)
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    settings = {**about, "target_modules": sorted(targets), "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def write_all(base: Path, adapter: Path, work: Path) -> None:
    """θ(α) of each α: an adapter `aα`, and a checkpoint `checkpoint-aα`."""
    pair = ExtrapolateConfig(sft=str(base), dpo=str(adapter), alpha=ALPHAS, fsync=False)
    extrapolate.run(replace(pair, output=str(work / "a{alpha}"), as_adapter=True))
    extrapolate.run(replace(pair, output=str(work / "checkpoint-a{alpha}"), dtype="float32"))


# --- servers ------------------------------------------------------------------------------------------------------


@contextmanager
def serving(model: Path, *options: object, log: Path) -> Iterator[tuple[str, float]]:
    """The server that `vllm serve` starts; its URL once it answers, and the seconds until then."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        port = door.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--port", port, "--dtype", "float32"]
    fixed = ["--host", "127.0.0.1", "--enforce-eager", "--max-model-len", 512, "--kv-cache-memory-bytes", 256 << 20]
    began = time.perf_counter()
    with log.open("wb") as stream:
        words = map(str, [*command, *fixed, *options])
        process = subprocess.Popen(list(words), stdout=stream, stderr=stream, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        while not answers(url):
            if process.poll() is not None:
                sys.exit(f"the server ended:\n{log.read_text()}")
            time.sleep(0.05)
        yield url, time.perf_counter() - began
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    """Whether a server is ready."""
    with suppress(URLError):
        urlopen(f"{url}/health").close()
        return True
    return False


def ask(url: str, name: str, prompt: list[int], tokens: int) -> list[int]:
    """The new tokens of one answer."""
    greedy = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "return_token_ids": True}
    data = json.dumps({"model": name, "prompt": prompt, **greedy}).encode()
    with urlopen(Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})) as reply:
        ids: list[int] = json.load(reply)["choices"][0]["token_ids"]
    return ids


def ask_all(places: dict[float, tuple[str, str]], prompts: Prompts, tokens: int) -> Answers:
    """Every prompt of every α, all at once."""
    asked = list(product(places, range(len(prompts))))
    with ThreadPoolExecutor(len(asked)) as pool:
        found = pool.map(lambda one: ask(*places[one[0]], prompts[one[1]], tokens), asked)
        return dict(zip(asked, found, strict=True))


# --- figures ------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, base: Path) -> None:
    """Start the servers, ask them in rounds, and print the table."""
    work: Path = options.work
    prompts = torch.randint(5, 80, (options.prompts, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    modules = [f"a{alpha}={work}/a{alpha}" for alpha in ALPHAS]
    lora = ["--enable-lora", "--max-lora-rank", RANK, "--max-loras", len(ALPHAS), "--lora-modules", *modules]
    with ExitStack() as stack:
        url, start = stack.enter_context(serving(base, *lora, log=work / "lora.log"))
        one = {alpha: (url, f"a{alpha}") for alpha in ALPHAS}
        own, starts = {}, []
        for alpha in ALPHAS:
            folder = work / f"checkpoint-a{alpha}"
            found = stack.enter_context(serving(folder, log=work / f"{folder.name}.log"))
            own[alpha] = (found[0], str(folder))
            starts.append(found[1])
        seconds: dict[str, list[float]] = {"one": [], "own": []}
        results: dict[str, Answers] = {}
        for number in range(options.rounds + 1):
            for way in sorted(seconds, reverse=bool(number % 2)):
                began = time.perf_counter()
                results[way] = ask_all(one, prompts, options.tokens) if way == "one" else {}
                if way == "own":
                    for alpha, place in own.items():
                        results[way] |= ask_all({alpha: place}, prompts, options.tokens)
                if number:  # the first round warms up
                    seconds[way].append(time.perf_counter() - began)
    same = sum(answer == results["own"][key] for key, answer in results["one"].items())
    tokens = len(results["one"]) * options.tokens
    print("| way | starts | rounds | answering (range) | tokens/s | × the checkpoints' time | same answers |")
    print("|" + " --- |" * 7)
    rows = (
        (f"one server, {len(ALPHAS)} α at once", [start], "one", f"{same} of {len(results['one'])}"),
        (f"{len(ALPHAS)} servers of checkpoints, one after the other", starts, "own", "–"),
    )
    for label, began_in, way, matches in rows:
        runs = seconds[way]
        median = statistics.median(runs)
        begun = " + ".join(f"{value:.1f}" for value in began_in)
        cells = [label, f"{begun} s", len(runs), f"{median:.2f} s ({min(runs):.2f}–{max(runs):.2f})"]
        print(
            "| " + " | ".join(map(str, [*cells, f"{tokens / median:.0f}", ratio(runs, seconds["own"]), matches])) + " |"
        )


def sizes(work: Path) -> None:
    """Print how large an adapter and a checkpoint are, here and for a 7B."""
    here = [folder_size(work / name) for name in (f"a{ALPHAS[1]}", f"checkpoint-a{ALPHAS[1]}")]
    factors = LAYERS_7B * sum(RANK * (rows + columns) for rows, columns in LINEAR_7B)
    print("\n| model | adapter of rank 16 | checkpoint | checkpoints to one adapter |")
    print("| --- | --- | --- | --- |")
    for label, (adapter, whole) in (
        ("this one, float32, on the disk", here),
        ("Mistral-7B, bfloat16, computed from its shapes", (2 * factors, 2 * WEIGHTS_7B)),
    ):
        print(f"| {label} | {adapter / 1e6:.1f} MB | {whole / 1e6:,.1f} MB | {whole / adapter:.0f} |")


def folder_size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="whose tokenizer the made model has")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made; it is emptied")
    parser.add_argument("--prompts", type=int, default=16, help="of each α")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    os.environ |= {**PROCESS_ENVIRONMENT, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # else all servers sit on one core
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    base, _ = make_pair(options.model, options.work, **SHAPE, **HEADS, vocab_size=vocabulary)
    write_all(base, write_adapter(base, options.work / "lora"), options.work)
    measure(options, base)
    sizes(options.work)


if __name__ == "__main__":
    main()
