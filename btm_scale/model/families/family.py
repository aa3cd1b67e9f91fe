"""The declaration of a model family: its architecture, its config.json and its tensor names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from btm_scale.model.shape import ModelShape

Form = Literal["plain", "transposed", "query_key_value", "query_key_value_fused", "gate_up", "vocabulary"]
Config = Mapping[str, Any]  # the content of a config.json


@dataclass(frozen=True)
class Entry:
    """A Megatron-core tensor and the Hugging Face tensors with the same elements."""

    megatron: str
    huggingface: tuple[str, ...]
    form: Form = "plain"
    cut: int | None = None  # the dimension that is sharded over tensor parallel ranks, if any


def no_problems(config: Config) -> dict[str, bool]:
    """Report no unsupported settings."""
    return {}


@dataclass(frozen=True)
class Family:
    """A family of decoder-only transformers. Imports no torch.

    `from_config` returns the fields of ModelShape except `family`, and raises `KeyError` for a missing size.
    `to_config` returns the keys of config.json that are not common to all families. `tensors` yields every tensor in
    layer order. `unsupported` maps settings that change what the weights compute, and that are not implemented, to
    whether a config.json uses them.
    """

    name: str  # model_type in config.json
    architecture: str  # the class in transformers
    from_config: Callable[[Config], dict[str, Any]]
    to_config: Callable[[ModelShape], dict[str, Any]]
    tensors: Callable[[ModelShape], Iterator[Entry]]
    unsupported: Callable[[Config], dict[str, bool]] = no_problems

    rotary: bool = True  # rotary positions, otherwise learned
    rms_norm: bool = True  # otherwise layer norm with biases
    gated: bool = True  # an MLP gated by SiLU, otherwise two layers with GELU (tanh)
    linear_bias: bool = False  # biases in the attention output and the MLP
    query_key_value_bias: bool = False
    head_norms: bool = False  # every head's query and key are normalized
    windowed: bool = False  # sliding window attention
    grouped: bool = True  # grouped-query attention, and heads of any size
    always_tied: bool = False  # the LM head is the embedding
    mixture: bool = False  # every MLP is a mixture of experts; such a model is not trained here
    shared_expert: bool = False  # of a mixture: one more expert computes every token
    tied_by_default: bool = False  # if config.json does not say
