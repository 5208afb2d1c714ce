"""What the tests are made of: tiny checkpoints, the float64 reference, and ways to run the program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from expo.checkpoint.folder import read_checkpoint
from expo.config import ExtrapolateConfig
from expo.errors import EnvironmentFailure
from expo.output.shard import StagedShard
from expo.theta.buffers import TORCH_DTYPES
from expo.theta.decide import plan_pair
from expo.theta.plan import PairPlan, PairSettings
from expo.theta.sources import SourceFiles
from expo.theta.stream import Combiner
from expo.verbs import extrapolate

CPU = torch.device("cpu")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SIGNIFICANDS = {torch.bfloat16: (8, -126), torch.float16: (11, -14), torch.float32: (24, -126)}
"""Bits of the significand (the hidden one counted) and the smallest normal exponent."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


UNHURRIED = "import time; time.sleep = lambda _: None; from expo.cli.program import main; main()"
"""The program; the libraries' waits between two tries take no time."""
Pair = tuple[Path, Path]
"""SFT and DPO."""


@dataclass(frozen=True)
class Result:
    """What a run of the program gave."""

    code: int
    stdout: str
    stderr: str


VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
"""The config of a tiny vision tower, for models that have one."""

Run = Callable[..., Result]
"""Runs a program with these words."""


def expo_command(*args: object) -> list[str]:
    return [sys.executable, "-m", "expo", *map(str, args)]


def environment(**extra: str) -> dict[str, str]:
    alone = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # else all engines sit on one core
    return {**os.environ, **alone, "HF_HUB_OFFLINE": "1", **extra}


def run_expo(*args: object, env: dict[str, str] | None = None, cwd: Path | None = None, timeout: float = 120) -> Result:
    """Run `python -m expo …` and wait for it."""
    return _run(expo_command(*args), env, cwd, timeout)


def run_python(script: str, *args: object, env: dict[str, str] | None = None, timeout: float = 120) -> Result:
    """Run a script that is given as text, and wait for it."""
    return _run([sys.executable, "-c", script, *map(str, args)], env, None, timeout)


def _run(command: list[str], env: dict[str, str] | None, cwd: Path | None, timeout: float) -> Result:
    done = subprocess.run(
        command, env=environment(**(env or {})), cwd=cwd, timeout=timeout, capture_output=True, text=True
    )
    return Result(done.returncode, done.stdout, done.stderr)


def write(pair: Pair, output: Path, *alphas: float, **settings: object) -> tuple[extrapolate.Written, ...]:
    """`expo extrapolate`'s verb, run in this process."""
    defaults = {"alpha": alphas or (0.5,), "output": str(output), "fsync": False}
    return extrapolate.run(ExtrapolateConfig(sft=str(pair[0]), dpo=str(pair[1]), **{**defaults, **settings}))


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own in memory, with these mount options; skips where that needs other rights."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def dying(engine: type, method: str) -> Iterator[None]:
    """An engine that dies in its third batch; the run in the body must end of it."""
    original, calls = getattr(engine, method), []

    def failing(self, batch):
        calls.append(batch)
        if len(calls) > 2:
            raise EnvironmentFailure("the engine died")
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, method, failing)
        with pytest.raises(EnvironmentFailure, match="the engine died"):
            yield


def rewards(scorer: Any, rows: Sequence[Sequence[int]]) -> list[float]:
    """What a scorer gives for each row, in their order; it gives each once."""
    found = [reward for batch in scorer.score(rows) for reward in batch]
    assert sorted(place for place, _ in found) == list(range(len(rows)))
    return [reward for _, reward in sorted(found)]


class Killed(BaseException):
    """Stands for SIGKILL where a process of its own would be too slow."""


@contextmanager
def stopped_in_shard(number: int) -> Iterator[None]:
    """The body is a run; it is stopped in the middle of its shard `number`, when its bytes are written."""
    real, calls = StagedShard.finish, iter(range(number))

    def finish(shard: StagedShard) -> str:
        if next(calls, None) is None:
            raise Killed
        return real(shard)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StagedShard, "finish", finish)
        with pytest.raises(Killed):
            yield


