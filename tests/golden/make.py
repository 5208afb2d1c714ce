"""Make the golden outputs that `test_golden.py` holds later versions to, and their inputs where there are none.

The outputs beside this file were made by the expo of commit c9550b8, checked out in FOLDER:

    PYTHONPATH=FOLDER python tests/golden/make.py [NAME …]

Without names everything is made anew. It needs the `test` and `openai` extras and vLLM, whose CPU build will do.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from cases import FINISHED, UNFINISHED, words

HERE = Path(__file__).parent
TIMES = HERE / "times.json"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
KILLED = """
import os, runpy, signal, sys
from expo.store import Journal

append, last, count = Journal.append, int(sys.argv.pop(1)), 0

def stopping(journal, rows):
    global count
    append(journal, rows)
    count += sum("fingerprint" not in row for row in rows)
    if count >= last:
        os.kill(os.getpid(), signal.SIGKILL)

Journal.append = stopping
runpy.run_module("expo", run_name="__main__")
"""
"""The program, which ends as killed when so many rows are in its journal."""

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
WORDS = [*SPECIAL, *(f"w{number}" for number in range(32 - len(SPECIAL)))]


def text(seed: int, length: int) -> str:
    return " ".join(f"w{(7 * seed + 3 * word + seed * word) % 26}" for word in range(length))


# --- inputs -------------------------------------------------------------------------------------------------------


def make_inputs(folder: Path) -> None:
    make_models(folder)
    prompts = [text(row, 1 + row % 4) for row in range(6)]
    rows = {
        "prompts.jsonl": [{"id": f"p{row}", "prompt": prompt} for row, prompt in enumerate(prompts)],
        "long.jsonl": [{"prompt": text(1, 3)}, {"prompt": text(2, 90)}, {"prompt": text(3, 2)}],
        "feedback.jsonl": [
            {"prompt_id": f"f{row}", "messages": [{"role": "user", "content": prompt}]}
            for row, prompt in enumerate(prompts[:3])
        ],
        "questions.jsonl": [
            {"question_id": 81 + row, "category": category, "turns": [text(row, 2), text(row + 9, 1 + row)]}
            for row, category in enumerate(("writing", "math", "stem", "coding"))
        ],
        "answers.jsonl": [{"prompt": prompt, "output": text(row + 20, 3)} for row, prompt in enumerate(prompts)],
    }
    for name, content in rows.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    alpaca = [{"dataset": "helpful_base", "instruction": prompt} for prompt in prompts[:3]]
    (folder / "alpaca.json").write_text(json.dumps(alpaca, indent=1) + "\n")
    (folder / "template.jinja").write_text(TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}w1 "))


def make_models(folder: Path) -> None:
    """SFT; DPO in shards, as a pickle, with further words and a further tensor; an adapter to SFT; a reward model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    tokens = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = LlamaConfig(**shape, **tokens, head_dim=32, max_position_embeddings=64, initializer_range=0.5)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "sft")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder / "dpo", max_shard_size="3KB")
    model.save_pretrained(folder / "wide")
    (folder / "pickled").mkdir()
    torch.save(load_file(folder / "wide" / "model.safetensors"), folder / "pickled" / "pytorch_model.bin")
    shutil.copy(folder / "wide" / "config.json", folder / "pickled")
    tensors = load_file(folder / "wide" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.ones(2, 16, dtype=torch.bfloat16)])
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32, dtype=torch.bfloat16)
    save_file(tensors, folder / "wide" / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "wide" / "config.json").read_text())
    (folder / "wide" / "config.json").write_text(json.dumps({**settings, "vocab_size": 34}, indent=2) + "\n")
    lora = LoraConfig(r=2, lora_alpha=0.2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    base = LlamaForCausalLM.from_pretrained(folder / "sft")
    base.name_or_path = "sft"
    get_peft_model(base, lora).save_pretrained(folder / "adapter", save_embedding_layers=False)
    (folder / "adapter" / "README.md").unlink()  # PEFT's form, not filled in
    reward = LlamaForSequenceClassification(LlamaConfig(**config.to_diff_dict() | {"num_labels": 1}))
    reward.to(torch.bfloat16).save_pretrained(folder / "rm")
    for name in ("sft", "dpo", "rm"):
        tokenizer().save_pretrained(folder / name)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[3:]})
    fast.chat_template = TEMPLATE
    return fast


def times() -> dict[str, int]:
    """When each input file was written, in ns."""
    files = sorted(file for file in (HERE / "inputs").rglob("*") if file.is_file())
    return {str(file.relative_to(HERE)): file.stat().st_mtime_ns for file in files}


# --- outputs ------------------------------------------------------------------------------------------------------


def run(command: str, folder: Path, url: str, *, killed_after: int = 0) -> int:
    program = ["-c", KILLED, str(killed_after)] if killed_after else ["-m", "expo"]
    arguments = words(command, str(folder.relative_to(HERE)), url)
    print("expo", *arguments, flush=True)
    return subprocess.run([sys.executable, *program, *arguments], env=ENVIRONMENT, cwd=HERE).returncode


def make_finished(name: str, url: str) -> None:
    folder, case = emptied("finished", name), FINISHED[name]
    for command in case.commands:
        assert run(command, folder, url) == case.code


def make_unfinished(name: str, url: str) -> None:
    """What the command makes without a stop first, in the same place, since some files say where they are."""
    folder, whole, case = emptied("unfinished", name), emptied("whole", name), UNFINISHED[name]
    assert run(case.command, folder, url) == 0
    folder.rename(whole)
    for further in case.begun:
        code = run(f"{case.command} {further}", folder, url, killed_after=case.killed_after)
        assert code == (-9 if case.killed_after else 0)
    for lock in folder.rglob("*.lock"):
        lock.unlink()  # names the process that was killed


def emptied(kind: str, name: str) -> Path:
    folder = HERE / kind / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    return folder


def main(names: list[str]) -> None:
    if TIMES.exists():
        for file, time_ns in json.loads(TIMES.read_text()).items():
            os.utime(HERE / file, ns=(time_ns, time_ns))
    else:
        (HERE / "inputs").mkdir()
        make_inputs(HERE / "inputs")
        TIMES.write_text(json.dumps(times(), indent=1) + "\n")
    sys.path.append(str(HERE.parent))
    from chat_server import ChatServer

    with ChatServer().serve() as server:
        for table, make in ((FINISHED, make_finished), (UNFINISHED, make_unfinished)):
            for name in table:
                if not names or name in names:
                    make(name, server.url)


if __name__ == "__main__":
    main(sys.argv[1:])
