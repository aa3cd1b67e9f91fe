"""The shape of a model: everything that fixes its tensors, free of torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from btm_scale.model.families import FAMILIES, find_family
from btm_scale.model.families.family import Family

FamilyName = Annotated[str, AfterValidator(lambda name: find_family(name).name)]


class RopeScaling(BaseModel):
    """How rotary positions are stretched beyond the length that they were first trained for.

    `linear` divides every frequency by `factor` (arXiv 2306.15595). `llama3` divides those that turn fewer than
    `low` times within `original` positions, leaves those that turn more than `high` times, and goes from the one to
    the other between.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["linear", "llama3"]
    factor: float = Field(ge=1)
    low: float = Field(default=1.0, gt=0)
    high: float = Field(default=4.0, gt=0)
    original: int = Field(default=8192, gt=0, description="positions")

    @model_validator(mode="after")
    def _ordered(self) -> RopeScaling:
        if self.low >= self.high:
            raise ValueError(f"rope_scaling: low {self.low:g} must be less than high {self.high:g}")
        return self


class ModelShape(BaseModel):
    """Family and sizes of a decoder-only transformer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: FamilyName = "llama"
    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0, description="key-value heads; equal to `heads` without grouping")
    head_size: int = Field(
        default_factory=lambda sizes: sizes["hidden"] // sizes["heads"],
        gt=0,
        description="numbers in a head's query",
    )
    ffn: int = Field(gt=0)
    positions: int = Field(gt=0, description="longest sequence in tokens")
    vocabulary: int = Field(gt=0)
    tied: bool = True
    norm_epsilon: float = Field(default=1e-5, gt=0)
    rope_theta: float = Field(default=10_000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    window: int | None = Field(default=None, gt=0, description="tokens that a token sees, itself included")

    @model_validator(mode="after")
    def _sizes_fit(self) -> ModelShape:
        if self.hidden % self.heads and self.head_size == self.hidden // self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}; change either")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}; change either")
        if self.rotary and self.head_size % 2:
            raise ValueError(f"rotary positions need an even head size, not {self.head_size}; change heads")
        if self.window is not None and not self.traits.windowed:
            others = " or ".join(family.name for family in FAMILIES.values() if family.windowed)
            raise ValueError(f"the {self.family} family has no window; leave it out, or use the {others} family")
        if not self.traits.grouped and self.head_size * self.heads != self.hidden:
            raise ValueError(f"the {self.family} family has heads of size hidden / heads; leave head_size out")
        if not self.traits.grouped and self.kv_heads != self.heads:
            raise ValueError(f"the {self.family} family has no grouped heads; set kv_heads to heads")
        if self.traits.always_tied and not self.tied:
            raise ValueError(f"the {self.family} family ties its embeddings; set tied to true")
        return self

    @property
    def traits(self) -> Family:
        """What its family declares."""
        return FAMILIES[self.family]

    @property
    def rotary(self) -> bool:
        """Whether positions are rotary; otherwise they are learned."""
        return self.traits.rotary

    @property
    def query_key_value_bias(self) -> bool:
        """Whether query, key and value have biases."""
        return self.traits.query_key_value_bias

    @property
    def head_norms(self) -> bool:
        """Whether every head's query and key are normed."""
        return self.traits.head_norms

    @property
    def up_width(self) -> int:
        """Rows of the MLP's first matrix: of the gate too, where there is one."""
        return self.ffn * (2 if self.traits.gated else 1)

    @property
    def query_width(self) -> int:
        """Numbers in all heads' queries of a token."""
        return self.heads * self.head_size

    @property
    def query_key_value_width(self) -> int:
        """Numbers in all queries, keys and values of a token."""
        return (self.heads + 2 * self.kv_heads) * self.head_size

    @property
    def parameters(self) -> int:
        """Number of parameters, biases and embeddings counted."""
        norm = self.hidden * (1 if self.traits.rms_norm else 2)
        layer = self.hidden * (self.query_key_value_width + self.query_width + self.up_width + self.ffn) + 2 * norm
        layer += self.query_key_value_width if self.query_key_value_bias else 0
        layer += self.up_width + 2 * self.hidden if self.traits.linear_bias else 0
        layer += 2 * self.head_size if self.head_norms else 0
        embedding = self.vocabulary * self.hidden * (1 if self.tied else 2)
        embedding += 0 if self.rotary else self.positions * self.hidden
        return embedding + self.layers * layer + norm

    def tensor_degrees(self) -> list[int]:
        """The tensor parallel degrees that divide heads, KV heads and the MLP."""
        common = math.gcd(self.heads, self.kv_heads, self.ffn)
        return [degree for degree in range(1, common + 1) if common % degree == 0]

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of forward and backward for one token: 6 for every weight that is
        multiplied, and the attention's two products (12 x layers x queries x length, halved by the causal mask;
        appendix B of arXiv 2204.02311)."""
        multiplied = self.parameters - (0 if self.tied else self.vocabulary * self.hidden)
        if not self.rotary:
            multiplied -= self.positions * self.hidden
        return 6.0 * multiplied + 6.0 * self.layers * self.query_width * sequence_length


# Sizes of a preset; vocabulary and positions come from the run.
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
