"""The supported model families: one file per family, or per related families, and one entry here."""

from __future__ import annotations

from btm_scale.errors import unknown_name
from btm_scale.model.families.family import Family
from btm_scale.model.families.gpt2 import GPT2
from btm_scale.model.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3

FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2)}


def find_family(name: str) -> Family:
    """Return the family called `name`. Raises `ValueError`, suggesting the nearest name, for an unknown one."""
    if name not in FAMILIES:
        raise ValueError(unknown_name("model family", name, FAMILIES))
    return FAMILIES[name]
