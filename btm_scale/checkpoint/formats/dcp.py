"""Read PyTorch's distributed checkpoints (DCP): FSDP's, torchtitan's, and those of `dcp.save`.

`.metadata` names the chunks of each tensor, and where they are in the `.distcp` files. Each chunk is an archive of
`torch.save` in there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import local

import torch

from btm_scale.checkpoint.formats.fields import Fields, natural, one_dtype
from btm_scale.checkpoint.formats.inert import Inert
from btm_scale.checkpoint.formats.pickles import load_embedded, load_plain_pickle
from btm_scale.checkpoint.formats.stored import StoredTensor
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, is_shape, unknown_tensor
from btm_scale.errors import CheckpointError, first_few
from btm_scale.util.inside import file_inside

METADATA = ".metadata"
_MODEL = ("model", "module", "state_dict", "model_state_dict", "app.model")
# Parts of the names of tensors that belong to the training, not to the model.
_TRAINING = {"optim", "optimizer", "optimizers", "optimizer_state", "optimizer_states", "lr_scheduler", "scheduler"}
_TRAINING |= {"lr_schedulers", "train_state", "dataloader", "rng_state", "rng", "callbacks", "loops"}
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_ACCELERATE = "pytorch_model_fsdp_0"  # what accelerate calls the folder of the model


def dcp_folder(path: Path) -> Path | None:
    """Return the folder of a distributed checkpoint: `path`, the one that accelerate made in it, or None."""
    return next((folder for folder in (path, path / _ACCELERATE) if (folder / METADATA).is_file()), None)


def open_dcp(path: Path) -> ModelReader:
    """Open the model in a distributed checkpoint under the names that it was saved by.

    The optimizer's tensors are left out, and so are wrappers' parts of names. Raises `CheckpointError` if there is not
    exactly one model.
    """
    folder = dcp_folder(path)
    if folder is None:
        raise CheckpointError(f"{path} has no {METADATA}. Give the folder of a distributed checkpoint.")
    return GlobalTensors(folder, _model_names)


def _model_names(names: Mapping[str, tuple[str, ...]], path: Path) -> dict[str, str]:
    """Return the model's names of those tensors that belong to it, given where each was in what was saved."""
    by_holder: dict[tuple[str, ...], dict[str, str]] = {}
    for full, parts in names.items():
        if not _TRAINING.intersection(part.casefold() for part in parts[:3]):
            by_holder.setdefault(parts[:-1], {})[full] = parts[-1]
    if not by_holder:
        raise CheckpointError(f"{path} has no tensors of a model, only of an optimizer. Give the model's checkpoint.")
    models = [holder for holder in by_holder if ".".join(holder) in _MODEL]
    holders = models if models else list(by_holder)
    if len(holders) > 1:
        listed = first_few([f"'{'.'.join(holder)}'" for holder in sorted(holders)], "parts")
        raise CheckpointError(f"{path} may hold several models: {listed}. Save one: dcp.save({{'model': state_dict}}).")
    chosen = {full: _unwrapped(name) for full, name in by_holder[holders[0]].items()}
    if all(name.startswith("module.") for name in chosen.values()):
        chosen = {full: name.removeprefix("module.") for full, name in chosen.items()}
    if len(set(chosen.values())) < len(chosen):
        raise CheckpointError(f"{path} has two tensors whose names differ only by a wrapper's. Save the model again.")
    return chosen


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


@dataclass(frozen=True)
class Chunk:
    """A block of a global tensor, at `offsets`."""

    offsets: tuple[int, ...]
    stored: StoredTensor


Layers = Callable[[str, TensorSpec, list[Chunk]], Iterable[tuple[str, TensorSpec, list[Chunk]]]]
"""Divides a tensor with its chunks into the tensors of layers."""


