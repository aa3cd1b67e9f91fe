"""Read Megatron-core tensors, tensor parallel shards included, under their Hugging Face names."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path
from threading import local

import torch

from btm_scale.checkpoint.formats.based import is_adapter
from btm_scale.checkpoint.formats.locate import described_config, described_in
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, unknown_tensor
from btm_scale.errors import CheckpointError, few_names
from btm_scale.model.families.family import Entry
from btm_scale.model.hf_config import read_shape, shape_from_config
from btm_scale.model.hf_names import join, table, to_huggingface
from btm_scale.model.shape import ModelShape


def find_shape(path: Path, kind: str = "") -> ModelShape:
    """Return the shape in the config.json of `path` or of a near parent, or in the arguments that Megatron recorded.

    Raises `CheckpointError`, which says of what `kind` the checkpoint is, without either.
    """
    file = described_in(path) / "config.json"
    if not file.is_file():
        if config := described_config(path):
            return shape_from_config(config, path)
        what = f"{path}, {kind}," if kind else str(path)
        raise CheckpointError(
            f"{what} has no config.json, which gives the number of heads and the vocabulary size. Put the config.json "
            "of the Hugging Face model beside it."
        )
    if is_adapter(path):  # whose vocabulary and ties may differ from its base's
        return shape_from_config(described_config(path), path)
    return read_shape(file.parent)


def require_names(path: Path, names: Set[str], described: Set[str]) -> None:
    """Raise `CheckpointError` unless the tensors of a model are those that its config.json describes."""
    differences = {"lacks the tensor": described - names, "has an unexpected tensor": names - described}
    facts = [f"{verb} {few_names(odd, 'tensors')}" for verb, odd in differences.items() if odd]
    if facts:
        raise CheckpointError(
            f"{path} {', and '.join(facts)}. It must have the tensors of the model in its config.json. Copy the "
            "weights again, or use the config.json that belongs to them."
        )


def is_megatron(names: Sequence[str]) -> bool:
    """Whether these are Megatron-core tensor names."""
    return any(name.startswith(("embedding.word_embeddings", "decoder.layers")) for name in names)


class MegatronModel(ModelReader):
    """Tensor parallel shards as one Hugging Face model; each of `parts` reads one rank's tensors.

    Tensors whose shards are joined along rows are read by ranges. Others are converted in full, and each thread
    caches the last.
    """

    def __init__(self, path: Path, parts: Sequence[ModelReader], shape: ModelShape) -> None:
        self.path, self.parts, self.shape = path, list(parts), shape
        self._local = local()
        entries = {entry.megatron: entry for entry in table(shape)}
        for part in self.parts:
            names = {name for name in part.names if not name.endswith("_extra_state")}
            require_names(part.path, names, entries.keys())
        self._specs: dict[str, TensorSpec] = {}
        self._entries: dict[str, Entry] = {}
        for entry in entries.values():
            specs = [part.spec(entry.megatron) for part in self.parts]
            if len(set(specs)) > 1:
                listed = ", ".join(map(str, specs))
                raise CheckpointError(
                    f"{path}: '{entry.megatron}' is {listed} on the tensor ranks, which must be equal. Copy it again."
                )
            if entry.form == "vocabulary" and (rows := sum(spec.shape[0] for spec in specs)) < shape.vocabulary:
                raise CheckpointError(
                    f"{path}: '{entry.megatron}' has {rows} rows, and config.json says vocab_size {shape.vocabulary}. "
                    "There must be a row per token: use the config.json that belongs to this checkpoint."
                )
            blanks = [torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs]
            for name, tensor in self._converted(entry, blanks).items():
                self._specs[name], self._entries[name] = TensorSpec.of(tensor), entry

    @property
    def names(self) -> tuple[str, ...]:
        """Hugging Face names of all tensors, sorted."""
        return tuple(sorted(self._specs))

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's dtype and shape."""
        if name not in self._specs:
            raise unknown_tensor(self.path, name)
        return self._specs[name]

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with row-major elements from `start`."""
        self.spec(name)
        entry = self._entries[name]
        if entry.form in ("plain", "vocabulary") and entry.cut in (None, 0):
            self._read_rows(entry, start, out)
        else:
            out.copy_(self._joined(entry)[name].reshape(-1)[start : start + out.numel()])

    def close(self) -> None:
        """Close the parts."""
        for part in self.parts:
            part.close()

    def _converted(self, entry: Entry, parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        try:
            return to_huggingface(entry, join(entry, parts), self.shape)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: '{entry.megatron}', {len(parts)} x {list(parts[0].shape)}, does not fit config.json. "
                "Use the config.json that belongs to this checkpoint."
            ) from error

    def _read_rows(self, entry: Entry, start: int, out: torch.Tensor) -> None:
        filled = 0
        for part in self.parts if entry.cut == 0 else self.parts[:1]:
            elements = part.spec(entry.megatron).elements
            skip = min(start, elements)
            take = min(elements - skip, out.numel() - filled)
            if take:
                part.read_into(entry.megatron, skip, out[filled : filled + take])
            start, filled = start - skip, filled + take

    def _joined(self, entry: Entry) -> dict[str, torch.Tensor]:
        cached: tuple[str, dict[str, torch.Tensor]] | None = getattr(self._local, "cached", None)
        if cached is None or cached[0] != entry.megatron:
            cached = entry.megatron, self._converted(entry, [part.read(entry.megatron) for part in self.parts])
            self._local.cached = cached
        return cached[1]
