"""Choose block shapes by vendor, architecture, shared memory and problem size."""

from __future__ import annotations

from btm_scale.kernels.hardware import Hardware
from btm_scale.kernels.tuning_table import DEFAULT, MIX_RULES, SAME_AS, SCORE_RULES, MixConfig, ScoreConfig

_SMALL_MIX_BLOCK = 512


def row_name(hardware: Hardware) -> str:
    """Return the table's name for an architecture: its own, that of a similar one, or its vendor's default."""
    if hardware.arch in MIX_RULES:
        return hardware.arch
    return SAME_AS.get(hardware.arch) or DEFAULT[hardware.vendor]


def score_configs(
    hardware: Hardware, bits: int, tokens: int, hidden: int, *, aligned: bool = True
) -> list[ScoreConfig]:
    """Return the shapes for a problem, best first, each with smaller blocks than the one before it.

    A rule applies if its element width is `bits`, its min_tokens and min_hidden are met, and its shape fits the
    device's shared memory. Rows that do not start at a multiple of 16 bytes use narrow loads, for which only small
    blocks have enough registers.
    """
    name = row_name(hardware)
    return [
        rule.config
        for rule in reversed(SCORE_RULES)
        if rule.arch == name
        and rule.bits == bits
        and tokens >= rule.min_tokens
        and hidden >= rule.min_hidden
        and (aligned or not rule.aligned)
        and rule.config.shared_bytes(bits) <= hardware.shared_bytes
    ]


def mix_configs(hardware: Hardware) -> list[MixConfig]:
    """Return the shapes of the mixing kernels, best first."""
    best = MIX_RULES[row_name(hardware)]
    return [best] if best.block <= _SMALL_MIX_BLOCK else [best, best._replace(block=_SMALL_MIX_BLOCK)]
