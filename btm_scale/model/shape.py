"""The shape of a model: everything that fixes its tensors, free of torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Family = Literal["llama", "gpt2"]


class ModelShape(BaseModel):
    """Sizes of a decoder-only transformer.

    `llama`: RMS norm, rotary positions, gated SiLU, no biases (arXiv 2302.13971).
    `gpt2`: layer norm, learned positions, GELU, biases everywhere; the paper's family.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: Family = "llama"
    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    heads: int = Field(gt=0)
    groups: int = Field(gt=0, description="key-value heads; equal to `heads` without grouping")
    ffn: int = Field(gt=0)
    positions: int = Field(gt=0, description="longest sequence in tokens")
    vocabulary: int = Field(gt=0)
    tied: bool = True
    norm_epsilon: float = Field(default=1e-5, gt=0)
    rope_theta: float = Field(default=10_000.0, gt=0)

    @model_validator(mode="after")
    def _sizes_fit(self) -> ModelShape:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}; change either")
        if self.heads % self.groups:
            raise ValueError(f"heads {self.heads} is not a multiple of groups {self.groups}; change either")
        if self.family == "llama" and self.head_size % 2:
            raise ValueError(f"rotary positions need an even head size, not {self.head_size}; change heads")
        if self.family == "gpt2" and self.groups != self.heads:
            raise ValueError("the gpt2 family has no grouped heads; set groups to heads")
        if self.family == "gpt2" and not self.tied:
            raise ValueError("the gpt2 family ties its embeddings; set tied to true")
        return self

    @property
    def head_size(self) -> int:
        """Numbers in one head's query."""
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """Number of parameters, biases and embeddings counted."""
        kv = self.groups * self.head_size
        attention = self.hidden * (self.hidden + 2 * kv) + self.hidden * self.hidden
        embedding = self.vocabulary * self.hidden * (1 if self.tied else 2)
        if self.family == "llama":
            layer = attention + 3 * self.hidden * self.ffn + 2 * self.hidden
            return embedding + self.layers * layer + self.hidden
        biases = 3 * self.hidden + self.hidden + self.ffn + self.hidden
        layer = attention + 2 * self.hidden * self.ffn + biases + 4 * self.hidden
        return embedding + self.positions * self.hidden + self.layers * layer + 2 * self.hidden

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of forward and backward for one token: 6 for every weight that is
        multiplied, and the attention's two products (12 x layers x hidden x length, halved by the causal mask;
        appendix B of arXiv 2204.02311)."""
        multiplied = self.parameters - (0 if self.tied else self.vocabulary * self.hidden)
        if self.family == "gpt2":
            multiplied -= self.positions * self.hidden
        return 6.0 * multiplied + 6.0 * self.layers * self.hidden * sequence_length


# Sizes of a preset; vocabulary and positions come from the run.
_LLAMA = {"family": "llama"}
_PAPER = {"family": "gpt2", "norm_epsilon": 1e-5}
PRESETS: dict[str, dict[str, object]] = {
    "llama-1m": _LLAMA | {"layers": 4, "hidden": 128, "heads": 4, "groups": 4, "ffn": 352},
    "llama-4m": _LLAMA | {"layers": 4, "hidden": 256, "heads": 4, "groups": 4, "ffn": 688},
    "llama-30m": _LLAMA | {"layers": 8, "hidden": 512, "heads": 8, "groups": 4, "ffn": 1376},
    "llama-1.3b": _LLAMA | {"layers": 24, "hidden": 2048, "heads": 16, "groups": 16, "ffn": 5504},
    "gpt2-1m": _PAPER | {"layers": 4, "hidden": 128, "heads": 4, "groups": 4, "ffn": 512},
    # The sizes of arXiv 2208.03306, section 4.
    "gpt2-125m": _PAPER | {"layers": 12, "hidden": 768, "heads": 12, "groups": 12, "ffn": 3072},
    "gpt2-350m": _PAPER | {"layers": 24, "hidden": 1024, "heads": 16, "groups": 16, "ffn": 4096},
    "gpt2-750m": _PAPER | {"layers": 24, "hidden": 1536, "heads": 16, "groups": 16, "ffn": 6144},
    "gpt2-1.3b": _PAPER | {"layers": 24, "hidden": 2048, "heads": 32, "groups": 32, "ffn": 8192},
}
