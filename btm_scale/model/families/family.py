"""What a model family declares: the parts that its models are built of, its config.json and its tensors' names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from btm_scale.model.shape import ModelShape

Form = Literal["plain", "transposed", "query_key_value", "query_key_value_fused", "gate_up", "vocabulary"]
Config = Mapping[str, Any]  # what a config.json holds


@dataclass(frozen=True)
class Entry:
    """One Megatron-core tensor and the Hugging Face tensors that hold the same numbers."""

    megatron: str
    huggingface: tuple[str, ...]
    form: Form = "plain"
    cut: int | None = None  # the dimension that tensor parallel ranks share, if any


def no_problems(config: Config) -> dict[str, bool]:
    """Nothing in a config.json that cannot be built."""
    return {}


@dataclass(frozen=True)
class Family:
    """A family of decoder-only transformers; free of torch.

    `from_config` gives the fields of ModelShape, all but `family`, and raises KeyError for a size that is missing.
    `to_config` gives what config.json has beside the keys that all families share. `tensors` gives every tensor, in
    the order of the layers. `unsupported` gives, by name, whether a config.json has each setting that changes what
    the weights mean and that our model doesn't have.
    """

    name: str  # model_type in config.json
    architecture: str  # the class in transformers
    from_config: Callable[[Config], dict[str, Any]]
    to_config: Callable[[ModelShape], dict[str, Any]]
    tensors: Callable[[ModelShape], Iterator[Entry]]
    unsupported: Callable[[Config], dict[str, bool]] = no_problems

    rotary: bool = True  # rotary positions; otherwise learned ones
    rms_norm: bool = True  # otherwise a layer norm with biases
    gated: bool = True  # an MLP gated by SiLU; otherwise one of two layers with GELU (tanh)
    linear_bias: bool = False  # biases in the attention's output and the MLP
    query_key_value_bias: bool = False
    head_norms: bool = False  # a norm of every head's query and key
    windowed: bool = False  # a token may see a window of tokens only
    grouped: bool = True  # KV heads may be fewer than heads, and heads of any size
    always_tied: bool = False  # the LM head is the embedding
    tied_by_default: bool = False  # where config.json doesn't say
