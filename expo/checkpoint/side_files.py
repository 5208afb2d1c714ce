"""The files that accompany a checkpoint's weights: those that loaders read, by their names.

A list of what is taken and not of what is left, since a training leaves anything in a model's folder: shards of the
weights and optimizers in other formats, logs, data, backups. To add a file that a loader reads, add its name here.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import shlex
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from expo.checkpoint.folder import CONFIG_FILE, Location, require_utf8
from expo.errors import InputError
from expo.files import HEAD_BYTES, LFS_POINTER, kind_of, open_file, unreadable

CONFIGS = (
    *("config.json", "generation_config.json", "processor_config.json", "*preprocessor_config.json"),
    *("audio_tokenizer_config.json", "image_processor_config.json", "feature_extractor_config.json"),
    *("params.json", "configuration.json"),  # Mistral's and ModelScope's config.json
    *("sparse_attention_config.json", "joint_head_config.json"),  # vLLM
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
)

VOCABULARIES = (
    *("tokenizer.json", "tekken.json", "*.model", "tokenizer.model.v*", "*.tiktoken", "*.spm", "*.tokenizer"),
    *("vocab.json", "vocab.txt", "vocab.bpe", "vocab-*.json", "*_vocab.json", "*vocab_v*.txt", "dict.txt"),
)
"""A tokenizer has at least one of these."""

TOKENIZERS = (
    *VOCABULARIES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "bpe.codes"),
    *("encoder.json", "byte_maps.json", "normalizer.json", "emoji.json", "word_shape.json", "word_pronunciation.json"),
)

TEMPLATES = ("chat_template*.json", "*.jinja")

CODE = ("*.py", "*.cpp", "*.cu", "*.cuh", "requirements.txt", "*.ttf")
"""Code of the model's own, the kernels that it builds, and the fonts that Qwen-VL's draws with."""

TERMS = ("*licen[cs]e*", "copying*", "*notice*", "*use_policy*", "system_prompt*")
TERMS_SUFFIXES = ("", ".txt", ".md", ".rst", ".html", ".pdf")
"""For people; both compared in lower case."""

PICKLES = (b"PK\3\4", b"\x80")
"""How weights begin that were saved under a name such as best.model."""

SIDE_FILES = (*CONFIGS, *TOKENIZERS, *TEMPLATES, *CODE)

WEIGHTS = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt"),
    *("*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite", "*.ot", "*.npz", "*.distcp"),
)

KNOWN = (
    *(*WEIGHTS, "*.tfevents.*", "optimizer*", "scheduler*", "trainer_state.json", "zero_to_fp32.py"),
    *("README.md", "expo.json", "adapter_config.json", "adapter_model.*", ".*"),
)
"""Left out without a word: the weights themselves, what every trainer leaves beside them, and what expo writes."""

KNOWN_FOLDERS = ("checkpoint-*", "original", "runs", "global_step*", "__pycache__", ".*")

TRAINING_FOLDERS = (
    *("wandb", "mlruns", "log", "logs", "*_logs", "tensorboard", "optimizer*", "dist_*", "pytorch_model_fsdp*"),
    *("eval", "eval_*", "data"),
)

log = logging.getLogger(__name__)


def side_files(path: Path) -> list[Path]:
    """The files that accompany a checkpoint's weights, relative to its folder, sorted.

    Config, generation config, tokenizer, chat template, remote code, licence, also in folders that have no weights of
    their own. A line in the log says what is left out and is not expected in such a folder.

    Raises:
        InputError: A file or folder cannot be read, has a name that is not UTF-8, or is a git-lfs pointer.
    """
    files, left = _walk(path)
    if left:
        names = ", ".join(str(one.relative_to(path)) + "/" * one.is_dir() for one in left[:3])
        more = " …" if len(left) > 3 else ""
        log.info("%s: %d files or folders that loaders do not read are not copied: %s%s", path, len(left), names, more)
    return sorted(file.relative_to(path) for file in files)


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """The side files below a folder, and what is left out."""
    files: list[Path] = []
    left: list[Path] = []
    for entry in _entries(folder):
        is_folder = os.path.isdir(entry)  # noqa: PTH112 - never raises
        if _matches(entry.name, KNOWN_FOLDERS if is_folder else KNOWN):
            continue
        if is_folder and not entry.is_symlink():
            inner = ([], [entry]) if _is_foreign(entry) else _walk(entry)
            files += inner[0]
            left += inner[1]
        elif is_side_file(entry.name) or is_folder or _is_special(entry):
            files += [entry] if _is_copyable(entry) else []
        else:
            require_utf8(entry)
            left.append(entry)
    return files, left


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from error


def is_side_file(name: str) -> bool:
    """Whether a loader reads a file of this name, or it says on which terms the model may be used."""
    is_terms = _matches(name.lower(), TERMS) and Path(name.lower()).suffix in TERMS_SUFFIXES
    return is_terms or _matches(name, SIDE_FILES)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_foreign(folder: Path) -> bool:
    """Whether a folder is another model's, or a training's."""
    return _matches(folder.name, TRAINING_FOLDERS) or any(_matches(file.name, WEIGHTS) for file in _entries(folder))


def _is_special(entry: Path) -> bool:
    """Whether it is a pipe, a device or a socket."""
    return entry.exists() and not entry.is_file()


def _is_copyable(entry: Path) -> bool:
    """Whether it is a file; a warning says if not.

    Links to folders may lead anywhere.

    Raises:
        InputError: It cannot be read, has a name that is not UTF-8, or is a git-lfs pointer.
    """
    if kind := kind_of(entry):
        log.warning("%s is %s; not copied", entry, "a link to a folder" if kind == "a folder" else kind)
        return False
    require_utf8(entry)
    with open_file(entry) as stream:
        head = stream.read(HEAD_BYTES)
    if head.startswith(LFS_POINTER):
        raise InputError(f"{entry} is a git-lfs pointer: run `git lfs pull`, or remove it")
    if is_pickle := head.startswith(PICKLES):
        log.warning("%s is a pickle, not a tokenizer; not copied", entry)
    return not is_pickle


def warn_of_missing(sft: Location, dpo: Location, names: Collection[str], output: Path) -> None:
    """Say before the work what an output will lack that loaders need and SFT has, and how to copy it.

    Args:
        sft: SFT.
        dpo: DPO.
        names: The side files of the output.
        output: Where it is written.
    """
    of_sft = [file.name for file in _entries(sft.path) if file.is_file()]
    target = output if dpo.hub_id else dpo.path
    if CONFIG_FILE in of_sft and CONFIG_FILE not in names:
        copy = _copy_command([CONFIG_FILE], sft.path, target)
        log.warning("%s has no config.json: the output will have none; to use SFT's, if it fits: %s", dpo.label, copy)
    if _has_vocabulary(of_sft) and not _has_vocabulary(names):
        files = [name for name in of_sft if _matches(name, (*TOKENIZERS, *TEMPLATES))]
        copy = _copy_command(files, sft.path, target)
        log.warning(
            "%s has no tokenizer (tokenizer.json or tokenizer.model): the output will have none; to use SFT's: %s",
            dpo.label,
            copy,
        )


def _has_vocabulary(names: Iterable[str]) -> bool:
    return any(_matches(name, VOCABULARIES) for name in names)


def _copy_command(names: Sequence[str], folder: Path, target: Path) -> str:
    return shlex.join(["cp", *(str(folder / name) for name in names), f"{target}/"])
