"""Runs written as `expo generate` and `expo score` write them, without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from expo.files import json_lines, texts_sha256
from expo.tasks import find_task, read_conversations

RM = "org/reward-model"


def write_outputs(
    folder: Path,
    name: str,
    rows: Sequence[tuple[str, str]],
    *,
    task: str = "prompts",
    ids: Sequence[str] | None = None,
    samples: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    errors: Sequence[int] = (),
    meta: bool = True,
    alpha: float | None = None,
) -> Path:
    """An output file of (prompt, output), and its meta file with ids, samples and lengths in tokens."""
    place = folder / f"outputs_{task}"
    place.mkdir(parents=True, exist_ok=True)
    lengths = lengths or [len(output.split()) for _, output in rows]
    finish = ["error" if number in errors else "stop" for number in range(len(rows))]
    if task == "alpaca":
        file = place / f"{name}.json"
        listed = [{"dataset": "koala", "instruction": p, "output": o, "generator": name} for p, o in rows]
        file.write_text(json.dumps(listed))
    else:
        file = place / f"{name}.jsonl"
        columns = zip(rows, lengths, finish, strict=True)
        file.write_text(
            json_lines({"prompt": p, "output": o, "length": n, "finish_reason": f} for (p, o), n, f in columns)
        )
    per_row = {
        "id": list(ids or map(str, range(len(rows)))),
        "sample": list(samples or [0] * len(rows)),
        "length": list(lengths),
        "finish_reason": finish,
    }
    reasons = [{"row": number, "reason": "too long"} for number in errors]
    record = {"command": "generate", "name": name, "alpha": alpha, "errors": reasons, "per_row": per_row}
    if meta:
        (place / f"{name}.meta.json").write_text(json.dumps(record))
    return file


def write_rewards(
    outputs: Path,
    rewards: Sequence[float | None],
    *,
    rm: str = RM,
    revision: str | None = None,
    further: bool = False,
    truncated: Sequence[int] = (),
    base: Path | None = None,
) -> Path:
    """The three files that `expo score` writes for these outputs."""
    task = outputs.parent.name.removeprefix("outputs_")
    place = (base or outputs.parents[1]) / f"rewards_{task}"
    place.mkdir(parents=True, exist_ok=True)
    name = outputs.stem
    stem = f"{name}@{rm.rpartition('/')[2]}" if further else name
    conversations = read_conversations(outputs, find_task(task if task == "alpaca" else f"{task}.jsonl"))
    generated = outputs.with_name(f"{name}.meta.json")
    per_row = json.loads(generated.read_text())["per_row"] if generated.exists() else {}
    ids = per_row.get("id", list(map(str, range(len(rewards)))))
    samples = per_row.get("sample", [0] * len(rewards))
    rows = [
        {"id": ids[n], "sample": samples[n], "reward": reward, "tokens": 9, "truncated": n in truncated}
        for n, reward in enumerate(rewards)
    ]
    (place / f"{stem}.jsonl").write_text(json_lines(rewards))
    (place / f"{stem}.rows.jsonl").write_text(json_lines(rows))
    scored = conversations[: len(rewards)]
    meta = {
        "command": "score",
        "name": stem,
        "reward_model": rm,
        "revision": revision,
        "errors": [{"row": n, "reason": "no finite number"} for n, reward in enumerate(rewards) if reward is None],
        "prompts_sha256": texts_sha256(one.asked for one in scored),
        "outputs_sha256": texts_sha256(list(one.messages) for one in scored),
        "fingerprint": {"dtype": "float32", **({"output": name} if further else {})},
    }
    (place / f"{stem}.meta.json").write_text(json.dumps(meta))
    return place / f"{stem}.jsonl"


def write_run(
    folder: Path, name: str, rows: Sequence[tuple[str, str]], rewards: Sequence[float | None], **more
) -> Path:
    """Outputs and rewards."""
    outputs = write_outputs(folder, name, rows, **more)
    write_rewards(outputs, rewards)
    return outputs
