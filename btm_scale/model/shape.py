"""The shape of a model: everything that determines its tensors. Imports no torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from btm_scale.model.families import FAMILIES, MIXTURE_OF, READABLE, SHARED_MIXTURE_OF, find_family
from btm_scale.model.families.family import Family

FamilyName = Annotated[str, AfterValidator(lambda name: find_family(name).name)]


_MAX_SIZE = 1 << 31
_MAX_MLPS = 1_000_000


class RopeScaling(BaseModel):
    """Scaling of rotary positions beyond the original context length.

    `linear` divides every frequency by `factor` (arXiv 2306.15595). `llama3` divides frequencies with fewer than `low`
    rotations within `original` positions, keeps those with more than `high`, and interpolates in between. `yarn` (arXiv
    2309.00071) interpolates between dimensions, those of `low` and `high` rotations, which `truncate` rounds outwards,
    and multiplies queries and keys by `attention`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["linear", "llama3", "yarn"]
    factor: float = Field(ge=1)
    low: float = Field(default=1.0, gt=0)
    high: float = Field(default=4.0, gt=0)
    original: int = Field(default=8192, gt=0, description="positions")
    attention: float = Field(default=1.0, gt=0)
    truncate: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> RopeScaling:
        if self.low >= self.high:
            raise ValueError(
                f"rope_scaling has low={self.low:g} and high={self.high:g}. low must be below high: change either."
            )
        return self


