"""The tables of docs/scaling.md: bytes, memory, seconds and money of each stage, from rates that are named.

    python benchmarks/scaling.py

Nothing is measured here: the numbers follow from `Node` and `MODELS`, whose values are measured (RESULTS.md), of a data
sheet, or assumed, as the first table says of each. docs/scaling.md has exactly what is printed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

GB = 1e9
ALPHAS, PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS, MOST_TOKENS = 6, 1_000, 100, 500, 2_048
IN_FLIGHT = 256
START_S = 60.0
SHARD_BYTES = 5 * GB
NODES = 8


@dataclass(frozen=True)
class Node:
    """A machine, and the file server that it shares with others."""

    gpus: int = 8
    gpu_bytes: float = 141 * GB
    gpu_bandwidth: float = 4.8e12
    of_bandwidth: float = 0.5
    of_memory: float = 0.9
    flops: float = 2 * 1.1e9 * 165_219  # a reward model of 1.1 billion parameters
    combining: float = 15 * GB / 1.593
    loading: float = 2.2 * GB / 4.18
    disk_read: float = 6.5 * GB
    disk_write: float = 3.5 * GB
    link: float = 25e9 / 8
    server: float = 100e9 / 8
    price: float = 3.0


@dataclass(frozen=True)
class Model:
    """A pair, and the engine that runs θ(α)."""

    name: str
    parameters: float
    active: float
    gpus: int
    """Of an engine."""
    bytes_each: int
    """Of a weight in the engine."""
    cache_bytes: int
    """Of a token."""
    largest_bytes: float
    """Its largest tensor."""

    @property
    def nbytes(self) -> float:
        """Of a side in bfloat16."""
        return 2 * self.parameters


NODE = Node()
MODELS = (
    Model("7B", 7.24e9, 7.24e9, 1, 2, 131_072, 2 * 32_000 * 4_096),
    Model("70B", 70.55e9, 70.55e9, 2, 2, 327_680, 2 * 128_256 * 8_192),
    Model("671B", 671e9, 37e9, 8, 1, 70_272, 2 * 129_280 * 7_168),
)
REWARD_MODEL = MODELS[0]


# --- stages -------------------------------------------------------------------------------------------------------


def extrapolate_on_disk(model: Model) -> float:
    """Seconds on one node whose own disk has both sides and the output."""
    disk = 2 * model.nbytes / NODE.disk_read + model.nbytes / NODE.disk_write
    return max(disk, 3 * model.nbytes / NODE.combining)


def extrapolate_on_server(model: Model, nodes: int) -> float:
    """Seconds with all files on the server, which reads and writes at once; without joining."""
    shards = ceil(model.nbytes / SHARD_BYTES)
    at_work = min(nodes, shards)
    of_one = ceil(shards / at_work) * 2 * min(SHARD_BYTES, model.nbytes) / NODE.link
    return max(2 * model.nbytes / min(NODE.server, at_work * NODE.link), min(of_one, 2 * model.nbytes / NODE.link))


def join(model: Model) -> float:
    """Seconds until one node has read what all have written, for its checksums."""
    return model.nbytes / NODE.link


def theta(model: Model, read: float) -> float:
    """Seconds until an engine has made θ(α): both sides are read once at a rate, and then from the page cache."""
    return max(2 * model.nbytes / read, model.nbytes / NODE.loading)


def generate(model: Model, engines: int) -> float:
    """Seconds from the first to the last token of all prompts for one α."""
    rows = ceil(PROMPTS / engines)
    steps = MOST_TOKENS + ANSWER_TOKENS * max(0, rows - IN_FLIGHT) / IN_FLIGHT
    bandwidth = model.gpus * NODE.gpu_bandwidth * NODE.of_bandwidth
    cache = (PROMPT_TOKENS + ANSWER_TOKENS / 2) * model.cache_bytes
    each = 2 * model.active / (model.gpus * NODE.flops) + cache / bandwidth
    return steps * model.parameters * model.bytes_each / bandwidth + rows * ANSWER_TOKENS * each


def score(nodes: int) -> float:
    """Seconds of scoring the answers of one α, an engine on each GPU."""
    rows = ceil(PROMPTS / (nodes * NODE.gpus))
    return rows * (PROMPT_TOKENS + ANSWER_TOKENS) * 2 * REWARD_MODEL.parameters / NODE.flops


def engines(model: Model, nodes: int) -> int:
    """How many there is room for."""
    return nodes * (NODE.gpus // model.gpus)


def sweep(model: Model, read: float) -> float:
    """Seconds of one α of a sweep on one node: two starts, θ(α), answers, rewards."""
    return 2 * START_S + theta(model, read) + generate(model, engines(model, 1)) + score(1)


# --- tables -------------------------------------------------------------------------------------------------------


def seconds(value: float) -> str:
    """In seconds up to two minutes, then in minutes or hours."""
    if value < 120:
        return f"{value:.0f} s" if value >= 1 else f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def size(nbytes: float) -> str:
    """In GB."""
    return f"{nbytes / GB:,.0f} GB" if nbytes >= 10 * GB else f"{nbytes / GB:.1f} GB"


def money(nodes: int, value: float) -> str:
    """GPU hours, and what they cost."""
    hours = nodes * NODE.gpus * value / 3600
    return f"{hours:.1f} h, ${hours * NODE.price:.2f}"


def markdown(*lines: Sequence[str]) -> str:
    """A table, its head first."""
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rest))


def inputs() -> str:
    """What the other tables follow from."""
    return markdown(
        ("input", "value", "from"),
        ("combining, files in the page cache", f"{NODE.combining / GB:.1f} GB/s read and written", "measured: H100"),
        ("θ(α) while vLLM loads", f"{NODE.loading / GB:.2f} GB/s of θ(α)", "measured: two CPU cores, 1.1B"),
        ("scoring", f"{NODE.flops / 1e12:.0f} TFLOP/s a GPU", "measured: H200, 1.1B, 165,219 tokens/s"),
        ("GPU memory", f"{size(NODE.gpu_bytes)}, {NODE.gpu_bandwidth / 1e12} TB/s", "data sheet: H200"),
        ("local disk", "6.5 GB/s reading, 3.5 writing", "data sheet: a PCIe 4.0 drive (Samsung PM9A3, U.2)"),
        ("file server", "25 Gb/s a node, 100 Gb/s in all, each way", "line rate of Ethernet"),
        ("of the GPU's memory bandwidth, used", f"{NODE.of_bandwidth:.0%}".replace("%", " %"), "assumed"),
        ("compute while generating", "as scoring", "assumed"),
        ("starting an engine", f"{START_S:.0f} s", "assumed"),
        ("a GPU hour", f"${NODE.price:.2f}", "an example: put in your own"),
    )


def extrapolating() -> str:
    """A checkpoint on the disk."""
    head = (
        "pair",
        "read",
        "written",
        "memory",
        "one node, own disk",
        "one node, server",
        "eight nodes, server",
        "join",
    )
    return markdown(
        head,
        *(
            (
                one.name,
                size(2 * one.nbytes),
                size(one.nbytes),
                "0.3 GB a process",
                seconds(extrapolate_on_disk(one)),
                seconds(extrapolate_on_server(one, 1)),
                seconds(extrapolate_on_server(one, NODES)),
                seconds(join(one)),
            )
            for one in MODELS
        ),
    )


def loading() -> str:
    """θ(α) in an engine."""
    head = ("pair", "GPUs of an engine", "read from storage", "read by all ranks", "host memory of a rank")
    return markdown(
        (*head, "own disk", "server, one node", "server, eight nodes", "written before, own disk"),
        *(
            (
                one.name,
                str(one.gpus),
                size(2 * one.nbytes),
                size(2 * one.nbytes * one.gpus),
                f"{one.largest_bytes / GB:.1f} GB and pieces",
                seconds(theta(one, NODE.disk_read)),
                seconds(theta(one, min(NODE.link, NODE.server))),
                seconds(theta(one, min(NODE.link, NODE.server / NODES))),
                seconds(one.nbytes / NODE.disk_read),
            )
            for one in MODELS
        ),
    )


def answering() -> str:
    """Answers and rewards of one α."""
    lines = []
    for one in MODELS:
        for nodes in (1, NODES):
            count = engines(one, nodes)
            took = generate(one, count)
            held = one.parameters * one.bytes_each / one.gpus
            lines.append(
                (
                    one.name,
                    str(nodes),
                    f"{count} × {one.gpus} GPU{'s' * (one.gpus > 1)}",
                    f"{size(held)} of {size(NODE.of_memory * NODE.gpu_bytes)}",
                    seconds(took),
                    f"{PROMPTS * ANSWER_TOKENS / took:,.0f}",
                    money(nodes, took + START_S),
                    seconds(score(nodes)),
                    money(nodes, score(nodes) + START_S),
                )
            )
    head = (
        "pair",
        "nodes",
        "engines",
        "weights a GPU",
        "generate",
        "tokens/s",
        "GPU hours",
        "score",
        "GPU hours of it",
    )
    return markdown(head, *lines)


def sweeping() -> str:
    """Six α."""
    lines = []
    for one in MODELS:
        alone = ALPHAS * sweep(one, NODE.disk_read)
        beside = sweep(one, min(NODE.link, NODE.server / ALPHAS))
        lines.append((one.name, seconds(alone), money(1, alone), seconds(beside), money(ALPHAS, beside)))
    return markdown(("pair", "one node", "GPU hours", "an α on each of six nodes", "GPU hours of it"), *lines)


def tables() -> Iterator[str]:
    """All that are printed."""
    yield from (make() for make in (inputs, sweeping, extrapolating, loading, answering))


def report(found: Iterable[str]) -> str:
    """All tables, with a line between them."""
    return "\n\n".join(found)


if __name__ == "__main__":
    print(report(tables()))
