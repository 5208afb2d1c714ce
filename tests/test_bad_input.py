"""Bad input to `expo extrapolate`: what goes in → what it says and the exit code.

One table for all that is refused: always one line, nothing on stdout, nothing written, inputs untouched. A second
table for what looks odd and is right, a third for what is done with a warning.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import (
    Pair,
    Result,
    as_bytes,
    entry,
    raw_safetensors,
    read_checkpoint_tensors,
    write,
    write_checkpoint,
)

USAGE, ENVIRONMENT = 2, 1
SFT, DPO, OUT = "{root}/sft", "{root}/dpo", "{root}/out"
GOOD = ("--alpha", "0.5", "--output", OUT)
SECRET = "hf_" + "Secret0123" * 4
BF16 = entry("BF16", [8], 0, 16)
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
PAGE = "<!DOCTYPE html><html><head><title>403</title></head></html>"


class Bad(NamedTuple):
    """One row: the message (a part of it), what to do to a good pair, the words after the pair, the exit code."""

    message: str
    make: Callable[[Path], object] | None = None
    args: tuple[str, ...] = GOOD
    code: int = USAGE


# --- what is done to a good pair: `root` holds sft (one file) and dpo (two shards and an index) ----------------------


def header(root: Path, content: object, data: bytes = bytes(16), length: int | None = None) -> None:
    """Replace SFT's weights by a file with this header."""
    raw_safetensors(root / "sft/model.safetensors", content, data, length=length)


def tensor(**fields: object) -> dict[str, object]:
    """A header with one tensor, right but for these fields."""
    return {"norm": {**BF16, **fields}}


def named(name: str) -> bytes:
    """A header with one tensor of this name, which JSON may spell with escapes."""
    return b'{"%s":%s}' % (name.encode(), json.dumps(BF16).encode())


def put(file: Path, content: str | bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def weights(root: Path, content: str | bytes) -> None:
    put(root / "sft/model.safetensors", content)


def instead(file: Path, make: Callable[[Path], object]) -> None:
    file.unlink()
    make(file)


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Rewrite a checkpoint as one file with other tensors; None removes one."""
    content = {name: value for name, value in read_checkpoint_tensors(folder).items() if name not in tensors}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    write_checkpoint(folder, content | {name: value for name, value in tensors.items() if value is not None})


def index(root: Path, **changes: object) -> None:
    """Change DPO's index."""
    file = root / "dpo/model.safetensors.index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def reindex(root: Path, name: str, shard: object) -> None:
    content = json.loads((root / "dpo/model.safetensors.index.json").read_text())
    index(root, weight_map={**content["weight_map"], name: shard})


def nan_in(folder: Path) -> None:
    tensors = read_checkpoint_tensors(folder)
    tensors["norm"][2] = float("nan")
    write_checkpoint(folder, tensors)


def tokens(root: Path, sft: object, dpo: object) -> None:
    for side, vocabulary in (("sft", sft), ("dpo", dpo)):
        (root / side / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))


def same_weights(root: Path, copy: Callable[..., object]) -> None:
    shutil.rmtree(root / "sft")
    copy(root / "dpo", root / "sft")


def output(root: Path, **files: str) -> None:
    (root / "out").mkdir()
    for name, text in files.items():
        (root / "out" / name.replace("_", ".")).write_text(text)


def config_file(root: Path, text: str) -> None:
    (root / "expo.toml").write_text(text)


CONFIG = (*GOOD, "--config", "{root}/expo.toml")