class GlobalTensors(ModelReader):
    """The full tensors of a checkpoint.

    `choose` returns the names of the tensors that are wanted, by full name, from where each was in what was saved.
    """

    def __init__(
        self,
        path: Path,
        choose: Callable[[Mapping[str, tuple[str, ...]], Path], Mapping[str, str]],
        layers: Layers = lambda *tensor: [tensor],
    ) -> None:
        self.path = path
        self._local = local()
        self._tensors: dict[str, tuple[TensorSpec, list[Chunk]]] = {}
        sizes, chunks = _listed(path, choose)
        for name, parts in chunks.items():
            dtype = one_dtype([chunk.stored for chunk in parts], path, name)
            for flat_name, spec, own in layers(name, TensorSpec(dtype, sizes[name]), parts):
                filled = sorted((each for each in own if each.stored.spec.elements), key=lambda each: each.offsets)
                if spec.elements and not _tile(spec.shape, filled):
                    raise CheckpointError(
                        f"{path}: the chunks of '{flat_name:.100}' overlap or are incomplete. Save it again."
                    )
                self._tensors[flat_name] = spec, filled

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._tensors))

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's dtype and shape."""
        if name not in self._tensors:
            raise unknown_tensor(self.path, name)
        return self._tensors[name][0]

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with row-major elements from `start`; a tensor sharded within rows is read in full.

        Each thread keeps the last tensor that it read in full.
        """
        spec, chunks = self._tensors[name]
        if not spec.elements:
            return
        if all(chunk.stored.stride is None and chunk.stored.spec.shape[1:] == spec.shape[1:] for chunk in chunks):
            segments = tuple(segment for chunk in chunks for segment in chunk.stored.segments)
            StoredTensor(spec, segments).read_into(start, out)
            return
        cached: tuple[str, torch.Tensor] | None = getattr(self._local, "cached", None)
        if cached is None or cached[0] != name:
            cached = self._local.cached = name, self._joined(spec, chunks).reshape(-1)
        out.copy_(cached[1][start : start + out.numel()])

    @staticmethod
    def _joined(spec: TensorSpec, chunks: list[Chunk]) -> torch.Tensor:
        if not spec.shape:
            return chunks[0].stored.read()
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        for chunk in chunks:
            spans = zip(chunk.offsets, chunk.stored.spec.shape, strict=True)
            tensor[tuple(slice(offset, offset + size) for offset, size in spans)] = chunk.stored.read()
        return tensor


def _listed(
    path: Path, choose: Callable[[Mapping[str, tuple[str, ...]], Path], Mapping[str, str]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, list[Chunk]]]:
    """Return the sizes and the chunks of the chosen tensors by name. Raises `CheckpointError`."""
    file = file_inside(path, METADATA)
    metadata = attributes(load_plain_pickle(file), file, "metadata")
    described, stored = metadata.part("state_dict_metadata"), metadata.part("storage_data")
    chosen = choose(_places(metadata, described), path)
    sizes: dict[str, tuple[int, ...]] = {}
    chunks: dict[str, list[Chunk]] = {}
    for key, value in stored.values.items():
        index = attributes(key, file, "storage_data")
        name, offset = index.get("fqn"), index.get("offset")
        if not isinstance(name, str):
            index.refuse("fqn", name, "the name of a tensor")
        if offset is None or name not in chosen:
            continue
        size = attributes(described.get(name), file, f"state_dict_metadata.{name}.").get("size")
        if not is_shape(offset) or not is_shape(size) or len(offset) != len(size):
            index.refuse(name, (offset, size), "an offset and a size of the same dimensions")
        place = attributes(value, file, f"storage_data.{name}.")
        relative = place.get("relative_path")
        if not isinstance(relative, str):
            place.refuse("relative_path", relative, "the name of a file")
        start, length = (
            natural(place.get(each), file, f"{place.path}{each}", 1 << 62) for each in ("offset", "length")
        )
        tensor = load_embedded(file_inside(path, relative), start, length)
        if not isinstance(tensor, StoredTensor) or len(tensor.spec.shape) != len(size):
            place.refuse("offset", tensor, "where a tensor of those dimensions is")
        sizes[chosen[name]] = tuple(size)
        chunks.setdefault(chosen[name], []).append(Chunk(tuple(offset), tensor))
    for name, own in chosen.items():
        fields = attributes(described.get(name), file, f"state_dict_metadata.{name}.")
        _require_described(fields, chunks.get(own, []))
        _require_dtype(fields, chunks.get(own, []))
    return sizes, chunks


def _places(metadata: Fields, described: Fields) -> dict[str, tuple[str, ...]]:
    """Return where each tensor was in what was saved: the keys that lead to it."""
    planned = metadata.get("planner_data")
    places = planned if isinstance(planned, Mapping) else {}
    names: dict[str, tuple[str, ...]] = {}
    for name, entry in described.values.items():
        if (
            isinstance(name, str)
            and isinstance(entry, Inert)
            and isinstance(entry.state, dict)
            and "size" in entry.state
        ):
            place = places.get(name)
            names[name] = tuple(map(str, place)) if isinstance(place, (tuple, list)) and place else (name,)
    return names


def _require_described(tensor: Fields, parts: list[Chunk]) -> None:
    """Raise `CheckpointError` unless the chunks in a tensor's metadata are those that are stored."""
    listed = tensor.sequence("chunks")
    blocks = set()
    for chunk in listed:
        fields = attributes(chunk, tensor.file, f"{tensor.path}chunks.")
        block = [fields.get(each) for each in ("offsets", "sizes")]
        if not all(map(is_shape, block)):
            tensor.refuse("chunks", chunk, "an offset and a size")
        blocks.add(tuple(map(tuple, block)))
    if len(listed) != len(parts) or blocks != {(part.offsets, part.stored.spec.shape) for part in parts}:
        tensor.refuse("chunks", listed, "the offsets and sizes of the stored chunks")


def _require_dtype(tensor: Fields, parts: list[Chunk]) -> None:
    """Raise `CheckpointError` unless the dtype in a tensor's metadata is that of its stored chunks."""
    properties = tensor.get("properties")
    state = properties.state if isinstance(properties, Inert) else properties
    # The state is a tuple that begins with the dtype.
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, torch.dtype):
        tensor.refuse("properties.dtype", dtype, "a dtype")
    for part in parts:
        if part.stored.spec.dtype != dtype:
            tensor.refuse("properties.dtype", dtype, f"{part.stored.spec.dtype}, the dtype of the stored chunks,")


def attributes(value: object, file: Path, field: str) -> Fields:
    """Return the attributes of an object that was not loaded."""
    return Fields(value.state if isinstance(value, Inert) else value, file, field)


def _tile(shape: tuple[int, ...], chunks: list[Chunk]) -> bool:
    """Whether chunks fill a tensor completely and without overlaps: they are the cells of one grid."""
    edges = [sorted({chunk.offsets[axis] for chunk in chunks}) for axis in range(len(shape))]
    if any(edge[0] != 0 for edge in edges) or len({chunk.offsets for chunk in chunks}) != len(chunks):
        return False
    ends = [dict(zip(edge, [*edge[1:], size], strict=True)) for edge, size in zip(edges, shape, strict=True)]
    fills = all(
        chunk.stored.spec.shape[axis] == end[chunk.offsets[axis]] - chunk.offsets[axis]
        for chunk in chunks
        for axis, end in enumerate(ends)
    )
    return fills and len(chunks) == math.prod(map(len, edges))
