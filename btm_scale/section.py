"""Section: what every part of the YAML is built on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the YAML: strict, and never changed once it is made."""

    # No setting of a run has infinity or "not a number" for a value; YAML can write both.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