REFUSED: dict[str, Bad] = {
    # --- usage
    "SFT is missing": Bad("no such directory: {root}/none", args=("--sft", "{root}/none", *GOOD)),
    "DPO is missing": Bad("no such directory: ./none/x/y", args=("--dpo", "./none/x/y", *GOOD)),
    "no such hub id": Bad("nobody/nothing is neither a local directory nor", args=("--dpo", "nobody/nothing", *GOOD)),
    "a token in a URL": Bad(
        "no such directory: https://…@hub/a/b", args=("--sft", f"https://me:{SECRET}@hub/a/b", *GOOD)
    ),
    "SFT is a file": Bad("is a file; give the checkpoint's directory", args=("--sft", "{root}/sft/config.json", *GOOD)),
    "a name with a newline": Bad("no such directory: a\\nb/c/d", args=("--sft", "a\nb/c/d", *GOOD)),
    "a name that is not UTF-8": Bad("--output 'o\\udcff' is not UTF-8", args=("--alpha", "1", "--output", "o\udcff")),
    "no alpha": Bad("--alpha is missing: give at least one, such as --alpha 0.3", args=("--output", OUT)),
    "alpha is nan": Bad("--alpha must be a finite number, not nan", args=("--alpha", "nan", "--output", OUT)),
    "alpha is inf": Bad("finite number, not inf", args=("--alpha", "0.1", "--alpha", "inf", "--output", OUT)),
    "alpha is infinite in float32": Bad("--alpha 1e+39 exceeds the range of float32", args=("--alpha", "1e39")),
    "alpha is no number": Bad("Invalid value for '--alpha'", args=("--alpha", "half", "--output", OUT)),
    "alpha twice": Bad(
        "--alpha 0.1 is given more than once", args=("--alpha", "0.1", "--alpha", "0.10", "--output", OUT)
    ),
    "an unknown dtype": Bad("'int8' is not one of", args=(*GOOD, "--dtype", "int8")),
    "an unknown device": Bad("--device must be auto, cpu, cuda or cuda:N, not 'tpu'", args=(*GOOD, "--device", "tpu")),
    "no workers": Bad("--workers must be positive, not 0", args=(*GOOD, "--workers", "0")),
    "an unknown option": Bad("No such option: --alhpa", args=(*GOOD, "--alhpa", "1")),
    "a bad regex": Bad("--exclude '(' is not a regular expression", args=(*GOOD, "--exclude", "(")),
    "exclude matches nothing": Bad("--exclude 'lm_head' matches no tensor", args=(*GOOD, "--exclude", "lm_head")),
    "no config file": Bad("the config file {root}/expo.toml cannot be read", args=CONFIG),
    "no TOML": Bad("is not valid TOML", lambda root: config_file(root, "="), CONFIG),
    "an unknown key": Bad(
        "unknown key 'alhpa' in [extrapolate]; did you mean 'alpha'?",
        lambda root: config_file(root, "[extrapolate]\nalhpa = [0.3]\n"),
        CONFIG,
    ),
    "an unknown table": Bad(
        "unknown table [extrapolat]; did you mean 'extrapolate'?",
        lambda root: config_file(root, "[extrapolat]\nalpha = [0.3]\n"),
        CONFIG,
    ),
    "an unknown recipe": Bad("no recipe 'gpt-5'; `expo recipes` lists them", args=(*GOOD, "--recipe", "gpt-5")),
    # --- the output
    "output holds other files": Bad(
        "contains files expo did not write (mine.txt)", lambda root: output(root, mine_txt="x")
    ),
    "output holds another's expo.json": Bad(
        "contains files expo did not write (expo.json)", lambda root: output(root, expo_json='{"files": 5}')
    ),
    "output holds a broken expo.json": Bad(
        "out/expo.json is not valid JSON", lambda root: output(root, expo_json="{"), ("--overwrite", *GOOD)
    ),
    "output is a file": Bad("out is a file; choose another --output", lambda root: (root / "out").write_text("x")),
    "output is SFT": Bad("the output {root}/sft is the input {root}/sft or", args=("--alpha", "1", "--output", SFT)),
    "output is DPO, overwriting": Bad(
        "is the input {root}/dpo or lies inside it", args=("--alpha", "1", "--output", DPO, "--overwrite")
    ),
    "output is inside DPO": Bad(
        "is the input {root}/dpo or lies inside it", args=("--alpha", "1", "--output", f"{DPO}/new/out")
    ),
    "output is inside by ..": Bad(
        "is the input {root}/dpo or lies inside it", args=("--alpha", "1", "--output", "{root}/x/../dpo/out")
    ),
    "output is inside by a link": Bad(
        "is the input {root}/dpo or lies inside it",
        lambda root: (root / "link").symlink_to(root / "dpo"),
        ("--alpha", "1", "--output", "{root}/link/out"),
    ),
    "one of several outputs is inside": Bad(
        "the output {root}/many-0.2 is the input {root}/sft or lies inside it",
        lambda root: (root / "many-0.2").symlink_to(root / "sft"),
        ("--alpha", "0.1", "--alpha", "0.2", "--output", "{root}/many-{{alpha}}"),
    ),
    "output is below a file": Bad(
        "cannot write to {root}/file/out: Not a directory",
        lambda root: (root / "file").touch(),
        ("--alpha", "1", "--output", "{root}/file/out"),
        ENVIRONMENT,
    ),
    "not enough disk": Bad(
        "/proc has 0 bytes free, but",
        args=("--alpha", "1", "--output", "/proc/expo"),
        code=ENVIRONMENT,
    ),
    # --- folders
    "SFT holds nothing": Bad("no safetensors weights", lambda root: (root / "e").mkdir(), ("--sft", "{root}/e", *GOOD)),
    "only .bin": Bad(
        "has only .bin weights",
        lambda root: (root / "sft/model.safetensors").rename(root / "sft/pytorch_model.bin"),
    ),
    "only an adapter": Bad(
        "contains 'adapter_model.safetensors' but neither model.safetensors nor",
        lambda root: (root / "sft/model.safetensors").rename(root / "sft/adapter_model.safetensors"),
    ),
    "an unfinished output for input": Bad(
        "sft is an unfinished output of expo", lambda root: (root / "sft/.expo-partial").mkdir()
    ),
    "a dangling link": Bad(
        "sft/model.safetensors cannot be read: No such file or directory",
        lambda root: instead(root / "sft/model.safetensors", lambda file: file.symlink_to("gone")),
    ),
    "a loop of links": Bad(
        "sft/model.safetensors cannot be read: Too many levels of symbolic links",
        lambda root: instead(root / "sft/model.safetensors", lambda file: file.symlink_to(file.name)),
    ),
    "a folder for a shard": Bad(
        "sft/model.safetensors is a folder, not a file",
        lambda root: instead(root / "sft/model.safetensors", Path.mkdir),
    ),
    "a pipe for a shard": Bad(
        "sft/model.safetensors is a pipe, not a file",
        lambda root: instead(root / "sft/model.safetensors", os.mkfifo),
    ),
    "a socket for a shard": Bad(
        "sft/model.safetensors is a socket, not a file",
        lambda root: instead(root / "sft/model.safetensors", lambda file: os.mknod(file, stat.S_IFSOCK | 0o600)),
    ),
    "an endless device for a shard": Bad(
        "sft/model.safetensors is a device, not a file",
        lambda root: instead(root / "sft/model.safetensors", lambda file: file.symlink_to("/dev/zero")),
    ),
    "a pipe for the index": Bad(
        "dpo/model.safetensors.index.json is a pipe, not a file",
        lambda root: instead(root / "dpo/model.safetensors.index.json", os.mkfifo),
    ),
    "a dangling link for the index": Bad(
        "dpo/model.safetensors.index.json cannot be read",
        lambda root: instead(root / "dpo/model.safetensors.index.json", lambda file: file.symlink_to("gone")),
    ),
    "a pipe for config.json": Bad(
        "dpo/config.json is a pipe, not a file", lambda root: instead(root / "dpo/config.json", os.mkfifo)
    ),
    "an endless device for config.json": Bad(
        "dpo/config.json is a device, not a file",
        lambda root: instead(root / "dpo/config.json", lambda file: file.symlink_to("/dev/zero")),
    ),
    "a side file that is not there": Bad(
        "dpo/merges.txt cannot be read: No such file or directory",
        lambda root: (root / "dpo/merges.txt").symlink_to("gone"),
    ),
    "a side file that is a git-lfs pointer": Bad(
        "dpo/tokenizer.model is a git-lfs pointer: run `git lfs pull`",
        lambda root: put(root / "dpo/tokenizer.model", LFS),
    ),
    "a side file with a name that is not UTF-8": Bad(
        "is not UTF-8; rename it", lambda root: Path(f"{root}/dpo/caf\udce9.txt").write_text("x")
    ),
    # --- config.json
    "a config that is no JSON": Bad(
        "dpo/config.json is not valid JSON", lambda root: put(root / "dpo/config.json", "{")
    ),
    "a config that is no object": Bad(
        "dpo/config.json does not contain a JSON object", lambda root: put(root / "dpo/config.json", "[1]")
    ),
    "a config that is not UTF-8": Bad(
        "dpo/config.json is not valid JSON: 'utf-8' codec", lambda root: put(root / "dpo/config.json", b'{"a": "\xff"}')
    ),
    "a config that is a web page": Bad(
        "dpo/config.json is a web page", lambda root: put(root / "dpo/config.json", PAGE)
    ),
    "a config nested too deeply": Bad(
        "dpo/config.json is not valid JSON: maximum recursion",
        lambda root: put(root / "dpo/config.json", '{"a":' + "[" * 100_000),
    ),
    "a huge config": Bad(
        "dpo/config.json has 1000000000000 bytes, more than any such file",
        lambda root: os.truncate(root / "dpo/config.json", 10**12),
    ),
    "a huge number in a config": Bad(
        "dpo/config.json is not valid JSON: Exceeds the limit",
        lambda root: put(root / "dpo/config.json", '{"a": ' + "9" * 5000 + "}"),
    ),
    "a quantized checkpoint": Bad(
        "dpo is quantized (awq)",
        lambda root: put(root / "dpo/config.json", '{"quantization_config": {"quant_method": "awq"}}'),
    ),
    # --- files that are no weights
    "a git-lfs pointer": Bad("is not weights but a git-lfs pointer: run `git lfs", lambda root: weights(root, LFS)),
    "a web page": Bad("is not weights but a web page: download it again", lambda root: weights(root, PAGE)),
    "an indented web page": Bad("is not weights but a web page", lambda root: weights(root, "\n" * 20 + PAGE)),
    "an error in JSON": Bad("begins with b'{{\"error\"'", lambda root: weights(root, '{"error": "Not found"}')),
    "a zip archive": Bad("begins with b'PK\\x03\\x04", lambda root: weights(root, b"PK\3\4" + b"pytorch_model")),
    "an empty file": Bad("is truncated: 0 bytes", lambda root: weights(root, "")),
    "seven bytes": Bad("is truncated: 7 bytes", lambda root: weights(root, bytes(7))),
    # --- a header's length
    "a header longer than the format allows": Bad(
        "one with a header of 100000001 bytes", lambda root: header(root, tensor(), length=100_000_001)
    ),
    "a header length of 2**64 − 1": Bad(
        "one with a header of 18446744073709551615 bytes", lambda root: header(root, tensor(), length=2**64 - 1)
    ),
    "a header longer than its file": Bad(
        "its header claims 90000000 bytes", lambda root: header(root, tensor(), length=90_000_000)
    ),
    "a header and nothing else": Bad("is truncated", lambda root: weights(root, b"<" + bytes(7))),
    "no header": Bad("damaged header: Expecting value", lambda root: header(root, b"", b"")),
    # --- a header's JSON
    "a header that is no JSON": Bad("damaged header: Expecting", lambda root: header(root, b"{")),
    "a header that is not UTF-8": Bad("damaged header: 'utf-8' codec", lambda root: header(root, b"\xff")),
    "a header with a byte order mark": Bad(
        "damaged header: Unexpected UTF-8 BOM", lambda root: header(root, b"\xef\xbb\xbf" + named("norm"))
    ),
    "a header that is no object": Bad("damaged header: it is not a JSON object", lambda root: header(root, [])),
    "a header nested too deeply": Bad("maximum recursion", lambda root: header(root, b"[" * 100_000)),
    "zeros behind the header": Bad("damaged header: Extra data", lambda root: header(root, named("norm") + bytes(4))),
    "NaN in the header": Bad("'NaN' is not a valid size", lambda root: header(root, b'{"norm":{"shape":[NaN]}}')),
    "infinity in the header": Bad(
        "'-Infinity' is not a valid size", lambda root: header(root, b'{"norm":[-Infinity]}')
    ),
    "a size of a million digits": Bad(
        "9999… is not a valid size", lambda root: header(root, b'{"norm":[%s]}' % (b"9" * 10**6))
    ),
    "a size of 2**64": Bad(
        "'18446744073709551616' is not a valid size", lambda root: header(root, tensor(shape=[2**64]))
    ),
    "a negative size": Bad("'-8' is not a valid size", lambda root: header(root, tensor(shape=[-8]))),
    "minus zero for a size": Bad("'-0' is not a valid size", lambda root: header(root, b'{"norm":{"shape":[-0]}}')),
    "a size with a point": Bad("'8.0' is not a valid size", lambda root: header(root, tensor(shape=[8.0]))),
    "a size with an exponent": Bad("'8e0' is not a valid size", lambda root: header(root, b'{"norm":{"shape":[8e0]}}')),
    "true for a size": Bad("has no valid shape", lambda root: header(root, tensor(shape=[True, 8]))),
    "a text for a size": Bad("has no valid shape", lambda root: header(root, tensor(shape=["8"]))),
    "no shape": Bad("has no valid shape", lambda root: header(root, tensor(shape=None))),
    "a shape that is no list": Bad("has no valid shape", lambda root: header(root, tensor(shape=8))),
    "three offsets": Bad("has no valid data_offsets", lambda root: header(root, tensor(data_offsets=[0, 8, 16]))),
    "false for an offset": Bad("no valid data_offsets", lambda root: header(root, tensor(data_offsets=[False, 16]))),
    "no offsets": Bad("has no valid data_offsets", lambda root: header(root, tensor(data_offsets=None))),
    "a dtype nobody knows": Bad("has the unknown dtype 'BF17'", lambda root: header(root, tensor(dtype="BF17"))),
    "a dtype that is no text": Bad(
        "unknown dtype {{'BF16': None}}", lambda root: header(root, tensor(dtype={"BF16": None}))
    ),
    "an unknown field": Bad("has the unknown field 'scale'", lambda root: header(root, tensor(scale=1))),
    "an entry that is no object": Bad(
        "'norm' is not an object", lambda root: header(root, {"norm": ["BF16", [8], [0, 16]]})
    ),
    "metadata that is no text": Bad(
        "__metadata__ does not map text to text", lambda root: header(root, {"__metadata__": {"step": 3}, "norm": BF16})
    ),
    "metadata that is no object": Bad(
        "__metadata__ does not map", lambda root: header(root, {"__metadata__": "pt", "norm": BF16})
    ),
    "metadata that cannot be written": Bad(
        "__metadata__ does not map", lambda root: header(root, {"__metadata__": {"a": "\ud800"}, "norm": BF16})
    ),
    "duplicate tensors": Bad(
        "'norm' appears twice",
        lambda root: header(root, b'{"norm":%s,"norm":%s}' % ((json.dumps(BF16).encode(),) * 2)),
    ),
    "duplicate tensors, one spelled with an escape": Bad(
        "'norm' appears twice",
        lambda root: header(root, b'{"norm":%s,"n\\u006frm":%s}' % ((json.dumps(BF16).encode(),) * 2)),
    ),
    "duplicate fields": Bad(
        "'dtype' appears twice", lambda root: header(root, b'{"norm":{"dtype":"BF16","dtype":"F16"}}')
    ),
    "a hundred thousand duplicates": Bad(
        "'t99999' appears twice",
        lambda root: header(root, json.dumps({f"t{i}": 0 for i in range(100_000)}).encode()[:-1] + b',"t99999":0}'),
    ),
    "no tensors": Bad("sft contains no tensors", lambda root: header(root, {}, b"")),
    "a tensor called ../../etc/x": Bad(
        "the name '../../etc/x' is a path that leaves its folder", lambda root: header(root, named("../../etc/x"))
    ),
    "a tensor called /etc/x": Bad("name '/etc/x' is a path that leaves", lambda root: header(root, named("/etc/x"))),
    "a tensor called ..\\x": Bad("name '..\\\\x' is a path that leaves", lambda root: header(root, named("..\\\\x"))),
    "a tensor without a name": Bad("the name '' is empty", lambda root: header(root, named(""))),
    "a tensor's name with a newline": Bad(
        "the name 'a\\nb' contains control characters", lambda root: header(root, named("a\\nb"))
    ),
    "a tensor's name with a zero": Bad(
        "the name 'a\\x00' contains control", lambda root: header(root, named("a\\u0000"))
    ),
    "a tensor's name that writes to the terminal": Bad(
        "the name '\\x1b[2J' contains control characters", lambda root: header(root, named("\\u001b[2J"))
    ),
    "a tensor's name that is half a letter": Bad(
        "the name '\\ud800' cannot be written as UTF-8", lambda root: header(root, named("\\ud800"))
    ),
    "a tensor's name of a million letters": Bad(
        "tensor 'xxxxx", lambda root: header(root, {"x" * 10**6: {**BF16, "dtype": "X"}})
    ),
    # --- a header's layout
    "a shape its bytes do not hold": Bad(
        "'norm': BF16 [9] does not fill its 16 bytes", lambda root: header(root, tensor(shape=[9]))
    ),
    "an end before the begin": Bad(
        "does not fill its -16 bytes", lambda root: header(root, tensor(data_offsets=[16, 0]))
    ),
    "a number of elements that overflows": Bad(
        "does not fill its 16 bytes", lambda root: header(root, tensor(shape=[2, 2**64 - 2]))
    ),
    "a number of bytes that overflows": Bad(
        "does not fill its 16 bytes", lambda root: header(root, tensor(shape=[2, 2**63 - 1]))
    ),
    "an overflow that a zero hides": Bad(
        "does not fill its 0 bytes",
        lambda root: header(root, tensor(shape=[2**40, 2**40, 0], data_offsets=[0, 0]), b""),
    ),
    "half a byte": Bad(
        "F4 [1] does not fill its 1 bytes", lambda root: header(root, {"norm": entry("F4", [1], 0, 1)}, b"1")
    ),
    "overlapping tensors": Bad(
        "tensor 'b' overlaps another tensor",
        lambda root: header(root, {"a": BF16, "b": entry("BF16", [8], 8, 24)}, bytes(24)),
    ),
    "ten tensors in one place": Bad(
        "overlaps another tensor", lambda root: header(root, {f"weight_{i}": BF16 for i in range(10)})
    ),
    "a hole": Bad(
        "'b' leaves a hole", lambda root: header(root, {"a": BF16, "b": entry("BF16", [1], 18, 20)}, bytes(20))
    ),
    "a hole at the start": Bad("leaves a hole", lambda root: header(root, tensor(shape=[4], data_offsets=[8, 16]))),
    "a truncated shard": Bad(
        "model.safetensors is truncated",
        lambda root: os.truncate(root / "sft/model.safetensors", (root / "sft/model.safetensors").stat().st_size - 1),
    ),
    "trailing bytes": Bad("16 bytes after its last tensor", lambda root: header(root, tensor(), bytes(32))),
    # --- the index
    "an index that is no JSON": Bad(
        "index.json is not valid JSON", lambda root: put(root / "dpo/model.safetensors.index.json", "{")
    ),
    "an index that is a git-lfs pointer": Bad(
        "index.json is a git-lfs pointer", lambda root: put(root / "dpo/model.safetensors.index.json", LFS)
    ),
    "an index without a weight_map": Bad("has no weight_map", lambda root: index(root, weight_map=None)),
    "an index with an empty weight_map": Bad("has no weight_map", lambda root: index(root, weight_map={})),
    "an index that maps to numbers": Bad("has no weight_map", lambda root: index(root, weight_map={"norm": 1})),
    "an index that names a tensor twice": Bad(
        "'norm' appears twice",
        lambda root: put(
            root / "dpo/model.safetensors.index.json",
            '{"weight_map": {"norm": "a.safetensors", "norm": "b.safetensors"}}',
        ),
    ),
    "the index names a missing shard": Bad(
        "names gone.safetensors, which is missing", lambda root: reindex(root, "norm", "gone.safetensors")
    ),
    "the index names ../x": Bad(
        "names '../sft/model.safetensors', which is not a safetensors file in the same folder",
        lambda root: reindex(root, "norm", "../sft/model.safetensors"),
    ),
    "the index names an absolute path": Bad(
        "which is not a safetensors file in the same folder",
        lambda root: reindex(root, "norm", str(root / "sft/model.safetensors")),
    ),
    "the index names a file of another kind": Bad(
        "names 'config.json', which is not a safetensors file", lambda root: reindex(root, "norm", "config.json")
    ),
    "the index names a shard with a zero": Bad(
        "names 'a\\x00.safetensors', which is not", lambda root: reindex(root, "norm", "a\0.safetensors")
    ),
    "the index names a shard no file system has": Bad(
        "which is missing; download it again", lambda root: reindex(root, "norm", "x" * 300 + ".safetensors")
    ),
    "the index names a tensor its shard lacks": Bad(
        "says tensor 'extra' is in model-00001-of-00002.safetensors, but it is not",
        lambda root: reindex(root, "extra", "model-00001-of-00002.safetensors"),
    ),
    "a tensor in two shards": Bad(
        "tensor 'norm' is in more than one shard",
        lambda root: raw_safetensors(root / "dpo/model-00002-of-00002.safetensors", {"norm": BF16}, bytes(16)),
    ),
    "model.safetensors beside an index": Bad(
        "has both model.safetensors and model.safetensors.index.json, and the index does not list it",
        lambda root: shutil.copy(root / "sft/model.safetensors", root / "dpo"),
    ),
    # --- the pair
    "SFT lacks a tensor": Bad("missing in SFT", lambda root: change(root / "sft", norm=None)),
    "DPO lacks a tensor": Bad(
        "missing in DPO (--missing copy-dpo goes on without them): norm", lambda root: change(root / "dpo", norm=None)
    ),
    "shapes differ": Bad("norm [9] ≠ [8]", lambda root: change(root / "sft", norm=torch.zeros(9))),
    "shapes that would broadcast": Bad("norm [1] ≠ [8]", lambda root: change(root / "sft", norm=torch.zeros(1))),
    "a scalar that would broadcast": Bad("norm [] ≠ [8]", lambda root: change(root / "sft", norm=torch.zeros(()))),
    "as many elements in another shape": Bad(
        "norm [2, 4] ≠ [8]", lambda root: change(root / "sft", norm=torch.zeros(2, 4))
    ),
    "integers on one side": Bad("norm I64, BF16", lambda root: change(root / "sft", norm=torch.zeros(8).long())),
    "integers that differ": Bad(
        "the I64 tensor ids differs between SFT and DPO",
        lambda root: [change(root / side, ids=torch.arange(3) + i) for i, side in enumerate(("sft", "dpo"))],
    ),
    "one folder twice": Bad("are the same files; every θ(α) would be DPO", args=("--sft", DPO, *GOOD)),
    "one folder by two names": Bad(
        "are the same files", lambda root: same_weights(root, lambda old, new: new.symlink_to(old))
    ),
    "the same weights": Bad("SFT and DPO have the same weights", lambda root: same_weights(root, shutil.copytree)),
    "other numbers for a token": Bad(
        "the token 'b' has id 1 in sft and 2 in dpo (and 1 more tokens differ)",
        lambda root: tokens(root, {"a": 0, "b": 1, "c": 2}, {"a": 0, "c": 1, "b": 2}),
    ),
    # --- values
    "NaN in SFT": Bad("the result for tensor norm contains NaN or infinity", lambda root: nan_in(root / "sft")),
    "overflow": Bad("too large for F16", args=("--alpha", "1e30", "--dtype", "float16", "--output", OUT)),
    "overflow without another dtype": Bad(
        "too large for BF16",
        lambda root: change(root / "sft", norm=torch.full((8,), 1e10).bfloat16()),
        ("--alpha", "3e38", "--output", OUT),
    ),
}


