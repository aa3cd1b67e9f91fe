"""The section `model.rope`: rotary positions for sequences longer than a model was trained on."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from btm_scale.config.section import Section
from btm_scale.model.families.llama import yarn_attention
from btm_scale.model.shape import ModelShape, RopeScaling


class RopeConfig(Section):
    """Scaling of rotary positions, for sequences longer than those that a model was trained on."""

    type: Literal["yarn", "llama3", "linear"] = Field(
        description="how frequencies are scaled: YaRN (arXiv 2309.00071), as Llama 3.1 does, or all of them"
    )
    factor: float = Field(ge=1, description="positions after scaling over those before")
    original: int | None = Field(
        default=None, gt=0, description="positions before scaling; default: those that the pretrained model began with"
    )

    def applied(self, shape: ModelShape) -> ModelShape:
        """Return the shape with this scaling in place of any other.

        It has `factor` times the original positions or more.

        Raises ValueError if the family has no rotary positions.
        """
        if not shape.rotary:
            raise ValueError(
                f"The {shape.family} family has learned positions, and rope scales rotary ones. Remove rope, or choose "
                "another family."
            )
        original = self.original or _original(shape)
        scaling = RopeScaling(kind=self.type, factor=self.factor, original=original)
        if self.type == "yarn":
            fields = {"low": 1.0, "high": 32.0, "attention": yarn_attention(self.factor)}
            scaling = scaling.model_copy(update=fields)
        elif self.type == "linear":
            scaling = RopeScaling(kind="linear", factor=self.factor)
        positions = max(shape.positions, math.ceil(original * self.factor))
        return shape.model_copy(update={"rope_scaling": scaling, "positions": positions})


def _original(shape: ModelShape) -> int:
    """Return the positions before the scaling that the shape already has."""
    scaling = shape.rope_scaling
    if scaling is None:
        return shape.positions
    return math.ceil(shape.positions / scaling.factor) if scaling.kind == "linear" else scaling.original
