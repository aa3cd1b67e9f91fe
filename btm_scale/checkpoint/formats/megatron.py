"""Megatron-core's tensors, whole or in tensor parallel parts, read under their Hugging Face names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import local

import torch

from btm_scale.checkpoint.formats.locate import described_in
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, unknown_tensor
from btm_scale.errors import CheckpointError
from btm_scale.model.families.family import Entry
from btm_scale.model.hf_config import read_shape
from btm_scale.model.hf_names import join, table, to_huggingface
from btm_scale.model.shape import ModelShape


def find_shape(path: Path) -> ModelShape:
    """The shape that a config.json in `path`, or not far above it, describes."""
    file = described_in(path) / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{path} says nothing of heads or vocabulary. Put the config.json of the Hugging Face model beside it."
        )
    return read_shape(file.parent)


def is_megatron(names: Sequence[str]) -> bool:
    """Whether tensors are named as Megatron-core names them."""
    return any(name.startswith(("embedding.word_embeddings", "decoder.layers")) for name in names)


class MegatronModel(ModelReader):
    """Tensor parallel parts as one Hugging Face model; `parts` are readers of one rank's tensors each.

    Matrices that only need their rows joined are read by ranges; of the others each thread holds the last.
    """

    def __init__(self, path: Path, parts: Sequence[ModelReader], shape: ModelShape) -> None:
        self.path, self.parts, self.shape = path, list(parts), shape
        self._local = local()
        entries = {entry.megatron: entry for entry in table(shape)}
        for part in self.parts:
            have = {name for name in part.names if not name.endswith("_extra_state")}
            if odd := sorted(have ^ entries.keys()):
                whose = "holds an unknown" if odd[0] in have else "lacks the"
                raise CheckpointError(
                    f"{part.path} {whose} tensor '{odd[0]}' for the model that config.json describes; "
                    f"{len(odd)} tensors differ. Use the config.json that belongs to this checkpoint."
                )
        self._specs: dict[str, TensorSpec] = {}
        self._entries: dict[str, Entry] = {}
        for entry in entries.values():
            specs = [part.spec(entry.megatron) for part in self.parts]
            blanks = [torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs]
            for name, tensor in self._converted(entry, blanks).items():
                self._specs[name], self._entries[name] = TensorSpec.of(tensor), entry

    @property
    def names(self) -> tuple[str, ...]:
        """Every Hugging Face name, sorted."""
        return tuple(sorted(self._specs))

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor."""
        if name not in self._specs:
            raise unknown_tensor(self.path, name)
        return self._specs[name]

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the row-major elements from `start`."""
        self.spec(name)
        entry = self._entries[name]
        if entry.form in ("plain", "vocabulary") and entry.cut in (None, 0):
            self._read_rows(entry, start, out)
        else:
            out.copy_(self._whole(entry)[name].reshape(-1)[start : start + out.numel()])

    def close(self) -> None:
        """Close the parts."""
        for part in self.parts:
            part.close()

    def _converted(self, entry: Entry, parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        try:
            return to_huggingface(entry, join(entry, parts), self.shape)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: '{entry.megatron}', {len(parts)} times {list(parts[0].shape)}, does not fit "
                "config.json. Use the config.json that belongs to this checkpoint."
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

    def _whole(self, entry: Entry) -> dict[str, torch.Tensor]:
        held: tuple[str, dict[str, torch.Tensor]] | None = getattr(self._local, "held", None)
        if held is None or held[0] != entry.megatron:
            held = entry.megatron, self._converted(entry, [part.read(entry.megatron) for part in self.parts])
            self._local.held = held
        return held[1]