@pytest.mark.timeout(60)  # a pipe must not be waited for
@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused(
    case: str, pair: Pair, tmp_path: Path, expo: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = REFUSED[case]
    if row.make is not None:
        row.make(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = state(tmp_path)
    result = expo(pair, *[arg.format(root=tmp_path) for arg in row.args])
    assert (result.code, result.stdout) == (row.code, "")
    assert row.message.format(root=tmp_path) in result.stderr
    assert result.stderr.startswith("expo: error: ")
    assert len(result.stderr.splitlines()) == 1, "one line"
    assert len(result.stderr) < 600
    assert SECRET not in result.stderr
    assert state(tmp_path) == before, "nothing is written"


def state(root: Path) -> list[tuple[object, ...]]:
    """Every entry below a folder, with content and times."""
    found = []
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        small = stat.S_ISREG(status.st_mode) and status.st_size < 1 << 20
        times = () if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_mtime_ns)
        found.append((path, status.st_mode, *times, path.read_bytes() if small else b""))
    return found


# --- odd and right ----------------------------------------------------------------------------------------------------


def padded(root: Path, before: bytes, behind: bytes) -> None:
    """White space around the header of SFT's weights."""
    file = root / "sft/model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    raw_safetensors(file, before + content[8 : 8 + length].rstrip() + behind, content[8 + length :])


ACCEPTED: dict[str, Callable[[Path], object]] = {
    "white space before the header": lambda root: padded(root, b" \n\t\r", b""),
    "white space behind the header": lambda root: padded(root, b"", b"\r \t\n"),
    "a header that ends anywhere": lambda root: padded(root, b"", b"   "),
    "a header of 100 MB": lambda root: padded(root, b"", b" " * 99_000_000),
    "metadata null": lambda root: metadata(root, None),
    "no metadata": lambda root: metadata(root, {}),
    "infinity in config.json": lambda root: put(root / "dpo/config.json", '{"time_step_limit": [0.0, Infinity]}'),
    "a key twice in config.json": lambda root: put(root / "dpo/config.json", '{"a": 1, "a": 2}'),
    "half a letter in config.json": lambda root: put(root / "dpo/config.json", '{"a": "\\ud800"}'),
    "no config.json": lambda root: [(root / side / "config.json").unlink() for side in ("sft", "dpo")],
    "an index without metadata": lambda root: index(root, metadata=None),
    "a folder called like a shard": lambda root: (root / "sft/more.safetensors.d").mkdir(),
    "pipes and dangling links that nobody reads": lambda root: [
        os.mkfifo(root / "sft/pipe.json"),
        (root / "sft/notes.txt").symlink_to("gone"),
        (root / "dpo/optimizer.pt").symlink_to("gone"),
        (root / "dpo/.hidden").symlink_to("gone"),
    ],
    "a link to a shard": lambda root: linked(root / "sft/model.safetensors", root / "elsewhere"),
    "a model card that is no YAML": lambda root: put(root / "dpo/README.md", "---\nlicense: [\n---\n"),
    "a model card that is not UTF-8": lambda root: put(root / "dpo/README.md", b"---\nlicense: \xff\n---\n"),
    "a folder for a model card": lambda root: instead(root / "dpo/README.md", Path.mkdir),
    "a tokenizer on one side": lambda root: put(root / "dpo/tokenizer.json", '{"model": {"vocab": {"a": 0}}}'),
    "the same tokenizer in other words": lambda root: [
        put(root / "sft/tokenizer.json", '{"model": {"vocab": {"a": 0, "b": 1}}}'),
        put(root / "dpo/tokenizer.json", '{"model": {"vocab": [["a", 0.5], ["b", 0.1]]}, "decoder": null}'),
    ],
}


def metadata(root: Path, value: object) -> None:
    file = root / "sft/model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    raw_safetensors(file, {**json.loads(content[8 : 8 + length]), "__metadata__": value}, content[8 + length :])


def linked(file: Path, target: Path) -> None:
    file.rename(target)
    file.symlink_to(target)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", ACCEPTED)
def test_it_is_accepted_and_changes_no_weight(
    case: str, pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(pair, tmp_path / "plain")
    ACCEPTED[case](tmp_path)
    write(pair, tmp_path / "out")
    plain, odd = (read_checkpoint_tensors(tmp_path / name) for name in ("plain", "out"))
    assert {name: as_bytes(one) for name, one in odd.items()} == {name: as_bytes(one) for name, one in plain.items()}
    assert caplog.messages == []


def test_scalars_and_tensors_without_elements(tmp_path: Path) -> None:
    sides = [{"scalar": torch.tensor(float(i)), "empty": torch.zeros(0, 3), "last": torch.ones(0)} for i in (1, 2)]
    pair = write_checkpoint(tmp_path / "sft", sides[0]), write_checkpoint(tmp_path / "dpo", sides[1], shards=3)
    write(pair, tmp_path / "out", 0.5)
    new = read_checkpoint_tensors(tmp_path / "out")
    assert new["scalar"].item() == 2.5
    assert (new["empty"].shape, new["last"].shape) == ((0, 3), (0,))


# --- done, with a warning ---------------------------------------------------------------------------------------------

WARNED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a wrong total_size": (
        "index.json says total_size 5, but its tensors (all complete) have 302 bytes",
        lambda root: index(root, metadata={"total_size": 5}),
    ),
    "a total_size that is no number": ("says total_size '5'", lambda root: index(root, metadata={"total_size": "5"})),
    "an index that puts a tensor into another shard": (
        "index.json: lists 1 tensors in the wrong shard ('norm' …): following the shards",
        lambda root: reindex(root, "norm", "model-00002-of-00002.safetensors"),
    ),
    "an index that leaves out a tensor": (
        "index.json: does not list 1 tensors of its shards ('b.weight' …): reading them",
        lambda root: [
            change(root / "dpo"),
            put(
                root / "dpo/model.safetensors.index.json",
                '{"weight_map": {"norm": "model.safetensors", "a.weight": "model.safetensors"}}',
            ),
        ],
    ),
    "a stale shard": (
        "ignoring old-00001-of-00002.safetensors, which is not part of it",
        lambda root: put(root / "dpo/old-00001-of-00002.safetensors", "torn"),
    ),
    "a link to a folder": (
        "dpo/data is a link to a folder; not copied",
        lambda root: (root / "dpo/data").symlink_to("/etc"),
    ),
    "a pipe among the side files": ("dpo/log is a pipe; not copied", lambda root: os.mkfifo(root / "dpo/log")),
    "tokens that only one side has": (
        "1 tokens are in {root}/dpo only ('<pad>' is 1)",
        lambda root: tokens(root, {"a": 0}, {"a": 0, "<pad>": 1}),
    ),
    "other sentencepiece models": (
        "tokenizer.model differs between",
        lambda root: (
            [(root / "dpo/tokenizer.json").unlink()]
            + [put(root / side / "tokenizer.model", side) for side in ("sft", "dpo")]
        ),
    ),
    "a broken tokenizer of SFT": (
        "sft/tokenizer.json is a git-lfs pointer",
        lambda root: put(root / "sft/tokenizer.json", LFS),
    ),
    "an unrelated pair": (
        "‖θ_dpo − θ_sft‖ is 1.0",
        lambda root: change(
            root / "sft", **{name: torch.full_like(t, 9) for name, t in read_checkpoint_tensors(root / "sft").items()}
        ),
    ),
    "a swapped pair, says the card": (
        "sft says it was trained from dpo: are --sft and --dpo swapped?",
        lambda root: put(root / "sft/README.md", "---\nbase_model: someone/dpo\n---\n"),
    ),
    "a swapped pair, says the config": (
        "are --sft and --dpo swapped?",
        lambda root: put(root / "sft/config.json", json.dumps({"_name_or_path": f"{root}/dpo"})),
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", WARNED)
def test_it_is_done_with_a_warning(case: str, pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    message, make = WARNED[case]
    make(tmp_path)
    write(pair, tmp_path / "out")
    assert [message.format(root=tmp_path) in text for text in caplog.messages] == [True]
    assert not (tmp_path / "out/data").exists()
    assert not (tmp_path / "out/log").exists()
