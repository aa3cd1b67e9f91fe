"""Read a LoRA adapter together with its base model, as the complete model that PEFT would merge them into."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import local
from typing import Any

import torch

from btm_scale.checkpoint.expected import EMBEDDINGS, ties_embeddings
from btm_scale.checkpoint.formats.based import ADAPTER_CONFIG, ADAPTER_FILES
from btm_scale.checkpoint.formats.lora_settings import read_lora_settings
from btm_scale.checkpoint.formats.newer_names import newer_forms, newer_names
from btm_scale.checkpoint.formats.pytorch_bin import open_state_dict
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, unknown_tensor
from btm_scale.errors import CheckpointError, few_names
from btm_scale.util.inside import file_inside

_PREFIX = "base_model.model."
_MATRIX = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<leaf>weight|bias))?"
)
# Parts of the names of tensors that are saved in full, which the base's names do not have.
_WRAPPER = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)(?=\.)")
_CONV1D_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # weights are [inputs, outputs]
_HEAD = "lm_head.weight"
_NEW_ROWS = ("new_embeddings.safetensors", "new_embeddings.bin")  # which vLLM once read beside adapters
# A block's rows do not depend on the range that is read, so that a product has the same bits for any range.
_BLOCK_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class _Product:
    """What an adapter adds to a weight: `scale` times the product of `left` [rows, rank] and `right` [rank, columns].

    `transposed`: the file holds the transposes.
    """

    left: str
    right: str
    transposed: bool
    scale: float


@dataclass(frozen=True)
class _Bias:
    """What an adapter adds to a bias."""

    name: str
    scale: float


class PeftModel(ModelReader):
    """A base model with an adapter merged into it, under the base's names and in its dtypes.

    Products are computed in float64 in blocks of rows while they are read, added to the base's values, and rounded
    once. Raises `CheckpointError` for adapters that are not plain LoRA, and for one that does not fit its base.
    """

    def __init__(self, path: Path, base: ModelReader, config: Mapping[str, Any]) -> None:
        self.path = path
        self._base = base
        self._settings = read_lora_settings(path)
        self._adapter = _open_adapter(path)
        self._conv1d = config.get("model_type") in _CONV1D_FAMILIES or (not config and self._settings.transposed)
        self._local = local()
        self._full: dict[str, str] = {}  # tensors saved in full, by the base's name
        self._added: dict[str, _Product | _Bias] = {}
        names = _BaseNames(base.names)
        self._tied = _tied_embedding(base, config)
        # If only one of a tied embedding and head was trained, the head starts from the embedding's own weights.
        self._untied: dict[str, str] = {}
        matrices: dict[str, dict[str, str]] = defaultdict(dict)
        for key in self._adapter.names:
            match = _MATRIX.fullmatch(key.removeprefix(_PREFIX))
            if match is None:
                self._take_full(key, names, tied=_HEAD not in base.names)
            else:
                part = ("bias_" if match["leaf"] == "bias" else match["kind"] or "") + match["side"]
                if part in matrices[match["module"]] or part == "bias_A":
                    raise self._unfit(f"has '{key:.200}', which plain LoRA has not, or has it twice")
                matrices[match["module"]][part] = key
        for module, parts in matrices.items():
            self._take_product(module, parts, names)
        self._specs = {name: base.spec(name) for name in base.names}
        self._untie()
        dtype = max(self._specs.values(), key=lambda spec: spec.elements).dtype if self._specs else torch.float32
        for name, key in self._full.items():
            known = self._specs.get(name)
            self._specs[name] = TensorSpec(known.dtype if known else dtype, self._adapter.spec(key).shape)
        self._names = tuple(sorted(self._specs))

    def _untie(self) -> None:
        """Give the head its own weights if its embedding, or the head alone, was trained."""
        tied, settings = self._tied, self._settings
        if tied is None or settings.keeps_ties or _HEAD in self._full:
            return
        is_saved = tied in self._full and settings.saves(tied)
        if is_saved or tied in self._added or _HEAD in self._added:
            if tied in self._full and not is_saved:  # as it was before training, perhaps with more rows
                self._full[_HEAD] = self._full[tied]
            self._untied[_HEAD] = tied
            self._specs[_HEAD] = self._base.spec(tied)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return self._names

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's dtype and shape."""
        if name not in self._specs:
            raise unknown_tensor(self.path, name)
        return self._specs[name]

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with row-major elements from `start`."""
        self.spec(name)
        stop, full, added = start + out.numel(), self._full.get(name), self._added.get(name)
        if full is None:
            self._base.read_into(self._untied.get(name, name), start, out)
        if full is None and added is None:
            return
        values = out if full is None else self._adapter.read_range(full, start, stop)
        if isinstance(added, _Bias):
            values = values.double().add_(self._adapter.read_range(added.name, start, stop).double(), alpha=added.scale)
        elif added is not None:
            values = self._sum(name, added, start, values.double())
        out.copy_(values)

    def close(self) -> None:
        """Close the base and the adapter."""
        self._base.close()
        self._adapter.close()

    def _take_full(self, key: str, names: _BaseNames, *, tied: bool) -> None:
        """Record a tensor that the adapter holds in full."""
        own = key.removeprefix(_PREFIX)
        if ".original_module." in own and self._settings.saves(own):
            return  # PEFT saves it with a resized embedding; the trained copy replaces it
        if "lora_" in own or ".token_adapter." in own or ".original_module." in own:
            raise CheckpointError(
                f"{self.path} has the tensor '{key:.200}', which plain LoRA has not. Merge this adapter with PEFT's "
                "merge_and_unload(), and save the complete model."
            )
        own = _WRAPPER.sub("", own)
        name = names.find(own)
        saved = self._settings.saves(own)
        if name is None and own == _HEAD and tied and not saved:
            return  # PEFT saves the output embedding with the input's, also if it is the same tensor
        if name is None and not (own == _HEAD and saved):
            raise self._unfit(f"has '{own:.200}', which the base lacks")
        ours, known = self._adapter.spec(key), names.spec(name, self._base)
        rows_may_differ = len(ours.shape) == 2 and own.endswith((*EMBEDDINGS, _HEAD))
        if known is not None and known.shape[int(rows_may_differ) :] != ours.shape[int(rows_may_differ) :]:
            raise self._unfit(f"has '{own:.200}' {list(ours.shape)}, which is {list(known.shape)} in the base")
        if (name or own) in self._full:
            raise self._unfit(f"has '{own:.200}' twice")
        self._full[name or own] = key

    def _take_product(self, module: str, parts: Mapping[str, str], names: _BaseNames) -> None:
        """Record what the adapter adds to a module's weight and bias."""
        sides = {side: key for side, key in parts.items() if not side.startswith("bias")}
        embedded = set(sides) == {"embedding_A", "embedding_B"}
        if not embedded and set(sides) != {"A", "B"}:
            raise self._unfit(f"has only {few_names(sides.values(), 'tensors')} for '{module:.200}'")
        a, b = (sides["embedding_A"], sides["embedding_B"]) if embedded else (sides["A"], sides["B"])
        left, right = self._adapter.spec(b).shape, self._adapter.spec(a).shape
        name = own = names.find(f"{module}.weight")
        if name is None and f"{module}.weight" == _HEAD and self._tied and not self._settings.keeps_ties:
            name, own = _HEAD, self._tied
        if name is None or own is None:
            raise self._unfit(f"has matrices for '{module:.200}', which the base lacks")
        # PEFT saves a targeted embedding in full too; the product is added to that.
        shape = (self._adapter.spec(self._full[own]) if own in self._full else self._base.spec(own)).shape
        if len(left) != 2 or len(right) != 2 or left[1] != right[0] or not self._base.spec(own).is_floating_point:
            raise self._unfit(f"has matrices {list(left)} and {list(right)} for '{name:.200}' {list(shape)}")
        plain, swapped = (left[0], right[1]), (right[1], left[0])
        transposed = embedded or (swapped == shape and (plain != shape or (self._conv1d and name != _HEAD)))
        if shape != (swapped if transposed else plain):
            raise self._unfit(f"has matrices {list(left)} and {list(right)} for '{name:.200}' {list(shape)}")
        if name in self._added:
            raise self._unfit(f"has matrices for '{name:.200}' twice")
        scale = self._settings.scale(module, left[1])
        self._added[name] = _Product(a, b, True, scale) if transposed else _Product(b, a, False, scale)
        if key := parts.get("bias_B"):
            bias = names.find(f"{module}.bias")
            if bias is None or self._base.spec(bias).shape != self._adapter.spec(key).shape:
                raise self._unfit(f"has a bias for '{module:.200}', which the base lacks")
            self._added[bias] = _Bias(key, scale)

    def _unfit(self, fact: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} {fact}. An adapter fits only the model that it was trained on, {self._base.path} is another: "
            "give the adapter's own base (--base DIR; `base` in Python)."
        )

    def _sum(self, name: str, product: _Product, start: int, values: torch.Tensor) -> torch.Tensor:
        """Add the elements of a product from `start` to float64 `values`, in place, and return them."""
        rows, columns = self._specs[name].shape
        position, stop = start, start + values.numel()
        per_block = max(1, _BLOCK_ELEMENTS // max(columns, 1))
        while position < stop:
            first = position // columns // per_block * per_block
            block = self._block(name, product, first, min(first + per_block, rows))
            begin, end = first * columns, min(stop, first * columns + block.numel())
            values[position - start : end - start] += block[position - begin : end - begin]
            position = end
        return values

    def _block(self, name: str, product: _Product, first: int, last: int) -> torch.Tensor:
        """Return rows [first, last) of a product in float64, flat; each thread keeps the last block."""
        cached = self._local.__dict__
        if cached.get("name") != name:
            left, right = self._adapter.read(product.left), self._adapter.read(product.right)
            if product.transposed:
                left, right = left.T, right.T
            cached.update(name=name, left=left, right=right.double().contiguous(), first=None)
        if cached["first"] != first:
            rows = cached["left"][first:last].double().contiguous()
            cached.update(first=first, block=(rows @ cached["right"]).mul_(product.scale).reshape(-1))
        block: torch.Tensor = cached["block"]
        return block


def config_changes(path: Path) -> dict[str, object]:
    """Return the settings of the base's config.json that the adapter in a folder changes: its vocabulary and ties."""
    settings, changes = read_lora_settings(path), dict[str, object]()
    with _open_adapter(path) as adapter:
        for key in adapter.names:
            name = _WRAPPER.sub("", key.removeprefix(_PREFIX))
            if name.endswith(EMBEDDINGS) and "lora_" not in name:
                changes["vocab_size"] = adapter.spec(key).shape[0] if adapter.spec(key).shape else 0
            match = _MATRIX.fullmatch(name)
            added = match is not None and f"{match['module']}.weight".endswith((*EMBEDDINGS, _HEAD))
            if settings.unties(name) or (name == _HEAD and settings.saves(name)) or (added and not settings.keeps_ties):
                changes["tie_word_embeddings"] = False
    return changes


def _tied_embedding(base: ModelReader, config: Mapping[str, Any]) -> str | None:
    """Return the embedding to which a model's head is tied, or None."""
    if _HEAD in base.names or not ties_embeddings(config):
        return None
    return next((name for name in base.names if name.endswith(EMBEDDINGS)), None)


class _BaseNames:
    """The base's names by those of an adapter, which may have been trained on the model inside or around the base's."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._newer = newer_names(self._names) or {}
        self._ends: dict[str, list[str]] = defaultdict(list)
        for name in self._names:
            self._ends[".".join(name.split(".")[-2:])].append(name)

    def find(self, name: str) -> str | None:
        """Return the base's name of a tensor, or None if no tensor or several tensors match."""
        if name in self._names:
            return name
        if name in self._newer:
            return self._newer[name]
        if renamed := [newer for newer in newer_forms(name) if newer in self._names]:
            return renamed[0]
        near = self._ends.get(".".join(name.split(".")[-2:]), ())
        matches = [other for other in near if other.endswith(f".{name}") or name.endswith(f".{other}")]
        return matches[0] if len(matches) == 1 else None

    @staticmethod
    def spec(name: str | None, base: ModelReader) -> TensorSpec | None:
        """Return the spec of a tensor of the base, if it is one."""
        return None if name is None else base.spec(name)


def _open_adapter(path: Path) -> ModelReader:
    if rows := next((name for name in _NEW_ROWS if (path / name).is_file()), None):
        raise CheckpointError(
            f"{path} has rows for added tokens in {rows}, which are not read. Save the adapter with the embedding and "
            "LM head in modules_to_save, and remove the file."
        )
    file = next(file_inside(path, name) for name in ADAPTER_FILES if (path / name).is_file())
    adapter = SafetensorsModel(file) if file.suffix == ".safetensors" else open_state_dict(file)
    if odd := [name for name in adapter.names if not adapter.spec(name).dtype.is_floating_point]:
        raise CheckpointError(f"{file}: '{odd[0]:.200}' has a dtype that is not a float. Save the adapter again.")
    if empty := [name for name in adapter.names if not adapter.spec(name).elements]:
        raise CheckpointError(
            f"{file} has no values for {few_names(empty, 'tensors')}. ZeRO 3 leaves empty tensors in place of "
            "parameters that are partitioned across ranks. Gather them before you save the adapter: with transformers' "
            "Trainer, set stage3_gather_16bit_weights_on_model_save in the DeepSpeed config."
        )
    if not adapter.names:
        raise CheckpointError(f"{file} has no tensors, so {ADAPTER_CONFIG} describes nothing. Save the adapter again.")
    return adapter
