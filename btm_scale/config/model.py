"""The section `model`: a preset, a family with sizes, or a pretrained model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from btm_scale.config.rope import RopeConfig
from btm_scale.config.section import Section
from btm_scale.errors import CheckpointError, unknown_name
from btm_scale.model.families import FAMILIES, MIXTURES
from btm_scale.model.hf_config import read_shape
from btm_scale.model.shape import PRESETS, FamilyName, ModelShape


class ModelConfig(Section):
    """A preset, a family with sizes, or a pretrained model; sizes given with a preset replace those of the preset."""

    pretrained: Path | None = Field(
        default=None,
        description="a Hugging Face directory: the seed LM starts from its weights and uses its tokenizer",
    )
    preset: str | None = Field(default=None, description="a named size, listed below")
    family: FamilyName | None = Field(default=None, description="architecture; default: llama")
    layers: int | None = Field(default=None, gt=0, description="number of layers")
    hidden: int | None = Field(default=None, gt=0, description="hidden size")
    heads: int | None = Field(default=None, gt=0, description="attention heads")
    kv_heads: int | None = Field(default=None, gt=0, description="KV heads; default: as many as heads")
    ffn: int | None = Field(default=None, gt=0, description="inner size of the MLP")
    tied: bool | None = Field(default=None, description="share the weights of embedding and output")
    norm_epsilon: float | None = Field(default=None, gt=0, description="epsilon of the normalization layers")
    rope_theta: float | None = Field(default=None, gt=0, description="base of the rotary embeddings")
    rope: RopeConfig | None = Field(
        default=None, description="scaling of rotary positions; it replaces that of a pretrained model"
    )

    @model_validator(mode="after")
    def _buildable(self) -> ModelConfig:
        if self.pretrained is not None:
            sizes = list(self.model_dump(exclude={"pretrained", "rope"}, exclude_none=True))
            if sizes:
                raise ValueError(
                    f"Cannot set {', '.join(sizes)} with pretrained. A pretrained model has its own sizes: remove them."
                )
            return self
        if self.family in MIXTURES:
            raise ValueError(
                f"{self.family} is a mixture of experts. Mixtures are made of trained experts and not trained: choose "
                f"{', '.join(FAMILIES)}, and make one of the forest with btm-scale upcycle."
            )
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(unknown_name("preset", self.preset, PRESETS))
        self.shape(vocabulary=1, positions=1)
        return self

    def shape(self, vocabulary: int, positions: int) -> ModelShape:
        """Return the shape of the model, for a vocabulary and a maximum sequence length in tokens.

        A pretrained model has its own length, or that of `rope`, and rows for its own vocabulary at least. Raises
        CheckpointError if it does not exist or its family is not supported, ValueError if `rope` does not fit it.
        """
        if self.pretrained is not None:
            shape = read_shape(self.pretrained)
            if shape.experts:
                raise CheckpointError(
                    f"{self.pretrained} is a mixture of experts. Mixtures are not trained here: choose a model of "
                    f"{', '.join(FAMILIES)}."
                )
            shape = shape.model_copy(update={"vocabulary": max(shape.vocabulary, vocabulary)})
            return shape if self.rope is None else self.rope.applied(shape)
        sizes: dict[str, Any] = dict(PRESETS[self.preset]) if self.preset else {}
        sizes |= self.model_dump(exclude={"preset", "pretrained", "rope"}, exclude_none=True)
        missing = [name for name in ("layers", "hidden", "heads", "ffn") if name not in sizes]
        if missing:
            raise ValueError(f"The model has no {', '.join(missing)}. Set them, or choose a preset.")
        if self.heads is not None and self.kv_heads is None:
            sizes["kv_heads"] = self.heads
        sizes.setdefault("kv_heads", sizes["heads"])
        if self.rope is None:
            return ModelShape(**sizes, vocabulary=vocabulary, positions=positions)
        # `positions` are those after scaling.
        original = positions if self.rope.original else math.ceil(positions / self.rope.factor)
        return self.rope.applied(ModelShape(**sizes, vocabulary=vocabulary, positions=original))
