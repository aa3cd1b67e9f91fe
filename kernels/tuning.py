"""Which block shapes a launch uses: the rules of `tuning_table`, looked up by GPU and problem."""

from __future__ import annotations

import functools

import torch

from btm_scale.kernels.tuning_table import MIX_RULES, SCORE_RULES, MixConfig, ScoreConfig

INTERPRETER = "interpreter"


@functools.cache
def architecture(device: torch.device) -> str:
    """The table's name for a device: its generation, or an older one whose blocks surely fit."""
    if device.type != "cuda":
        return INTERPRETER
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


def score_config(arch: str, bits: int, tokens: int, hidden: int, *, aligned: bool = True) -> ScoreConfig:
    """The last rule for these bits of an element whose least tokens and hidden size are reached.

    Rows that do not start on 16 bytes load in small pieces, which only small blocks have the registers for.
    """
    fitting = [
        rule.config
        for rule in SCORE_RULES
        if rule.arch == arch
        and rule.bits == bits
        and tokens >= rule.min_tokens
        and hidden >= rule.min_hidden
        and (aligned or not rule.aligned)
    ]
    return fitting[-1]


def mix_config(arch: str) -> MixConfig:
    """The block shapes of the mixing kernels."""
    return MIX_RULES[arch]