class ModelShape(BaseModel):
    """Family and sizes of a decoder-only transformer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: FamilyName = "llama"
    layers: int = Field(gt=0, le=10_000)
    hidden: int = Field(gt=0, lt=_MAX_SIZE)
    heads: int = Field(gt=0, le=100_000)
    kv_heads: int = Field(gt=0, description="KV heads; equal to `heads` without grouped-query attention")
    head_size: int = Field(
        default_factory=lambda sizes: sizes["hidden"] // sizes["heads"],
        gt=0,
        lt=_MAX_SIZE,
        description="dimension of a head",
    )
    ffn: int = Field(gt=0, lt=_MAX_SIZE)
    positions: int = Field(gt=0, lt=_MAX_SIZE, description="longest sequence in tokens")
    vocabulary: int = Field(gt=0, lt=_MAX_SIZE)
    tied: bool = True
    norm_epsilon: float = Field(default=1e-5, gt=0)
    rope_theta: float = Field(default=10_000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    window: int | None = Field(default=None, gt=0, description="sliding window in tokens, including the current one")
    experts: int = Field(default=0, ge=0, le=100_000, description="MLPs of a layer in a mixture of experts, else 0")
    top_k: int = Field(default=0, ge=0, description="experts that compute each token")
    shared_ffn: int = Field(default=0, ge=0, lt=_MAX_SIZE, description="width of the expert that computes every token")

    @model_validator(mode="after")
    def _sizes_fit(self) -> ModelShape:
        if self.hidden % self.heads and self.head_size == self.hidden // self.heads:
            raise ValueError(f"hidden={self.hidden} is not a multiple of heads={self.heads}. Change either.")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}. Change either.")
        if self.rotary and self.head_size % 2:
            raise ValueError(f"The head size is {self.head_size}. Rotary positions need an even one: change heads.")
        if self.window is not None and not self.traits.windowed:
            others = " or ".join(family.name for family in FAMILIES.values() if family.windowed)
            raise ValueError(f"The {self.family} family has no window. Leave window out, or use the {others} family.")
        if not self.traits.grouped and self.head_size * self.heads != self.hidden:
            raise ValueError(f"The {self.family} family has heads of size hidden / heads. Leave head_size out.")
        if not self.traits.grouped and self.kv_heads != self.heads:
            raise ValueError(f"The {self.family} family has no grouped-query attention. Set kv_heads to heads.")
        if self.traits.always_tied and not self.tied:
            raise ValueError(f"The {self.family} family ties its embeddings. Set tied to true.")
        if self.traits.mixture and not 1 <= self.top_k <= self.experts:
            raise ValueError(
                f"Each token is computed by {self.top_k} of {self.experts} experts. top_k must be at least 1 and at "
                "most the number of experts."
            )
        if self.layers * self.experts > _MAX_MLPS:
            raise ValueError(
                f"{self.layers} layers of {self.experts} experts are more than {_MAX_MLPS} MLPs. Change either."
            )
        if not self.traits.mixture and (self.experts or self.top_k):
            raise ValueError(f"The {self.family} family has no experts in its layers. Leave experts and top_k out.")
        if self.traits.shared_expert != (self.shared_ffn > 0):
            has, remedy = ("a", "Set") if self.traits.shared_expert else ("no", "Leave out")
            raise ValueError(f"The {self.family} family has {has} shared expert. {remedy} shared_ffn.")
        return self

    @property
    def traits(self) -> Family:
        """Traits of the family."""
        return READABLE[self.family]

    @property
    def rotary(self) -> bool:
        """Whether positions are rotary rather than learned."""
        return self.traits.rotary

    @property
    def query_key_value_bias(self) -> bool:
        """Whether query, key and value have biases."""
        return self.traits.query_key_value_bias

    @property
    def head_norms(self) -> bool:
        """Whether every head's query and key are normalized."""
        return self.traits.head_norms

    @property
    def up_width(self) -> int:
        """Rows of the MLP's first matrix, including the gate if there is one."""
        return self.ffn * (2 if self.traits.gated else 1)

    @property
    def query_width(self) -> int:
        """Dimensions of all queries of a token."""
        return self.heads * self.head_size

    @property
    def query_key_value_width(self) -> int:
        """Dimensions of all queries, keys and values of a token."""
        return (self.heads + 2 * self.kv_heads) * self.head_size

    @property
    def parameters(self) -> int:
        """Number of parameters, including biases and embeddings."""
        return self._parameters(self.experts)

    @property
    def active_parameters(self) -> int:
        """Number of parameters that compute a token: of a mixture, with `top_k` experts."""
        return self._parameters(self.top_k)

    def _parameters(self, experts: int) -> int:
        norm = self.hidden * (1 if self.traits.rms_norm else 2)
        layer = self.hidden * (self.query_key_value_width + self.query_width) + 2 * norm
        layer += self.hidden * ((self.up_width + self.ffn) * (experts or 1) + self.experts)  # and the router
        layer += self.hidden * (self._shared_width + 1) if self.shared_ffn else 0  # and its gate
        layer += self.query_key_value_width if self.query_key_value_bias else 0
        layer += self.up_width + 2 * self.hidden if self.traits.linear_bias else 0
        layer += 2 * self.head_size if self.head_norms else 0
        embedding = self.vocabulary * self.hidden * (1 if self.tied else 2)
        embedding += 0 if self.rotary else self.positions * self.hidden
        return embedding + self.layers * layer + norm

    def trained_parameters(self, part: str) -> int:
        """Return the number of parameters in a `TrainedPart`."""
        return self.parameters if part == "all" else self._trained(part, self.experts)

    def layer_matrices(self, part: str = "all") -> int:
        """Return the weights of the layers' matrix products in a `TrainedPart`, without routers and the LM head."""
        attention = self.query_key_value_width + self.query_width if part == "all" else 0
        mlp = 0 if part == "router" else (self.up_width + self.ffn) * (self.experts or 1) + self._shared_width
        return self.layers * self.hidden * (attention + mlp)

    def _trained(self, part: str, experts: int) -> int:
        """Return the number of parameters in the part `mlp` or `router`, with `experts` MLPs per layer."""
        mlp = self.hidden * (self.up_width + self.ffn) + (self.up_width + self.hidden) * self.traits.linear_bias
        return self.layers * (self.experts * self.hidden + (mlp * (experts or 1) if part == "mlp" else 0))

    @property
    def _shared_width(self) -> int:
        """Weights of the shared expert per hidden unit."""
        return self.shared_ffn * (3 if self.traits.gated else 2)

    def mixture(self, experts: int, top_k: int, *, shared_expert: bool = False) -> ModelShape:
        """Return the shape of the mixture of experts whose experts are MLPs of this shape, with an untied LM head.

        `shared_expert`: one more of them computes every token. Raises ValueError if no class computes it, and for an
        impossible `top_k`.
        """
        families = SHARED_MIXTURE_OF if shared_expert else MIXTURE_OF
        family = families.get(self.family)
        if family is None:
            raise ValueError(
                f"{self.family} layers have no mixture-of-experts class{_no_mixture(self.family, shared_expert)} Use "
                f"models of {', '.join(families)}."
            )
        if self.window is not None and not family.windowed:
            raise ValueError(
                f"{self.family} layers with a window of {self.window} have no mixture-of-experts class with a shared "
                f"expert: the attention of {family.architecture} has no window. Leave the shared expert out."
            )
        # Tied heads of mixtures get lost in vLLM, llama.cpp and mlx-lm.
        changes: dict[str, object] = {"family": family.name, "experts": experts, "top_k": top_k, "tied": False}
        changes |= {"shared_ffn": self.ffn} if shared_expert else {}
        return ModelShape.model_validate(self.model_dump() | changes)

    def tensor_degrees(self) -> list[int]:
        """Return the tensor parallel degrees that divide heads, KV heads and MLP width."""
        common = math.gcd(self.heads, self.kv_heads, self.ffn)
        return [degree for degree in range(1, common + 1) if common % degree == 0]

    def flops_per_token(self, sequence_length: int, part: str = "all") -> float:
        """Return the floating-point operations of forward and backward for one token.

        6 per weight in a matrix product, 4 if it is not in the trained `part`, plus the two products of attention:
        12 x layers x query width x length, halved by the causal mask (appendix B of arXiv 2204.02311).
        """
        multiplied = self.active_parameters - (0 if self.tied else self.vocabulary * self.hidden)
        if not self.rotary:
            multiplied -= self.positions * self.hidden
        frozen = 0 if part == "all" else multiplied - self._trained(part, self.top_k)
        return 6.0 * multiplied - 2.0 * frozen + 6.0 * self.layers * self.query_width * sequence_length


