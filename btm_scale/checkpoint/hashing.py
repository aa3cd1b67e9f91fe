"""Content hashes of models: over names, dtypes, shapes and bytes, independent of format and sharding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from btm_scale.checkpoint.formats.kept_hashes import NAME, KeptHashes, states_of
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, as_bytes
from btm_scale.util.imports import torch
from btm_scale.util.inside import as_private_as

# Part of the definition: a tensor's hash combines its blocks' hashes, so that blocks can be hashed independently.
BLOCK_BYTES = 64 << 20
_SAMPLE_ELEMENTS = 512


def content_hash(directory: Path) -> str:
    """Return the SHA-256 of a Hugging Face model's weights as 64 hex digits, the same for any sharding."""
    with SafetensorsModel(directory) as model:
        return reader_hash(model)


def hash_and_keep(directory: Path) -> str:
    """Return the content hash of a Hugging Face model, and keep the hashes of its blocks beside the weights."""
    with SafetensorsModel(directory) as model:
        states = states_of(directory, model.files)
        blocks = _blocks(model)
        KeptHashes.of(states, blocks).write(directory / NAME)
        as_private_as(model.files, directory / NAME)
        return combined_hash(model.specs(), blocks)


def reader_hash(model: ModelReader) -> str:
    """Return the content hash of an open model; every byte is read once."""
    return combined_hash(model.specs(), _blocks(model))


def _blocks(model: ModelReader) -> dict[str, list[str]]:
    return {name: [block_hash([block]) for block in model.chunks(name, BLOCK_BYTES)] for name in model.names}


def block_hash(pieces: Iterable[torch.Tensor | memoryview]) -> str:
    """Return the SHA-256 of consecutive pieces that together form one block of a tensor."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(as_bytes(piece))
    return digest.hexdigest()


class BlockHashes:
    """Incremental block hashes of consecutive bytes of a tensor, fed in pieces of any size."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._digest = hashlib.sha256()
        self._room = BLOCK_BYTES

    def update(self, piece: torch.Tensor | memoryview) -> None:
        """Hash the next bytes."""
        data = as_bytes(piece)
        while data:
            part, data = data[: self._room], data[self._room :]
            self._digest.update(part)
            self._room -= len(part)
            if self._room == 0:
                self._finish()

    def finished(self) -> list[str]:
        """Return one hash per block; the last block may be short."""
        if self._room < BLOCK_BYTES:
            self._finish()
        return self._done

    def _finish(self) -> None:
        self._done.append(self._digest.hexdigest())
        self._digest, self._room = hashlib.sha256(), BLOCK_BYTES


def combined_hash(specs: Mapping[str, TensorSpec], block_hashes: Mapping[str, Sequence[str]]) -> str:
    """Return the content hash, given every tensor's block hashes in order."""
    digest = hashlib.sha256()
    for name in sorted(specs):
        spec = specs[name]
        shape = ",".join(map(str, spec.shape))
        digest.update(f"{name}\0{spec.code}\0{shape}\0{' '.join(block_hashes[name])}\n".encode())
    return digest.hexdigest()


def sample_hash(model: ModelReader) -> str:
    """Return a hash of the first 512 elements of every tensor, enough to distinguish two trained models."""
    specs = model.specs()
    sampled = {
        name: [block_hash([model.read_bytes(name, 0, min(_SAMPLE_ELEMENTS, spec.elements))])]
        for name, spec in specs.items()
        if spec.elements
    }
    return combined_hash({name: specs[name] for name in sampled}, sampled)
