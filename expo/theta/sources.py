"""The weight files of a plan, open for reading at offsets, wherever they are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from expo.checkpoint.folder import Checkpoint, Packed, Shard
from expo.checkpoint.read_ahead import ReadAhead
from expo.errors import EnvironmentFailure
from expo.theta.adapter.tensors import Adapter
from expo.theta.plan import Segment
from expo.theta.unpacked import Rooms, Unpacked


class SourceFiles:
    """Open weight files, read at offsets; a context manager.

    Of files that stay on the hub, only what `expect` was told can be read, and it is fetched in that order. Of files
    with quantized tensors, offsets are those of the dequantized ones (`unpacked.py`).
    """

    def __init__(self, *checkpoints: Checkpoint | Adapter) -> None:
        self._stack = ExitStack()
        with ExitStack() as opening:
            self._descriptors: dict[Path, int] = {}
            self._remote: dict[Path, ReadAhead] = {}
            quantized = [one for one in checkpoints if isinstance(one, Checkpoint) and one.dequantized]
            rooms = Rooms(self._read_stored, len(quantized))
            shards = [shard for one in quantized for shard in one.shards if shard.views]
            self._unpacked = {shard.file: Unpacked(shard.views, rooms) for shard in shards}
            for checkpoint in checkpoints:
                files = dict.fromkeys(_files(checkpoint.shards))
                if isinstance(checkpoint, Checkpoint) and checkpoint.open_remote is not None:
                    self._remote |= dict.fromkeys(files, opening.enter_context(closing(checkpoint.open_remote())))
                    continue
                for file in files:
                    descriptor = os.open(file, os.O_RDONLY)
                    opening.callback(os.close, descriptor)
                    self._descriptors[file] = descriptor
            self._stack = opening.pop_all()

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def expect(self, segments: Sequence[Segment]) -> None:
        """Say what will be read next, and in which order."""
        for remote in set(self._remote.values()):
            infos = (segment.sft for segment in segments if segment.sft is not None)
            remote.expect(info for info in infos if self._remote.get(info.file) is remote)

    def stop(self) -> None:
        """Whoever waits for bytes of a file on the hub gets an error."""
        for remote in self._remote.values():
            remote.stop()

    def read(self, file: Path, position: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `position` of the file.

        Raises:
            EnvironmentFailure: The file cannot be read, or was truncated.
        """
        if unpacked := self._unpacked.get(file):
            unpacked.read(position, buffer)
        else:
            self._read_stored(file, position, buffer)

    def _read_stored(self, file: Path, position: int, buffer: memoryview) -> None:
        """The same of the file as it is."""
        if remote := self._remote.get(file):
            remote.read(file, position, buffer)
            return
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self._descriptors[file], [buffer[done:]], position + done)
            except OSError as error:
                raise EnvironmentFailure(f"reading {file} failed: {error.strerror}") from error
            if got == 0:
                raise EnvironmentFailure(f"{file} became shorter while it was read")
            done += got


def _files(shards: Iterable[Shard]) -> Iterator[Path]:
    """The files that are read for these: scales may be in one that has nothing else."""
    for shard in shards:
        yield shard.file
        yield from (view.stored.scales.file for view in shard.views if isinstance(view.stored, Packed))
