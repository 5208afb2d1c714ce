"""What a model's folder or repository has in the place of weights, and what makes a checkpoint of it.

Judged by the names of files alone, below the folder too: a trainer's output has its checkpoints there, FSDP and
DeepSpeed their shards. To add a kind, add a line to `KINDS`.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from expo.files import natural

MODEL_FILES = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    "adapter_config.json",
)
"""One of these makes a folder a checkpoint, or an adapter."""

MAX_DEPTH = 3
MAX_NAMES = 10_000


@dataclass(frozen=True)
class Kind:
    """A form that weights may have."""

    pattern: str
    """Glob of a file's path in the folder; * matches slashes as well."""
    what: str
    step: str
    """What to do. In both, {file} is the file's path in the folder; {at} the folder it is in, and {top} the one above
    that, as a command names them."""


ZERO = "DeepSpeed weights, split across processes ({file})"
JAX_OR_TENSORFLOW = "load them with transformers 4 and write them with `save_pretrained`"

KINDS = (
    Kind("*zero_to_fp32.py", ZERO, "`python {at}/zero_to_fp32.py {at} {at} --safe_serialization` puts them together"),
    Kind(
        "*mp_rank_*_states.pt",
        ZERO,
        "DeepSpeed's `zero_to_fp32.py {top} {top} --safe_serialization` puts them together",
    ),
    Kind("*.distcp", "sharded FSDP weights ({file})", "`accelerate merge-weights {at} {top}` puts them together"),
    Kind(
        "*model_world_size_*_rank_*.pt",
        "sharded verl weights ({file})",
        "`python -m verl.model_merger merge --backend fsdp --local_dir {at} --target_dir {at}` puts them together",
    ),
    Kind(
        "*pytorch_model_fsdp.bin",
        "a whole FSDP state dict ({file})",
        "`mv {at}/pytorch_model_fsdp.bin {at}/pytorch_model.bin`, and --allow-pickle reads it",
    ),
    Kind(
        "*consolidated*.pth",
        "weights in Meta's own format ({file})",
        "transformers' convert_llama_weights_to_hf.py converts them",
    ),
    Kind(
        "consolidated*.safetensors",
        "weights in Mistral's own format ({file})",
        "download the model's other files too or, if there are none, convert them with transformers' "
        "convert_mistral_weights_to_hf.py",
    ),
    Kind(
        "*.gguf",
        "GGUF weights ({file})",
        "give the checkpoint they were made from, or load them in transformers with `gguf_file=` and write them as "
        "safetensors with `save_pretrained`, which does not undo the quantization",
    ),
    Kind("*tf_model*.h5", "TensorFlow weights ({file})", JAX_OR_TENSORFLOW),
    Kind("*flax_model*.msgpack", "Flax weights ({file})", JAX_OR_TENSORFLOW),
    Kind("*.ckpt.index", "TensorFlow weights ({file})", JAX_OR_TENSORFLOW),
    Kind("*.nemo", "a NeMo archive ({file})", "convert it with NeMo's export to the Hugging Face format"),
    Kind("weights*.npz", "MLX weights ({file})", "give the checkpoint they were converted from"),
    Kind("*.onnx", "an ONNX model ({file})", "give the checkpoint it was exported from"),
    Kind(
        "model-?????-of-?????.safetensors",
        "shards without their index ({file})",
        "download model.safetensors.index.json too, or write the model again with `save_pretrained`",
    ),
    Kind(
        "pytorch_model-?????-of-?????.bin",
        "shards without their index ({file})",
        "download pytorch_model.bin.index.json too, or write the model again with `save_pretrained`",
    ),
    Kind("adapter_model.bin", "a pickled adapter ({file})", "load it with peft and save it again as safetensors"),
    Kind(
        "adapter_model.*",
        "an adapter's weights ({file}) without its adapter_config.json",
        "download that too, or save the adapter again with `save_pretrained`",
    ),
    Kind(
        "model.*.safetensors",
        "{file}, a variant",
        "if it is not quantized, rename it to model.safetensors, or load it with transformers' `variant=` and write it "
        "with `save_pretrained`",
    ),
    Kind(
        "pytorch_model.*.bin",
        "{file}, a variant",
        "rename it to pytorch_model.bin, or load it with transformers' `variant=` and write it with `save_pretrained`",
    ),
    Kind("*.ckpt", "a trainer's checkpoint ({file})", "load it into the model and write that with `save_pretrained`"),
)
"""In the order in which they are looked for."""

NEVER_WEIGHTS = ("*optimizer*", "*rng_state*", "*scheduler*")


def elsewhere(names: Iterable[str], place: str) -> str | None:
    """What there is instead of weights, and the next step, to follow a colon; None if nothing is recognised.

    Args:
        names: The paths of the files in the model's folder or repository.
        place: How a command names the folder.
    """
    found = sorted(name for name in names if name.isprintable())
    if below := _checkpoints_below(found):
        return _give(below, place)
    for kind in KINDS:
        for name in found:
            file = PurePosixPath(name)
            is_it = fnmatch.fnmatchcase(name, kind.pattern)
            if is_it and not any(fnmatch.fnmatchcase(name, pattern) for pattern in NEVER_WEIGHTS):
                at, top = (os.path.normpath(f"{place}/{file.parent}{up}") for up in ("", "/.."))
                words = {"file": name, "at": at, "top": top}
                return f"it has {kind.what}; {kind.step}".format(**words)
    return None if found else "it is empty; is the path right, and is the download complete?"


def _checkpoints_below(names: Sequence[str]) -> list[PurePosixPath]:
    """The folders with weights in the lowest depth that has any, the last to be written last."""
    folders = {PurePosixPath(name).parent for name in names if PurePosixPath(name).name in MODEL_FILES}
    depth = min((len(folder.parts) for folder in folders), default=0)
    return sorted((one for one in folders if len(one.parts) == depth and depth), key=lambda one: natural(str(one)))


def _give(below: Sequence[PurePosixPath], place: str) -> str:
    last = below[-1]
    cached = re.fullmatch(r"(?:.*/)?models--([^/]+?)--([^/]+)/snapshots/[^/]+", f"{Path(place).resolve()}/{last}")
    if cached:
        return f"it is part of the hub cache; give {cached[1]}/{cached[2]}, or {place}/{last}"
    others = f" (the last of {len(below)} such folders)" if len(below) > 1 else ""
    return f"its folder {last} is a checkpoint; give {place}/{last}{others}"


def names_below(folder: Path) -> list[str]:
    """The paths of the files in a folder, down to its folders' folders' folders; hidden folders are left out."""
    names: list[str] = []
    for parent, folders, files in os.walk(folder):
        inner = Path(parent).relative_to(folder)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and len(inner.parts) < MAX_DEPTH)
        names += [str(inner / name) for name in files]
        if len(names) > MAX_NAMES:
            break
    return names
