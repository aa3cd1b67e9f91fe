"""Llama's tensors under the names of Meta's and torchtitan's code, read under their Hugging Face names."""

from __future__ import annotations

import re
from pathlib import Path
from threading import local

import torch

from btm_scale.checkpoint.formats.megatron import find_shape
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, unknown_tensor
from btm_scale.errors import CheckpointError, few_names

_WHOLE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_OF_LAYER = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_LAYER = re.compile(r"layers\.(\d+)\.(.*)")
_ROTATED = re.compile(r"layers\.\d+\.attention\.w[qk]\.weight")
_DERIVED = ("freqs_cis", "rope.freqs")


def is_native_llama(model: ModelReader) -> bool:
    """Whether a model has the names of Meta's code."""
    return "tok_embeddings.weight" in model.names


class NativeLlama(ModelReader):
    """A model under its Hugging Face names; closing it closes `model`.

    Hugging Face rotates the halves of a head, and Meta's code neighbouring rows, so the rows of queries and keys are
    reordered by head. These tensors are read in full, and each thread keeps the last. Raises `CheckpointError` without
    a config.json of a Llama, and for other names.
    """

    def __init__(self, path: Path, model: ModelReader) -> None:
        self.path = path
        self._model = model
        self._local = local()
        self._native = {_huggingface(name): name for name in model.names if not name.endswith(_DERIVED)}
        if None in self._native:
            odd = [name for name in model.names if not name.endswith(_DERIVED) and _huggingface(name) is None]
            raise CheckpointError(
                f"{path} has {few_names(odd, 'tensors')} beside Llama's. Only Llama is read under the names of its "
                "original code: save the model under Hugging Face names."
            )
        self._head_size = find_shape(path).head_size
        for name in self._native.values():
            if _ROTATED.fullmatch(name) and (
                len(model.spec(name).shape) != 2 or model.spec(name).shape[0] % self._head_size
            ):
                raise CheckpointError(
                    f"{path}: '{name}' is {model.spec(name)}, but heads have {self._head_size} rows. Use the "
                    "config.json that belongs to these weights."
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Hugging Face names of all tensors, sorted."""
        return tuple(sorted(name for name in self._native if name))

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's dtype and shape."""
        if name not in self._native:
            raise unknown_tensor(self.path, name)
        return self._model.spec(self._native[name])

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with row-major elements from `start`."""
        self.spec(name)
        native = self._native[name]
        if not _ROTATED.fullmatch(native):
            self._model.read_into(native, start, out)
            return
        cached: tuple[str, torch.Tensor] | None = getattr(self._local, "cached", None)
        if cached is None or cached[0] != name:
            heads = self._model.read(native).unflatten(0, (-1, self._head_size // 2, 2))
            cached = self._local.cached = name, heads.transpose(1, 2).reshape(-1)
        out.copy_(cached[1][start : start + out.numel()])

    def close(self) -> None:
        """Close the model."""
        self._model.close()


def _huggingface(name: str) -> str | None:
    """Return the Hugging Face name of a tensor, or None if Llama has no such tensor."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return _WHOLE.get(name)
    rest = _OF_LAYER.get(match[2])
    return None if rest is None else f"model.layers.{match[1]}.{rest}"
