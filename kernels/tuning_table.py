"""The block shapes, by architecture and problem size.

`benchmarks/tune_kernels.py --write` replaces the rows of the GPU that it times. The rows here are not timed: they are
large blocks that compile without spilling registers under every supported Triton, which a test checks for each row.
"""

from __future__ import annotations

from typing import NamedTuple


class ScoreConfig(NamedTuple):
    """Block sizes over tokens, vocabulary and hidden size; most vocabulary rows per split; token blocks per group.

    `resident` is how many blocks a multiprocessor is given at once; a test checks that registers and shared memory
    suffice for them.
    """

    block_t: int
    block_v: int
    block_k: int
    split: int
    group: int
    warps: int
    stages: int
    resident: int = 1

    @property
    def blocks(self) -> str:
        """The block's shape, for messages."""
        return f"{self.block_t}x{self.block_v}x{self.block_k}"

    def shared_bytes(self, bits: int) -> int:
        """Bytes of shared memory that the stages of the pipeline take, for elements of `bits`."""
        return self.stages * (self.block_t + self.block_v) * self.block_k * bits // 8

    def with_resident(self, bits: int, shared_bytes: int) -> ScoreConfig:
        """Return this config for a multiprocessor with that much shared memory: blocks of four warps run in pairs."""
        pairs = self.warps == 4 and 2 * (self.shared_bytes(bits) + 1024) <= shared_bytes
        return self._replace(resident=2 if pairs else 1)


class MixConfig(NamedTuple):
    """Vocabulary columns per block and per split of the first pass, and warps."""

    block: int
    split: int
    warps: int

    @property
    def blocks(self) -> str:
        """The block's shape, for messages."""
        return str(self.block)


class ScoreRule(NamedTuple):
    """Where a `ScoreConfig` applies; `aligned` requires that every row starts at a multiple of 16 bytes."""

    arch: str
    bits: int
    min_tokens: int
    min_hidden: int
    aligned: bool
    config: ScoreConfig


# For each architecture from the most general row with the smallest blocks to the most particular with the largest.
SCORE_RULES = [
    ScoreRule("sm_80", 32, 0, 0, False, ScoreConfig(32, 64, 32, 4096, 16, 4, 2)),
    ScoreRule("sm_80", 16, 0, 0, False, ScoreConfig(32, 64, 32, 4096, 16, 4, 2)),
    ScoreRule("sm_80", 16, 0, 0, True, ScoreConfig(32, 128, 32, 2048, 16, 4, 3, 2)),
    ScoreRule("sm_80", 16, 65, 0, True, ScoreConfig(128, 128, 32, 8192, 16, 8, 4)),
    ScoreRule("sm_89", 32, 0, 0, False, ScoreConfig(32, 64, 32, 4096, 16, 8, 2)),
    ScoreRule("sm_89", 16, 0, 0, False, ScoreConfig(32, 64, 32, 4096, 16, 4, 2)),
    ScoreRule("sm_89", 16, 0, 0, True, ScoreConfig(32, 128, 32, 2048, 16, 4, 3, 2)),
    ScoreRule("sm_89", 16, 65, 0, True, ScoreConfig(128, 128, 32, 8192, 16, 8, 4)),
    ScoreRule("sm_90", 32, 0, 0, False, ScoreConfig(32, 64, 32, 4096, 16, 8, 2)),
    ScoreRule("sm_90", 16, 0, 0, False, ScoreConfig(32, 64, 32, 4096, 16, 4, 2)),
    ScoreRule("sm_90", 16, 0, 0, True, ScoreConfig(64, 128, 64, 2048, 16, 4, 3, 2)),
    ScoreRule("sm_90", 16, 65, 0, True, ScoreConfig(128, 128, 64, 8192, 16, 4, 3, 2)),
    ScoreRule("sm_100", 32, 0, 0, False, ScoreConfig(32, 64, 16, 4096, 16, 4, 2)),
    ScoreRule("sm_100", 16, 0, 0, False, ScoreConfig(32, 32, 32, 4096, 16, 4, 2)),
    ScoreRule("sm_100", 16, 0, 0, True, ScoreConfig(64, 128, 64, 2048, 16, 8, 3)),
    ScoreRule("sm_100", 16, 65, 0, True, ScoreConfig(128, 128, 64, 8192, 16, 8, 3)),
    ScoreRule("sm_100", 16, 65, 0, True, ScoreConfig(256, 128, 32, 8192, 16, 8, 4)),
    ScoreRule("gfx90a", 32, 0, 0, False, ScoreConfig(32, 64, 32, 4096, 16, 4, 2)),
    ScoreRule("gfx90a", 16, 0, 0, False, ScoreConfig(32, 64, 32, 4096, 16, 4, 2)),
    ScoreRule("gfx90a", 16, 0, 0, True, ScoreConfig(32, 128, 64, 2048, 16, 4, 2, 2)),
    ScoreRule("gfx90a", 16, 65, 0, True, ScoreConfig(128, 128, 64, 8192, 16, 8, 2)),
    ScoreRule("gfx942", 32, 0, 0, False, ScoreConfig(32, 64, 32, 4096, 16, 4, 2)),
    ScoreRule("gfx942", 16, 0, 0, False, ScoreConfig(32, 64, 32, 4096, 16, 4, 2)),
    ScoreRule("gfx942", 16, 0, 0, True, ScoreConfig(32, 128, 64, 2048, 16, 4, 2, 2)),
    ScoreRule("gfx942", 16, 65, 0, True, ScoreConfig(128, 128, 64, 8192, 16, 8, 2)),
    ScoreRule("interpreter", 16, 0, 0, False, ScoreConfig(32, 2048, 64, 4096, 2, 4, 1)),
    ScoreRule("interpreter", 16, 65, 0, False, ScoreConfig(128, 1024, 64, 2048, 2, 4, 1)),
    ScoreRule("interpreter", 32, 0, 0, False, ScoreConfig(32, 2048, 64, 4096, 2, 4, 1)),
    ScoreRule("interpreter", 32, 65, 0, False, ScoreConfig(128, 1024, 64, 2048, 2, 4, 1)),
]

MIX_RULES = {
    "sm_80": MixConfig(2048, 4096, 4),
    "sm_89": MixConfig(2048, 4096, 4),
    "sm_90": MixConfig(2048, 4096, 4),
    "sm_100": MixConfig(2048, 4096, 8),
    "gfx90a": MixConfig(2048, 4096, 4),
    "gfx942": MixConfig(2048, 4096, 4),
    "interpreter": MixConfig(4096, 8192, 4),
}

# Architectures with the matrix instructions of one in the table. Their shared memory may be less: rows that do not fit
# the device are left out.
SAME_AS = {
    "sm_86": "sm_89",
    "sm_87": "sm_80",
    "sm_103": "sm_100",
    "sm_120": "sm_89",
    "sm_121": "sm_89",
    "gfx950": "gfx942",
}

# The row of an architecture that is in neither: the vendor's with the smallest blocks.
DEFAULT = {"nvidia": "sm_89", "amd": "gfx90a"}
