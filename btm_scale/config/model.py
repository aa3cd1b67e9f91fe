"""The section `model`: a preset, or a family with sizes, or a pretrained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from btm_scale.config.section import Section
from btm_scale.model.hf_config import read_shape
from btm_scale.model.shape import PRESETS, FamilyName, ModelShape


class ModelConfig(Section):
    """A preset, or a family with sizes, or a pretrained model; any size beside a preset replaces the preset's."""

    pretrained: Path | None = Field(
        default=None,
        description="a Hugging Face directory: the seed LM begins with its weights and has its tokenizer",
    )
    preset: str | None = None
    family: FamilyName | None = None
    layers: int | None = Field(default=None, gt=0)
    hidden: int | None = Field(default=None, gt=0)
    heads: int | None = Field(default=None, gt=0)
    kv_heads: int | None = Field(default=None, gt=0)
    ffn: int | None = Field(default=None, gt=0)
    tied: bool | None = None
    norm_epsilon: float | None = Field(default=None, gt=0)
    rope_theta: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _buildable(self) -> ModelConfig:
        if self.pretrained is not None:
            beside = list(self.model_dump(exclude={"pretrained"}, exclude_none=True))
            if beside:
                raise ValueError(f"a pretrained model has its own sizes; leave {', '.join(beside)} out")
            return self
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"no preset is called '{self.preset}'; choose one of {', '.join(PRESETS)}")
        self.shape(vocabulary=1, positions=1)
        return self

    def shape(self, vocabulary: int, positions: int) -> ModelShape:
        """The full shape, for a vocabulary in tokens and a longest sequence in tokens; a pretrained model has its own.

        Raises CheckpointError if the pretrained model isn't there, or is of a kind that can't be trained here.
        """
        if self.pretrained is not None:
            return read_shape(self.pretrained)
        sizes: dict[str, Any] = dict(PRESETS[self.preset]) if self.preset else {}
        sizes |= self.model_dump(exclude={"preset", "pretrained"}, exclude_none=True)
        missing = [name for name in ("layers", "hidden", "heads", "ffn") if name not in sizes]
        if missing:
            raise ValueError(f"without a preset, {', '.join(missing)} must be given too")
        if self.heads is not None and self.kv_heads is None:
            sizes["kv_heads"] = self.heads
        sizes.setdefault("kv_heads", sizes["heads"])
        return ModelShape(**sizes, vocabulary=vocabulary, positions=positions)
