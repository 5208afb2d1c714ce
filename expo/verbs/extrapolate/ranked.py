"""`--as-adapter --rank`: the factors of each module's Δ, a module at a time, into the file of every output."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING

from expo.disk import Background
from expo.engines.torch_tools import find_device
from expo.files import Row
from expo.output.shard import StagedShard
from expo.output.writer import ShardRecord, StagedOutput
from expo.progress import bytes_bar
from expo.theta.decide_ranked import Part, RankedPlan
from expo.verbs.extrapolate.plan import ExtrapolatePlan

if TYPE_CHECKING:
    import torch

    from expo.theta.differences import Differences


def write_factors(job: ExtrapolatePlan, pair: RankedPlan, staged: Sequence[StagedOutput]) -> Row:
    """Write the adapter's file of every output that lacks it: the same bytes, as α is in the config alone.

    Returns:
        The time of the first read and the seconds that it took.

    Raises:
        InputError: The models are the same, or a value is not finite.
        EnvironmentFailure: I/O failed.
    """
    for output in staged:
        output.verify()
    first_read, started, (shard,) = time.time(), time.perf_counter(), pair.shards
    missing = [output for output in staged if shard.name not in output.records]
    if missing:
        from expo.theta import stream
        from expo.theta.differences import Differences
        from expo.theta.sources import SourceFiles

        device = find_device(job.config.device, prefer_gpu=False)
        with ExitStack() as stack:
            progress = stack.enter_context(closing(bytes_bar(pair.read_bytes, "approximate")))
            sources = stack.enter_context(SourceFiles(*pair.sources))
            disk = stack.enter_context(Background())
            equal = [(segment, 0) for segment in (*pair.equal, *pair.exact)]
            if equal:
                workers = job.config.workers or stream.default_workers()
                stream.Combiner(sources, replace(pair.settings, alphas=()), device, workers).run(equal, [])
            files = [output.start_shard(shard.name, shard.header, shard.nbytes, disk) for output in missing]
            for file in files:
                stack.callback(file.close)
            differences = Differences(sources, device, progress.update)
            figures = dict(_each(pair, differences, files))
            for output, file in zip(missing, files, strict=True):
                norms = differences.delta_squared, differences.sft_squared
                output.record(ShardRecord(shard.name, shard.nbytes, file.finish(), *norms, approximation=figures))
    return {"first_read": first_read, "combine_seconds": round(time.perf_counter() - started, 3)}


def _each(pair: RankedPlan, differences: Differences, files: Sequence[StagedShard]) -> Iterator[tuple[str, Row]]:
    """The figures of every tensor of SFT, the factors of which are written as they come."""
    (shard,) = pair.shards
    places = iter(enumerate(tensor.start for tensor in shard.tensors))
    for module in pair.modules:
        found = differences.factors(module)
        for factor in (found.a, found.b):
            number, start = next(places)
            _put(files, number, start, factor)
        yield module.sft.name, {"rank": module.rank, "norm": found.norm, "error": found.error}
    rest: dict[str, list[Part]] = {}
    for part in pair.rest:
        rest.setdefault(part[1].name, []).append(part)
    for name, parts in rest.items():
        yield name, {"norm": differences.norm(parts)}


def _put(files: Sequence[StagedShard], number: int, start: int, factor: torch.Tensor) -> None:
    import torch

    data = factor.cpu().view(-1).view(torch.uint8).numpy().data
    for file in files:
        file.put(number, start, data, _nothing)


def _nothing() -> None:
    """The data is not used again."""
