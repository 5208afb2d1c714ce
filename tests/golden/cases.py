"""Outputs that an earlier expo made: the commands, as they were given and as the tests give them again.

To keep another output, add its line here and run `make.py NAME`; its docstring says with which expo.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

URL = "{url}"
"""In a command: the address of the server of chat completions."""


@dataclass(frozen=True)
class Finished:
    """An output that stays finished, in `finished/NAME`."""

    commands: tuple[str, ...]
    """What made it, in order."""
    code: int = 0
    """The commands' exit code."""
    now: str = ""
    """What the commands need besides today, where a default has changed since."""


@dataclass(frozen=True)
class Unfinished:
    """What a run left in `unfinished/NAME`; in `whole/NAME` is what the same command made without a stop."""

    command: str
    left: int
    """How many rows, or shards, are still to be made."""
    begun: tuple[str, ...] = ("",)
    """The runs that left it, each the command with these words."""
    killed_after: int = 0
    """After how many rows, or shards, they were killed; 0 where they came to their end."""
    now: str = ""
    """What the command needs besides to go on."""


PAIR = "--sft inputs/sft --dpo inputs/dpo"
ADAPTER = "--sft inputs/sft --dpo inputs/adapter"
PROMPTS = "generate inputs/prompts.jsonl --max-tokens 8"
MTBENCH = "generate mtbench --dataset inputs/questions.jsonl --max-tokens 6"
FLOAT32 = "--engine transformers --device cpu --dtype float32"
DPO = f"--model inputs/dpo {FLOAT32}"
VLLM = "--engine vllm --dtype float32 --engine-arg max_num_seqs=4"
GREEDY = f"{PROMPTS} {DPO} --temperature 0 --batch-tokens 60"
SHARED = "--seed-mode shared"
"""What vLLM and openai did before there was a seed mode."""
SCORE = "--reward-model inputs/rm --device cpu --dtype float32"

FINISHED = {
    "alpha": Finished((f"extrapolate {PAIR} --alpha 0.5",)),
    "alphas": Finished((f"extrapolate {PAIR} --alpha 0.1 --alpha 0.3",)),
    "alpha-zero": Finished((f"extrapolate {PAIR} --alpha 0",)),
    "rules": Finished(
        (f"extrapolate {PAIR} --alpha 0.3 --dtype float32 --exclude lm_head --alpha-for mlp=0.7 --alpha-for norm=0",)
    ),
    "wide": Finished(("extrapolate --sft inputs/sft --dpo inputs/wide --alpha 0.3 --missing copy-dpo --vocab common",)),
    "adapter": Finished((f"extrapolate {ADAPTER} --alpha 0.3",)),
    "pickled": Finished(("extrapolate --sft inputs/sft --dpo inputs/pickled --alpha 0.3 --allow-pickle",)),
    "shards": Finished((f"extrapolate {PAIR} --alpha 0.3 --max-shard-size 3KB --verify",)),
    "greedy": Finished((GREEDY, f"score inputs/prompts.jsonl --name dpo {SCORE} --max-length 12")),
    "sampled": Finished(
        (
            f"{PROMPTS} {DPO} --name mine --n 2 --system w3 --stop-token-id 9 --top-k 20 --seed 7",
            f"score inputs/prompts.jsonl --name mine {SCORE} --batch-tokens 60",
        )
    ),
    "limited": Finished((f"{PROMPTS} {DPO} --limit 4",)),
    "template": Finished((f"{PROMPTS} {DPO} --chat-template inputs/template.jinja",)),
    "too-long": Finished((f"generate inputs/long.jsonl --max-tokens 4 {DPO}",), code=3),
    "processes": Finished((f"{PROMPTS} {DPO} --data-parallel 2",)),
    "ultrafeedback": Finished(
        (
            f"generate ultrafeedback --dataset inputs/feedback.jsonl --max-tokens 4 {DPO}",
            f"score ultrafeedback --name dpo --engine transformers {SCORE}",
        )
    ),
    "alpaca": Finished(
        (
            f"generate alpaca --dataset inputs/alpaca.json --max-tokens 4 {DPO}",
            f"score alpaca --name dpo {SCORE}",
        )
    ),
    "mtbench": Finished(
        (
            f"{MTBENCH} {DPO}",
            f"score mtbench --name dpo --dataset inputs/questions.jsonl {SCORE}",
        )
    ),
    "theta": Finished((f"{PROMPTS} {PAIR} --alpha 0.3 --exclude lm_head {FLOAT32}",)),
    "theta-adapter": Finished((f"{PROMPTS} {ADAPTER} --alpha 0.3 {FLOAT32}",)),
    "vllm": Finished((f"{PROMPTS} --model inputs/dpo {VLLM} --n 2",), now=SHARED),
    "vllm-mtbench": Finished((f"{MTBENCH} --model inputs/dpo {VLLM}",), now=SHARED),
    "vllm-theta": Finished((f"{PROMPTS} {PAIR} --alpha 0.3 --alpha-for mlp=0.7 {VLLM}",), now=SHARED),
    "openai": Finished((f"{PROMPTS} --model org/name --engine openai --base-url {URL}",), now=SHARED),
    "openai-mtbench": Finished((f"{MTBENCH} --model org/name --engine openai --base-url {URL}",), now=SHARED),
}

UNFINISHED = {
    "extrapolate": Unfinished(f"extrapolate {PAIR} --alpha 0.3", left=3, killed_after=1),
    "generate": Unfinished(GREEDY, left=3, killed_after=2),
    "theta": Unfinished(
        f"{PROMPTS} {PAIR} --alpha 0.3 {FLOAT32} --temperature 0 --batch-tokens 60", left=3, killed_after=2
    ),
    "mtbench": Unfinished(f"{MTBENCH} {DPO} --temperature 0 --batch-tokens 60", left=2, killed_after=5),
    "parts": Unfinished(GREEDY, left=0, begun=("--part 0/2", "--part 1/2"), now="--join 2"),
    "part": Unfinished(GREEDY, left=3, begun=("--part 0/2",), now="--data-parallel 2"),
    "limit": Unfinished(GREEDY, left=2, begun=("--limit 4",)),
    "score": Unfinished(
        f"score inputs/prompts.jsonl --name given --outputs inputs/answers.jsonl {SCORE} --batch-tokens 40",
        left=3,
        killed_after=2,
    ),
}


def words(command: str, folder: str, url: str) -> list[str]:
    """A command that writes into a folder, as the program is given it."""
    name, *rest = shlex.split(command.replace(URL, url))
    return [name, *rest, "--output" if name == "extrapolate" else "--output-dir", folder]
