"""Mutated safetensors headers: none may end in a traceback, a hang, or memory that the header's lie asks for.

Takes small, right files and damages them: flipped, cut, doubled and inserted bytes, lengths that lie, and JSON that is
well-formed and wrong (odd sizes, shapes, offsets, types, names, fields, nesting). Each goes through expo's
`read_shard` and through the safetensors library, and their answers are compared:

- whatever the library refuses, expo must refuse;
- what expo accepts must be read as the library reads it;
- what expo refuses and the library accepts is counted by reason.

Every case has a time limit, the process a limit on its address space. Prints a Markdown table; ends in 1 where a law
is broken, with the file that breaks it kept in --keep.

    python benchmarks/fuzz_headers.py --count 100000 --seed 0
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, deserialize

from expo.checkpoint.dtypes import DTYPES
from expo.checkpoint.header import Shard, read_shard
from expo.errors import InputError

CASE_SECONDS = 2.0
MEMORY_BYTES = 1 << 30
"""On top of what the process has when it starts; headers lie of up to 2⁶⁴ bytes."""

SIZES = (0, 1, 2, 3, 7, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -1, 0.5, 1e300)
VALUES = (*SIZES, None, True, False, "", "1", "BF16", [], [1], {}, {"a": 1}, [[]], float("nan"), float("inf"))
NAMES = ("", "a", "../x", "/x", "a\n", "\0", "\ud800", "é", "__metadata__", "x" * 5000, "dtype")
LENGTHS = (0, 1, 7, 8, 2**10, 10**8, 10**8 + 1, 2**31, 2**32, 2**63, 2**64 - 1)
BYTES = (b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\0", b"\xff", b"-", b"9", b"e", b".", b" ", b"\\ud800")

Entries = dict[str, Any]


def right_file(chance: random.Random) -> tuple[Entries, int]:
    """A header's content that is right, and the number of data bytes behind it."""
    entries: Entries = {}
    end = 0
    for number in range(chance.randint(1, 5)):
        dtype = chance.choice([name for name, kind in DTYPES.items() if kind.bits % 8 == 0])
        shape = [chance.randint(0, 3) for _ in range(chance.randint(0, 3))]
        begin, elements = end, 1
        for size in shape:
            elements *= size
        end += elements * DTYPES[dtype].bits // 8
        entries[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    if chance.random() < 0.5:
        entries["__metadata__"] = {"format": "pt"}
    return entries, end


def packed(header: bytes, nbytes: int, length: int | None = None) -> bytes:
    """A file: the header's length, or another one, the header, and zeros for data."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(nbytes)


def as_json(entries: object) -> bytes:
    """A header's text as writers write it."""
    return json.dumps(entries).encode()


# --- mutations: each takes a right file and returns another one ------------------------------------------------------


def flip(chance: random.Random, entries: Entries, nbytes: int) -> bytes:
    """Any bytes become others, the length's too."""
    content = bytearray(packed(as_json(entries), nbytes))
    for _ in range(chance.randint(1, 4)):
        content[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(content)


def flip_header(chance: random.Random, entries: Entries, nbytes: int) -> bytes:
    """One bit of the header is another one."""
    header = bytearray(as_json(entries))
    header[chance.randrange(len(header))] ^= 1 << chance.randrange(8)
    return packed(bytes(header), nbytes)


def cut(chance: random.Random, entries: Entries, nbytes: int) -> bytes:
    """The file ends early."""
    content = packed(as_json(entries), nbytes)
    return content[: chance.randrange(len(content))]


def cut_header(chance: random.Random, entries: Entries, nbytes: int) -> bytes:
    """The header ends early, and its length says so."""
    header = as_json(entries)
    return packed(header[: chance.randrange(len(header))], nbytes)


def insert(chance: random.Random, entries: Entries, nbytes: int) -> bytes:
    """JSON's own signs, and what is no text, somewhere in the header."""
    header = as_json(entries)
    where = chance.randrange(len(header) + 1)
    return packed(header[:where] + chance.choice(BYTES) * chance.choice((1, 1, 1, 2, 3000)) + header[where:], nbytes)


def repeat(chance: random.Random, entries: Entries, nbytes: int) -> bytes:
    """A part of the header comes twice."""
    header = as_json(entries)
    begin, end = sorted(chance.randrange(len(header) + 1) for _ in range(2))
    return packed(header[:end] + header[begin:end] + header[end:], nbytes)


def lie_about_length(chance: random.Random, entries: Entries, nbytes: int) -> bytes:
    """The header says it is longer or shorter than it is."""
    header = as_json(entries)
    length = chance.choice((*LENGTHS, len(header) + chance.randint(-9, 9)))
    return packed(header, nbytes, max(0, length))


def lie_about_size(chance: random.Random, entries: Entries, nbytes: int) -> bytes:
    """More or fewer data bytes than the tensors have."""
    return packed(as_json(entries), max(0, nbytes + chance.choice((-8, -1, 1, 8, 4096))))


def odd_value(chance: random.Random, entries: Entries, nbytes: int) -> bytes:
    """Another value somewhere in the JSON."""
    places: list[tuple[Any, Any]] = []

    def visit(value: Any) -> None:  # noqa: ANN401 - any JSON
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            visit(value[key])

    visit(entries)
    for where, key in chance.sample(places, min(len(places), chance.choice((1, 1, 2)))):
        where[key] = chance.choice(VALUES)
    return packed(as_json(entries), nbytes)


def odd_size(chance: random.Random, entries: Entries, nbytes: int) -> bytes:
    """A size or offset more, or another one."""
    tensor = entries[chance.choice([name for name in entries if name != "__metadata__"])]
    sizes = tensor[chance.choice(("shape", "data_offsets"))]
    sizes.insert(chance.randrange(len(sizes) + 1), chance.choice(SIZES))
    if chance.random() < 0.5:
        sizes.pop(chance.randrange(len(sizes)))
    return packed(as_json(entries), nbytes)


def odd_name(chance: random.Random, entries: Entries, nbytes: int) -> bytes:
    """A tensor, a field or a metadata key under another name."""
    where = chance.choice([entries, *[value for value in entries.values() if isinstance(value, dict)]])
    name = chance.choice(list(where))
    where[chance.choice(NAMES)] = where[name] if chance.random() < 0.3 else where.pop(name)
    return packed(as_json(entries), nbytes)


def swap(chance: random.Random, entries: Entries, nbytes: int) -> bytes:
    """Two tensors with each other's bytes, dtypes or shapes."""
    tensors = [value for name, value in entries.items() if name != "__metadata__"]
    one, other, key = chance.choice(tensors), chance.choice(tensors), chance.choice(("dtype", "shape", "data_offsets"))
    one[key], other[key] = other[key], one[key]
    return packed(as_json(entries), nbytes)


def double_key(chance: random.Random, entries: Entries, nbytes: int) -> bytes:
    """A tensor, or the metadata, comes twice."""
    header = as_json(entries)
    name = chance.choice(list(entries))
    return packed(header[:-1] + b"," + as_json({name: entries[name]})[1:], nbytes)


def nest(chance: random.Random, entries: Entries, nbytes: int) -> bytes:
    """Brackets in brackets, up to where a parser's stack ends."""
    depth = chance.choice((1, 5, 127, 128, 129, 1000, 50_000))
    opening, closing = chance.choice(((b"[", b"]"), (b'{"a":', b"}")))
    inner = opening * depth + chance.choice((as_json(entries), b"1")) + closing * depth
    return packed(chance.choice((inner, b'{"t":' + inner + b"}")), nbytes)


def spell_otherwise(chance: random.Random, entries: Entries, nbytes: int) -> bytes:
    """The same content: white space, order, escapes."""
    names = list(entries)
    chance.shuffle(names)
    text = json.dumps({name: entries[name] for name in names}, indent=chance.choice((None, 0, 3)))
    text = text.replace("dtype", "d\\u0074ype") if chance.random() < 0.3 else text
    return packed((" \t\n" * chance.randint(0, 3) + text + " " * chance.randint(0, 9)).encode(), nbytes)


def noise(chance: random.Random, entries: Entries, nbytes: int) -> bytes:  # noqa: ARG001 - as the others
    """Random bytes."""
    header = chance.randbytes(chance.randint(0, 60))
    return packed(header, nbytes) if chance.random() < 0.5 else header


MUTATIONS: tuple[Callable[[random.Random, Entries, int], bytes], ...] = (
    *(flip, flip_header, cut, cut_header, insert, repeat, lie_about_length, lie_about_size),
    *(odd_value, odd_size, odd_name, swap, double_key, nest, spell_otherwise, noise),
)


# --- both readers ----------------------------------------------------------------------------------------------------


class TooSlow(BaseException):
    """A case has used up its time."""


@dataclass
class Report:
    """What came out."""

    cases: Counter[str] = field(default_factory=Counter)
    """Per mutation."""
    both: Counter[str] = field(default_factory=Counter)
    """Per answer of both: `accepted`, `refused`, `refused by expo alone`, …"""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why expo alone refuses, names and numbers left out."""
    broken: list[str] = field(default_factory=list)
    """Laws that did not hold."""
    slowest_s: float = 0.0


def reason_of(error: InputError, file: Path) -> str:
    """A message without what differs from case to case."""
    text = str(error).removeprefix(str(file)).removeprefix(": damaged header: ").strip()
    text = re.sub(r"'[^']*…|'[^']*'|\{.*\}|\[.*\]", "…", text)
    return re.sub(r"-?\d+", "N", text)


def same(shard: Shard, content: bytes) -> bool:
    """Whether a shard is what the library reads."""
    ours = {
        tensor.name: (tensor.dtype, list(tensor.shape), content[tensor.start : tensor.start + tensor.nbytes])
        for tensor in shard.tensors
    }
    return ours == {name: (one["dtype"], one["shape"], bytes(one["data"])) for name, one in deserialize(content)}


def examine(file: Path, content: bytes, report: Report) -> str | None:
    """Read one file twice; which law it breaks, if any."""
    file.write_bytes(content)
    started = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
    try:
        shard: Shard | InputError = read_shard(file)
    except InputError as error:
        shard = error
    except TooSlow:
        return f"no answer within {CASE_SECONDS} s"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        report.slowest_s = max(report.slowest_s, time.perf_counter() - started)
    return compare(file, content, shard, report)


def compare(file: Path, content: bytes, shard: Shard | InputError, report: Report) -> str | None:
    """Hold expo's answer against the library's; which law it breaks, if any."""
    try:
        deserialize(content)
        accepted = True
    except SafetensorError:
        accepted = False
    ours = "refused" if isinstance(shard, InputError) else "accepted"
    report.both[f"{ours}, {'accepted' if accepted else 'refused'}"] += 1
    if isinstance(shard, InputError):
        if "\n" in str(shard) or len(str(shard)) > 500:
            return "a message that is not one line"
        if accepted:
            report.reasons[reason_of(shard, file)] += 1
        return None
    if not accepted:
        return "accepted, and the library refuses it"
    return None if same(shard, content) else "read as something else"


def run(count: int, seed: int, keep: Path) -> Report:
    """Examine `count` files, the same ones for the same seed."""
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        for number in range(count):
            chance = random.Random(f"{seed} {number}")
            mutation = MUTATIONS[number % len(MUTATIONS)]
            content = mutation(chance, *right_file(chance))
            report.cases[mutation.__name__] += 1
            if law := examine(file, content, report):
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{seed}-{number}.safetensors").write_bytes(content)
                report.broken.append(f"case {number} ({mutation.__name__}): {law}")
    return report


def limit_memory() -> int:
    """Allow this process a fixed amount on top of what it has; returns the size it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    now = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, now + MEMORY_BYTES))
    return now


def table(title: str, rows: Counter[str]) -> str:
    """Counts as Markdown, the largest first."""
    lines = [f"| {name} | {number:,} |" for name, number in rows.most_common()]
    return "\n".join([f"| {title} | files |", "| --- | ---: |", *lines, ""])


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="where files that break a law go")
    options = parser.parse_args()

    def too_slow(*_: object) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, too_slow)
    before = limit_memory()
    before_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    report = run(options.count, options.seed, options.keep)
    seconds = time.perf_counter() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_rss
    print(f"{options.count:,} mutated headers, seed {options.seed}: {len(report.broken)} broken laws")
    print(f"{seconds:.0f} s, slowest {1000 * report.slowest_s:.0f} ms; peak memory grew by {grown / 1024:.0f} MB")
    print(f"(address space limited to {(before + MEMORY_BYTES) / 1e6:.0f} MB)\n")
    print(table("expo, safetensors", report.both))
    print(table("refused by expo alone, because", report.reasons))
    print(table("mutation", report.cases))
    print(*report.broken[:20], sep="\n")
    sys.exit(bool(report.broken))


if __name__ == "__main__":
    main()