# --- checkpoints --------------------------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    shards: int = 1,
    files: dict[str, str] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write tensors as one model.safetensors, or, with `shards` > 1, dealt out to that many files and an index.

    `files` are further files, name → text; config.json is there unless it is among them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"config.json": '{"model_type": "tiny", "torch_dtype": "bfloat16"}', **(files or {})}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata or {"format": "pt"})
        return folder
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata or {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, as the safetensors library reads it."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    return tensors


def random_pair(
    names_shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """SFT and DPO tensors that differ by about 3 %, as real pairs do."""
    generator = torch.Generator().manual_seed(seed)
    sft = {name: torch.randn(shape, generator=generator) for name, shape in names_shapes.items()}
    dpo = {name: s * (1 + 0.03 * torch.randn(s.shape, generator=generator)) for name, s in sft.items()}
    return tuple({name: t.to(dtype) for name, t in side.items()} for side in (sft, dpo))  # type: ignore[return-value]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, name → bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def without_clock(content: dict[str, bytes]) -> dict[str, object]:
    """A finished output's files, with the times in expo.json left out."""
    manifest = json.loads(content["expo.json"])
    clock = manifest.pop("clock").keys() - {"parts", "join_seconds"}  # of one that was joined
    assert clock == {"started", "first_read", "combine_seconds", "seconds"}
    return {**content, "expo.json": manifest}


# --- plans executed in memory ---------------------------------------------------------------------------------------


def plan(
    tmp_path: Path,
    sft: dict[str, Tensor],
    dpo: dict[str, Tensor],
    *,
    shards: tuple[int, int] = (1, 1),
    files: dict[str, str] | list[dict[str, str]] | None = None,
    **rules: object,
) -> PairPlan:
    """Write both sides and plan the pair; `files` are further ones of both sides, or of each."""
    both = files if isinstance(files, list) else [files, files]
    sides = [
        read_checkpoint(write_checkpoint(tmp_path / name, tensors, shards=number, files=more))
        for name, tensors, number, more in (("sft", sft, shards[0], both[0]), ("dpo", dpo, shards[1], both[1]))
    ]
    return plan_pair(*sides, PairSettings(**{"alphas": (0.5,), **rules}))


class Memory:
    """A sink that keeps the bytes, and checks what sinks are promised."""

    def __init__(self, nbytes: int) -> None:
        self.content = bytearray(nbytes)
        self.offsets: dict[int, int] = {}
        self.covered = 0

    def put(self, number: int, offset: int, data: memoryview, done: Callable[[], None]) -> None:
        self.content[offset : offset + len(data)] = data
        self.offsets[number] = offset
        self.covered += len(data)
        done()

    def check(self, nbytes: int) -> None:
        assert sorted(self.offsets) == list(range(len(self.offsets))), "the numbers have no gap"
        assert sorted(self.offsets.values()) == [self.offsets[number] for number in range(len(self.offsets))]
        assert self.covered == nbytes, "every byte comes once"


def stream(pair: PairPlan, workers: int = 2, device: torch.device = CPU) -> list[dict[str, bytes]]:
    """Execute a plan in memory: for every α the shards' bytes."""
    results: list[dict[str, bytes]] = [{} for _ in pair.settings.alphas]
    with SourceFiles(pair.sft, pair.dpo) as sources:
        combiner = Combiner(sources, pair.settings, device, workers)
        for shard in pair.shards:
            told: list[int] = []
            sinks = [Memory(shard.nbytes) for _ in results]
            combiner.run(shard.segments(), sinks, told.append)
            for result, sink in zip(results, sinks, strict=True):
                sink.check(shard.nbytes - len(shard.header))
                sink.content[: len(shard.header)] = shard.header
                result[shard.name] = bytes(sink.content)
            assert sum(told) in (0, len(results) * (shard.nbytes - len(shard.header)))
    return results


def tensors_of(pair: PairPlan, shards: dict[str, bytes]) -> dict[str, Tensor]:
    return {
        tensor.name: torch.frombuffer(
            bytearray(shards[shard.name][tensor.start : tensor.start + tensor.nbytes]),
            dtype=TORCH_DTYPES[tensor.dtype],
        ).reshape(tensor.shape)
        if tensor.nbytes
        else torch.empty(tensor.shape)
        for shard in pair.shards
        for tensor in shard.tensors
    }


# --- the float64 reference ----------------------------------------------------------------------------------------


def round_to(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float64 → the nearest values of a narrower type (ties to even), as float64. torch would round twice."""
    bits, smallest = SIGNIFICANDS[dtype]
    _, exponents = np.frexp(values)
    step = np.ldexp(1.0, np.maximum(exponents - 1, smallest) - (bits - 1))
    return np.rint(values / step) * step


def exact(sft: Tensor, dpo: Tensor, alpha: float) -> np.ndarray:
    """θ(α) in float64."""
    s, d = sft.double().numpy(), dpo.double().numpy()
    return d + alpha * (d - s)


def share_off(sft: Tensor, dpo: Tensor, alpha: float, out: Tensor) -> float:
    """Check θ(α) against float64; returns the share of values that are not the correctly rounded ones.

    The law: the output is the correct rounding of a real number within 2⁻²²(|d| + |α(d − s)|) of θ(α). So it is
    the correctly rounded value, or one step beside it where θ(α) lies that close to a rounding boundary.
    """
    s, d, values = (tensor.double().numpy() for tensor in (sft, dpo, out))
    right = exact(sft, dpo, alpha)
    bound = 2.0**-22 * (np.abs(d) + np.abs(alpha * (d - s)))
    low, high = round_to(right - bound, out.dtype), round_to(right + bound, out.dtype)
    wrong = ~((low <= values) & (values <= high))
    if wrong.any():
        first = tuple(np.argwhere(wrong)[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {values.size} values are off, first s={s[first]!r} d={d[first]!r} α={alpha!r}: "
            f"{values[first]!r}, not {right[first]!r}"
        )
    return float((values != round_to(right, out.dtype)).mean()) if values.size else 0.0


# --- files made by hand -------------------------------------------------------------------------------------------


def raw_safetensors(file: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """Write a safetensors file as told, right or wrong; `header` is JSON data, or the header's own bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    """One tensor's entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
