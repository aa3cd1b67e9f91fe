"""The name of a domain or an expert, and the settings of a single expert."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from btm_scale.config.model import ModelConfig
from btm_scale.config.section import Section
from btm_scale.config.training import BranchConfig
from btm_scale.run_dir import LONGER_DENSE, OWN_NAMES


def require_name(name: str, what: str = "a domain") -> str:
    """Return the name of a domain or an expert. Raises ValueError if it cannot name a folder and a job."""
    if name in OWN_NAMES or name.startswith(LONGER_DENSE):
        raise ValueError(f"'{name}' is a reserved name. The run stores a model or a log under it: choose another name.")
    allowed = name.replace("-", "").replace("_", "").replace(".", "")
    if not (allowed.isascii() and allowed.isalnum() and name[0].isalnum() and len(name) <= 64):
        raise ValueError(
            f"'{name}' cannot name {what}. Use up to 64 letters, digits, '-', '_' and '.', with a letter or "
            "digit first."
        )
    return name


DomainName = Annotated[str, AfterValidator(require_name)]


class ExpertConfig(Section):
    """Settings of a single expert."""

    branch: BranchConfig = BranchConfig()
    model: ModelConfig | None = Field(
        default=None,
        description="its own size; such an expert does not branch and is initialized at random",
    )
    train: Literal["all", "mlp"] = Field(
        default="all", description="the trained part; with mlp, all but the MLPs keeps the bits of the parents"
    )
    layout: dict[str, Any] = Field(default_factory=dict, description="settings that differ from layout")
    tokens: int | None = Field(default=None, gt=0, description="training tokens; default: an equal part of the budget")
    batch_tokens: int | None = Field(default=None, gt=0, description="tokens per step; default: an equal part")
