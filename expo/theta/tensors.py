"""θ(α) tensor by tensor, for an engine that loads it: the plan of a pair, executed into memory instead of files.

Bit for bit what `expo extrapolate` writes. Memory grows with the largest tensors and not with the model: a tensor is
not kept after it was returned, and at most one is computed ahead. The computation is in `stream.py`.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expo.errors import InputError
from expo.theta.buffers import TORCH_DTYPES
from expo.theta.norms import Norms
from expo.theta.pair_checks import check_change, check_lines
from expo.theta.plan import PairPlan, Segment, TensorPlan
from expo.theta.sources import SourceFiles
from expo.theta.stream import Combiner, default_workers, total_norms
from expo.theta.trajectory.fit import quality

CPU = torch.device("cpu")


class _Memory:
    """A sink that writes pieces to their place in a tensor."""

    def __init__(self, values: Tensor) -> None:
        self._bytes = values.view(-1).view(torch.uint8).numpy()

    def put(self, number: int, offset: int, data: memoryview, done: Callable[[], None]) -> None:  # noqa: ARG002
        """Take a piece; pieces do not overlap, so several threads may write at once."""
        self._bytes[offset : offset + len(data)] = np.frombuffer(data, np.uint8)  # numpy lets other threads run
        done()


class Theta:
    """The tensors of θ(α), by name or one after the other; a context manager. Used by several threads.

    Args:
        plan: The pair's plan, for one α.
        workers: Threads that read and combine. Default: the processors this process may use, at most four.

    Raises:
        InputError: A tensor has a type that torch does not support.
    """

    def __init__(self, plan: PairPlan, workers: int | None = None) -> None:
        self._plan = plan
        self._tensors = {tensor.name: tensor for shard in plan.shards for tensor in shard.tensors}
        for tensor in self._tensors.values():
            _require_known(tensor)
        self._workers = workers or default_workers()
        self._lock = threading.Lock()  # a combiner does one run at a time
        self._norms: dict[str, Norms] = {}
        self._stack = ExitStack()
        self._combiner: Combiner

    def __enter__(self) -> Theta:
        """Open the files, and compare what must be equal.

        Raises:
            InputError: A head that one side omits is not the other's embedding.
            EnvironmentFailure: A file cannot be read.
        """
        with ExitStack() as opening, torch.inference_mode(False), CPU:  # whatever the engine set
            sources = opening.enter_context(SourceFiles(*self._plan.sources))
            self._combiner = Combiner(sources, self._plan.settings, CPU, self._workers)
            if self._plan.equal:
                comparing = Combiner(sources, replace(self._plan.settings, alphas=()), CPU, self._workers)
                comparing.run([(segment, 0) for segment in self._plan.equal], [])
            self._stack = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Name and values of every tensor, in the order of DPO's files; the last one is followed by `check_change`.

        Raises:
            InputError: A value is not finite, sides that must be equal are not, or nothing differs at all.
            EnvironmentFailure: Reading failed.
        """
        return self._each(self._tensors)

    def sorted_by(self, key: Callable[[str], Any]) -> Iterator[tuple[str, Tensor]]:
        """As iterating over it, in the order of a key of the names."""
        return self._each(sorted(self._tensors, key=key))

    def _each(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The next tensor is computed while the caller uses the last one."""
        coming: deque[tuple[str, Future[Tensor]]] = deque()

        def first() -> tuple[str, Tensor]:
            name, future = coming.popleft()
            return name, future.result()

        with ThreadPoolExecutor(1) as ahead:
            for name in names:
                coming.append((name, ahead.submit(self.tensor, name)))
                if len(coming) > 1:
                    yield first()
            while coming:
                yield first()
        self.check_change()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors, in the order of DPO's files."""
        return tuple(self._tensors)

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor."""
        return TORCH_DTYPES[self._tensors[name].dtype]

    def tensor(self, name: str) -> Tensor:
        """The values of one tensor, in memory of their own on the CPU.

        Raises:
            InputError: A value is not finite, or sides that must be equal are not.
            EnvironmentFailure: Reading failed.
        """
        planned = self._tensors[name]
        values = torch.empty(planned.shape, dtype=TORCH_DTYPES[planned.dtype], device=CPU)
        segments: list[tuple[Segment, int]] = [(segment, segment.offset) for segment in planned.segments]
        with self._lock, torch.inference_mode(False), CPU:
            pieces = self._combiner.run(segments, [_Memory(values)])
            self._norms[name] = total_norms(norms for _, norms in pieces)
        return values

    def check_change(self) -> None:
        """Check for a mistaken pair once every tensor was read; does nothing before, or if α has no effect.

        Raises:
            InputError: SFT and DPO have the same values.
        """
        changes = self._plan.has_change and any(self._plan.settings.alphas)
        if changes and len(self._norms) == len(self._tensors):
            total = total_norms(self._norms.values())
            delta, sft = total.delta, total.sft
            known = math.isfinite(delta) and math.isfinite(sft)
            check_change(math.sqrt(delta) if known else None, math.sqrt(delta / sft) if known and sft else None)
            if (course := self._plan.settings.course) is not None:
                check_lines(quality(self._combiner.fits.values()), len(course.steps))


def _require_known(tensor: TensorPlan) -> None:
    if tensor.dtype not in TORCH_DTYPES:
        raise InputError(f"{tensor.name} has type {tensor.dtype}, which torch does not support: it cannot be loaded")
