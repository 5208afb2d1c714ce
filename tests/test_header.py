"""Headers: what is accepted reads as the safetensors library reads it; what is damaged is refused by name."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import entry, raw_safetensors
from hypothesis import given, settings, strategies as st
from safetensors import SafetensorError, deserialize, safe_open

from expo.checkpoint.dtypes import DTYPES
from expo.checkpoint.header import MAX_HEADER_BYTES, read_shard
from expo.errors import InputError

F32 = entry("F32", [2], 0, 8)
EIGHT = bytes(8)


def test_white_space_around_the_header_is_fine(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": F32}).encode() + b"   \n "
    file = raw_safetensors(tmp_path / "model.safetensors", header, EIGHT)
    shard = read_shard(file)
    assert shard.header == file.read_bytes()[:-8]
    assert shard.metadata == {"format": "pt"}
    assert [tensor.start for tensor in shard.tensors] == [8 + len(header)]


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = {"late": entry("F32", [1], 4, 8), "empty": entry("F32", [0], 4, 4), "early": entry("F32", [1], 0, 4)}
    shard = read_shard(raw_safetensors(tmp_path / "x.safetensors", header, EIGHT))
    assert [tensor.name for tensor in shard.tensors] == ["early", "empty", "late"]


DAMAGED = {
    "an empty file": (b"", "truncated"),
    "seven bytes": (b"\0" * 7, "truncated"),
    "a header longer than the file": ((100).to_bytes(8, "little") + b"{}", "truncated"),
    "a header longer than the format allows": (
        (1 << 40).to_bytes(8, "little") + b"{}",
        "a header of 1099511627776 bytes",
    ),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-lfs pointer"),
    "a web page": (b"<!DOCTYPE html><html><body>403</body></html>", "web page"),
    "an indented web page": (b"\n <html><body>403</body></html>", "web page"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_files_that_are_no_safetensors(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_shard(file)
    assert str(file) in str(caught.value)


BAD_HEADERS = {
    "no JSON": (b"{", EIGHT, "damaged header"),
    "not UTF-8": (b'{"\xff": 1}', EIGHT, "damaged header"),
    "no object": ([], EIGHT, "not a JSON object"),
    "nested too deeply": (b"[" * 100_000, EIGHT, "damaged header"),
    "a duplicate key": (b'{"a":%s,"a":%s}' % ((json.dumps(F32).encode(),) * 2), EIGHT, "'a' appears twice"),
    "metadata that is no text": ({"__metadata__": {"a": 1}, "a": F32}, EIGHT, "__metadata__"),
    "an entry that is no object": ({"a": 3}, EIGHT, "'a' is not an object"),
    "an unknown dtype": ({"a": entry("F31", [2], 0, 8)}, EIGHT, "unknown dtype 'F31'"),
    "a negative size": ({"a": entry("F32", [-2], 0, 8)}, EIGHT, "'-2' is not a valid size"),
    "a shape that is no list": ({"a": {**F32, "shape": 2}}, EIGHT, "no valid shape"),
    "true for a size": ({"a": {**F32, "shape": [True, 2]}}, EIGHT, "no valid shape"),
    "three offsets": ({"a": {**F32, "data_offsets": [0, 4, 8]}}, EIGHT, "no valid data_offsets"),
    "a shape its bytes do not hold": ({"a": entry("F32", [3], 0, 8)}, EIGHT, "does not fill its 8 bytes"),
    "an end before the begin": ({"a": entry("F32", [2], 8, 0)}, EIGHT, "does not fill its -8 bytes"),
    "an overflowing shape": ({"a": entry("F32", [2**40, 2**40], 0, 8)}, EIGHT, "does not fill"),
    "overlapping tensors": ({"a": F32, "b": entry("F32", [2], 4, 12)}, bytes(12), "'b' overlaps another tensor"),
    "one range for two": ({"a": F32, "b": F32}, EIGHT, "overlaps another tensor"),
    "a hole": ({"a": F32, "b": entry("F32", [1], 12, 16)}, bytes(16), "'b' leaves a hole before it"),
    "a hole at the start": ({"a": entry("F32", [1], 4, 8)}, EIGHT, "leaves a hole"),
    "missing bytes": ({"a": F32}, bytes(7), "truncated"),
    "trailing bytes": ({"a": F32}, bytes(9), "1 bytes after its last tensor"),
}


@pytest.mark.parametrize(("header", "data", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_damaged_headers(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    file = raw_safetensors(tmp_path / "model.safetensors", header, data)
    with pytest.raises(InputError, match=message) as caught:
        read_shard(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", [case for case in BAD_HEADERS if case != "a duplicate key"])
def test_safetensors_refuses_them_too(tmp_path: Path, case: str) -> None:
    """All but duplicate keys, of which it takes the last: the table above holds no fantasies."""
    header, data, _ = BAD_HEADERS[case]
    file = raw_safetensors(tmp_path / "model.safetensors", header, data)
    with pytest.raises(SafetensorError), safe_open(file, "pt"):
        pass


def test_every_dtype_the_library_knows_is_known(tmp_path: Path) -> None:
    for dtype, (bits, *_) in DTYPES.items():
        file = raw_safetensors(tmp_path / "x.safetensors", {"a": entry(dtype, [8], 0, bits)}, bytes(bits))
        with safe_open(file, "np"):
            assert read_shard(file).tensors[0].nbytes == bits


def test_the_longest_header(tmp_path: Path) -> None:
    text = json.dumps({"a": F32}).encode()
    file = raw_safetensors(tmp_path / "x.safetensors", text + b" " * (MAX_HEADER_BYTES - len(text)), EIGHT)
    assert len(read_shard(file).header) == 8 + MAX_HEADER_BYTES
    with safe_open(file, "np") as opened:
        assert list(opened.keys()) == ["a"]


# --- any checkpoint --------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(
    lambda name: ".." not in name and not name.startswith(("/", "\\")) and name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 4), max_size=4)
WHOLE_DTYPES = st.sampled_from([dtype for dtype, kind in DTYPES.items() if kind.bits % 8 == 0])
TENSORS = st.dictionaries(NAMES, st.tuples(WHOLE_DTYPES, SHAPES), min_size=1, max_size=6)
WHITE = st.text(" \t\r\n", max_size=9)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A safetensors file as any writer might make it: tensors in any order, metadata, padding, escapes."""
    tensors, random = draw(TENSORS), draw(st.randoms(use_true_random=False))
    entries, end = {}, 0
    for name in random.sample(list(tensors), len(tensors)):
        dtype, shape = tensors[name]
        begin, end = end, end + int(np.prod(shape, dtype=int)) * DTYPES[dtype].bits // 8
        entries[name] = dict(random.sample(list(entry(dtype, shape, begin, end).items()), 3))
    listed: dict[str, object] = {name: entries[name] for name in tensors}
    metadata = draw(st.none() | st.dictionaries(NAMES, NAMES, max_size=3))
    listed |= {"__metadata__": metadata} if draw(st.booleans()) else {}
    text = json.dumps(listed, ensure_ascii=draw(st.booleans()), indent=draw(st.none() | st.integers(0, 2)))
    header = (draw(WHITE) + text + draw(WHITE)).encode()
    return len(header).to_bytes(8, "little") + header + random.randbytes(end)


@given(content=files())
@settings(max_examples=150, deadline=None)
def test_any_file_is_read_as_the_library_reads_it(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        file.write_bytes(content)
        shard = read_shard(file)
    expected = dict(deserialize(content))
    assert shard.nbytes == len(content)
    assert [tensor.start for tensor in shard.tensors] == sorted(tensor.start for tensor in shard.tensors)
    assert {tensor.name for tensor in shard.tensors} == expected.keys()
    for tensor in shard.tensors:
        theirs = expected[tensor.name]
        assert (tensor.dtype, list(tensor.shape)) == (theirs["dtype"], theirs["shape"])
        assert content[tensor.start : tensor.start + tensor.nbytes] == bytes(theirs["data"])


@given(content=files(), where=st.floats(0, 1, exclude_max=True), new=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_damaged_file_is_refused_where_the_library_refuses_it(
    content: bytes, where: float, new: int, cut: bool
) -> None:
    position = int(where * len(content))
    damaged = content[:position] if cut else content[:position] + bytes([new]) + content[position + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        file.write_bytes(damaged)
        try:
            read_shard(file)
        except InputError:
            return
    deserialize(damaged)