def kv_head_copies(kv_heads: int, context: int) -> int:
    """Return how often each KV head is copied, so that `context` ranks get equal numbers of them."""
    return math.lcm(kv_heads, context) // kv_heads


def _no_mixture(family: str, shared_expert: bool) -> str:
    """Return why a family has no mixture."""
    if family == "qwen2":
        return ": its only mixture has a shared expert."
    if family == "qwen3" and shared_expert:
        return " with a shared expert: Qwen3MoeForCausalLM has none. Leave the shared expert out."
    return ": transformers has none."


# Sizes of the presets; vocabulary and positions come from the run.
_LLAMA = {"family": "llama"}
_PAPER = {"family": "gpt2", "norm_epsilon": 1e-5}
PRESETS: dict[str, dict[str, object]] = {
    "llama-1m": _LLAMA | {"layers": 4, "hidden": 128, "heads": 4, "kv_heads": 4, "ffn": 352},
    "llama-4m": _LLAMA | {"layers": 4, "hidden": 256, "heads": 4, "kv_heads": 4, "ffn": 688},
    "llama-30m": _LLAMA | {"layers": 8, "hidden": 512, "heads": 8, "kv_heads": 4, "ffn": 1376},
    "llama-1.3b": _LLAMA | {"layers": 24, "hidden": 2048, "heads": 16, "kv_heads": 16, "ffn": 5504},
    "gpt2-1m": _PAPER | {"layers": 4, "hidden": 128, "heads": 4, "kv_heads": 4, "ffn": 512},
    # The sizes of arXiv 2208.03306, section 4.
    "gpt2-125m": _PAPER | {"layers": 12, "hidden": 768, "heads": 12, "kv_heads": 12, "ffn": 3072},
    "gpt2-350m": _PAPER | {"layers": 24, "hidden": 1024, "heads": 16, "kv_heads": 16, "ffn": 4096},
    "gpt2-750m": _PAPER | {"layers": 24, "hidden": 1536, "heads": 16, "kv_heads": 16, "ffn": 6144},
    "gpt2-1.3b": _PAPER | {"layers": 24, "hidden": 2048, "heads": 32, "kv_heads": 32, "ffn": 8192},
}
