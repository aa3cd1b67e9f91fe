"""The supported model families: one file per family, or per related families, and one entry here."""

from __future__ import annotations

from btm_scale.errors import unknown_name
from btm_scale.model.families.family import Family
from btm_scale.model.families.gpt2 import GPT2
from btm_scale.model.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from btm_scale.model.families.mixtures import MIXTRAL, MIXTURE_OF, QWEN2_MOE, QWEN3_MOE, SHARED_MIXTURE_OF

FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2)}  # which can be trained
MIXTURES = {family.name: family for family in (MIXTRAL, QWEN2_MOE, QWEN3_MOE)}
READABLE = FAMILIES | MIXTURES
__all__ = ["FAMILIES", "MIXTURES", "MIXTURE_OF", "READABLE", "SHARED_MIXTURE_OF", "find_family"]


def find_family(name: str) -> Family:
    """Return the family called `name`. Raises `ValueError`, suggesting the nearest name, for an unknown one."""
    if name not in READABLE:
        raise ValueError(unknown_name("model family", name, FAMILIES))
    return READABLE[name]
