"""Weights that stay on the hub: a model whose small files are downloaded, and whose tensors are read by ranges.

Headers are parsed and checked as those of files; the tensors' bytes are fetched ahead in the order in which they are
read (`read_ahead.py`, over `ranges.py`). Nothing of the weights is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from expo.checkpoint.folder import SAFETENSORS, Checkpoint, Location, Shard, find_folder, read_checkpoint
from expo.checkpoint.header import header_length, parse_shard
from expo.checkpoint.hub import HUB_TIMEOUT_S, explain_hub_errors, locate_small_files
from expo.checkpoint.ranges import HubFile
from expo.checkpoint.read_ahead import CONNECTIONS, ReadAhead
from expo.errors import EnvironmentFailure, InputError
from expo.files import HEAD_BYTES

log = logging.getLogger(__name__)


def locate_remote(model: str, *, pickled: bool) -> Location:
    """Find a model on the hub whose weights are then read there, unless they are all in the cache.

    Args:
        model: A hub id, or `id@revision`.
        pickled: Whether .bin weights would be read; they cannot be streamed.

    Raises:
        InputError: It is a folder, there is no such repository or access to it, or it has no safetensors weights.
        EnvironmentFailure: The hub cannot be reached.
    """
    if find_folder(model) is not None:
        raise InputError(f"--stream-sft reads SFT from the hub, and --sft {model} is a folder: leave out --stream-sft")
    location, names = locate_small_files(model, pickled=pickled)
    if not names:
        log.info("%s is in the cache and read from there", location.label)
        return location
    return replace(location, read_remote=_HubWeights(location, names).read)


class _HubWeights:
    """The weights of one commit; a name of a file stands for the path that it would have in the cache."""

    def __init__(self, location: Location, names: tuple[str, ...]) -> None:
        assert location.hub_id is not None
        assert location.revision is not None
        self._path, self._names = location.path, names
        self._repository, self._commit = location.hub_id, location.revision
        self._files: dict[Path, HubFile] = {}

    def read(self) -> Checkpoint:
        """Read and check the headers, as those of a folder.

        Raises:
            InputError: The weights are damaged, or access to them is denied.
            EnvironmentFailure: The hub cannot be reached.
        """
        self._files = explain_hub_errors(self._find, self._repository, self._commit)
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            weights = replace(SAFETENSORS, read_shard=self._read_shard, each=pool.map)
            checkpoint = read_checkpoint(self._path, weights, self._names)
        return replace(checkpoint, open_remote=self._open)

    def _find(self) -> dict[Path, HubFile]:
        from huggingface_hub import HfApi

        found = HfApi().model_info(self._repository, revision=self._commit, files_metadata=True, timeout=HUB_TIMEOUT_S)
        files = {}
        for one in found.siblings or []:
            digest = one.lfs.sha256 if one.lfs else one.blob_id
            if one.rfilename in self._names and one.size is not None and digest is not None:
                file = HubFile(self._repository, self._commit, one.rfilename, one.size, digest)
                files[self._path / one.rfilename] = file
        return files

    def _read_shard(self, path: Path) -> Shard:
        file = self._file(path)
        head = self._bytes(file, 0, min(HEAD_BYTES, file.nbytes))
        length = 8 + header_length(path, head, file.nbytes)
        return parse_shard(path, head[:length] + self._bytes(file, len(head), length), file.nbytes)

    def _bytes(self, file: HubFile, start: int, end: int) -> bytes:
        buffer = bytearray(max(end - start, 0))
        file.fetch(start, memoryview(buffer))
        return bytes(buffer)

    def _file(self, path: Path) -> HubFile:
        if path not in self._files:
            raise EnvironmentFailure(f"the hub does not say how large {path.name} of {self._repository} is")
        return self._files[path]

    def _open(self) -> ReadAhead:
        def fetch(
            file: Path,
            start: int,
            buffer: memoryview,
            on_bytes: Callable[[int], None],
            pause: Callable[[float], None],
        ) -> None:
            self._file(file).fetch(start, buffer, on_bytes, pause)

        return ReadAhead(fetch)
