"""Block shapes of the kernel launches, by GPU and problem size.

`benchmarks/tune_kernels.py --write` replaces the rows of the GPU that it times. The rows here are not timed: they are
the largest blocks that compile for each generation without spilling registers, which a test checks for every row.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

INTERPRETER = "interpreter"


class ScoreConfig(NamedTuple):
    """Block sizes over tokens, vocabulary and hidden size; vocabulary rows per split; token blocks per group."""

    block_t: int
    block_v: int
    block_k: int
    split: int
    group: int
    warps: int
    stages: int


class MixConfig(NamedTuple):
    """Vocabulary columns per block and per split of the first pass, warps, and bytes of logits per launch."""

    block: int
    split: int
    warps: int
    cache_bytes: int


class ScoreRule(NamedTuple):
    """Where a `ScoreConfig` applies; `aligned` requires that every row starts at a multiple of 16 bytes."""

    arch: str
    bits: int
    min_tokens: int
    min_hidden: int
    aligned: bool
    config: ScoreConfig


SCORE_RULES = [
    ScoreRule("sm_80", 16, 0, 0, False, ScoreConfig(32, 64, 32, 4096, 16, 4, 2)),
    ScoreRule("sm_80", 16, 0, 0, True, ScoreConfig(32, 128, 64, 2048, 16, 4, 3)),
    ScoreRule("sm_80", 16, 65, 0, True, ScoreConfig(128, 128, 32, 8192, 16, 8, 4)),
    ScoreRule("sm_80", 32, 0, 0, False, ScoreConfig(32, 64, 32, 4096, 16, 4, 2)),
    ScoreRule("sm_90", 16, 0, 0, False, ScoreConfig(32, 64, 32, 4096, 16, 4, 2)),
    ScoreRule("sm_90", 16, 0, 0, True, ScoreConfig(32, 128, 64, 2048, 16, 4, 3)),
    ScoreRule("sm_90", 16, 65, 0, True, ScoreConfig(128, 256, 64, 8192, 16, 8, 3)),
    ScoreRule("sm_90", 32, 0, 0, False, ScoreConfig(32, 64, 32, 4096, 16, 4, 2)),
    ScoreRule("sm_100", 16, 0, 0, False, ScoreConfig(32, 32, 32, 4096, 16, 4, 2)),
    ScoreRule("sm_100", 16, 0, 0, True, ScoreConfig(64, 128, 64, 2048, 16, 4, 3)),
    ScoreRule("sm_100", 16, 65, 0, True, ScoreConfig(256, 128, 64, 8192, 16, 8, 3)),
    ScoreRule("sm_100", 32, 0, 0, False, ScoreConfig(32, 64, 32, 4096, 16, 4, 2)),
    ScoreRule("interpreter", 16, 0, 0, False, ScoreConfig(32, 2048, 64, 4096, 2, 4, 1)),
    ScoreRule("interpreter", 16, 65, 0, False, ScoreConfig(128, 1024, 64, 2048, 2, 4, 1)),
    ScoreRule("interpreter", 32, 0, 0, False, ScoreConfig(32, 2048, 64, 4096, 2, 4, 1)),
    ScoreRule("interpreter", 32, 65, 0, False, ScoreConfig(128, 1024, 64, 2048, 2, 4, 1)),
]

MIX_RULES = {
    "sm_80": MixConfig(2048, 16384, 4, 20 << 20),
    "sm_90": MixConfig(2048, 16384, 4, 32 << 20),
    "sm_100": MixConfig(2048, 16384, 4, 64 << 20),
    "interpreter": MixConfig(4096, 8192, 4, 1 << 20),
}


@functools.cache
def architecture(device: torch.device) -> str:
    """Return the table's name for a device: its generation, or an older one whose blocks fit."""
    if device.type != "cuda":
        return INTERPRETER
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


def score_config(arch: str, bits: int, tokens: int, hidden: int, *, aligned: bool = True) -> ScoreConfig:
    """Return the last rule for this element width whose min_tokens and min_hidden are met.

    Rows that do not start at a multiple of 16 bytes use narrow loads, for which only small blocks have enough
    registers.
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
    """Return the block shapes of the mixing kernels."""
    return MIX_RULES[arch]
