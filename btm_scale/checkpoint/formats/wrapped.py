"""Models whose tensor names carry what DDP, Lightning, torch.compile or FSDP put around a module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, unknown_tensor
from btm_scale.errors import CheckpointError, few_names
from btm_scale.util.imports import torch

# Never part of a module's own name, wherever they are.
_WRAPPERS = re.compile(r"\b(?:_forward_module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PEFT = "base_model.model."
_TRAINED = re.compile(r"(?:.*\.)?(?:lora_\w+|base_layer|modules_to_save|original_module)(?:\..*)?")
_VALUE_HEAD = ("pretrained_model.", "v_head.")  # of TRL, around a causal LM
_BODIES = ("model.layers.", "model.decoder.layers.", "transformer.h.", "gpt_neox.layers.")


class RenamedModel(ModelReader):
    """A model under other names; closing it closes the model."""

    def __init__(self, model: ModelReader, own_names: Mapping[str, str]) -> None:
        """Take the model's own name of each name."""
        self.path = model.path
        self._model, self._own = model, dict(own_names)
        self._names = tuple(sorted(self._own))

    @property
    def names(self) -> tuple[str, ...]:
        """The new names of all tensors, sorted."""
        return self._names

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's dtype and shape."""
        return self._model.spec(self._own_name(name))

    def kept_hashes(self, name: str) -> Sequence[str] | None:
        """Return the hashes of a tensor's blocks, if they are known of its bytes on disk."""
        return self._model.kept_hashes(self._own_name(name))

    def exact_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that holds a tensor without rounding."""
        return self._model.exact_dtype(self._own_name(name))

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with row-major elements from `start`."""
        self._model.read_into(self._own_name(name), start, out)

    @property
    def needs_torch(self) -> bool:
        """Whether `read_bytes` imports torch."""
        return self._model.needs_torch

    def read_bytes_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of row-major elements from `start`."""
        self._model.read_bytes_into(self._own_name(name), start, out)

    def close(self) -> None:
        """Close the model."""
        self._model.close()

    def _own_name(self, name: str) -> str:
        if name not in self._own:
            raise unknown_tensor(self.path, name)
        return self._own[name]


def unwrapped(model: ModelReader) -> ModelReader:
    """Return the model without the prefixes of wrappers. Raises `CheckpointError` if two tensors then have one name."""
    names = unwrapped_names(model.names, model.path)
    return model if all(new == own for new, own in names.items()) else RenamedModel(model, names)


def unwrapped_names(names: Iterable[str], path: Path) -> dict[str, str]:
    """Return {name without wrappers: stored name}.

    `module.` is also the name of a module, so it is removed only as the prefix of every name. So are the prefixes of
    PEFT and TRL, and the `model.` of a Lightning module around a model with known names. Raises CheckpointError for a
    PEFT model with unmerged adapter weights.
    """
    clean = {name: _WRAPPERS.sub("", name) for name in names}
    while clean and all(name.startswith("module.") for name in clean.values()):
        clean = {own: name.removeprefix("module.") for own, name in clean.items()}
    if clean and all(name.startswith(_PEFT) for name in clean.values()):
        clean = {own: name.removeprefix(_PEFT) for own, name in clean.items()}
        if trained := [own for own, name in clean.items() if _TRAINED.fullmatch(name)]:
            raise CheckpointError(
                f"{path} is the state dict of a PEFT model with unmerged {few_names(trained, 'tensors')}. Their "
                "scaling is only in the adapter's config. Give the adapter's folder, which PEFT's save_pretrained "
                "writes, or call merge_and_unload() before you save the model."
            )
    if all(name.startswith(_VALUE_HEAD) for name in clean.values()):
        clean = {own: name.removeprefix(_VALUE_HEAD[0]) for own, name in clean.items()}
    inner = [name.removeprefix("model.") for name in clean.values()]
    if all(name.startswith("model.") for name in clean.values()) and any(name.startswith(_BODIES) for name in inner):
        clean = dict(zip(clean, inner, strict=True))
    result: dict[str, str] = {}
    for own, name in clean.items():
        if name in result:
            raise CheckpointError(
                f"{path} has '{result[name]:.100}' and '{own:.100}', which are one tensor without the prefixes of "
                "wrappers. Save the state dict of the module inside the wrapper."
            )
        result[name] = own
    return result
