"""The block shapes of the loss's kernels, by vendor, and the rows that stay in registers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from btm_scale.kernels.hardware import Hardware
from btm_scale.kernels.pieces import ceil_div


class LossConfig(NamedTuple):
    """Vocabulary columns per block, the warps that share a row, and the blocks that a row keeps in registers, or 0."""

    block: int
    warps: int
    kept: int = 0

    @property
    def blocks(self) -> str:
        """The block's shape, for messages."""
        return f"{self.kept}x{self.block}" if self.kept else str(self.block)


# Not timed. A thread has 8 logits, one 16-byte load of bfloat16. Many warps per row keep few rows in flight, so that
# more of a row is still in the cache when it is read again.
LOSS_CONFIGS = {
    "nvidia": LossConfig(4096, 16),
    "amd": LossConfig(4096, 8),
    "interpreter": LossConfig(4096, 4),
}
_SMALL = LossConfig(512, 4)
# 128 KiB of 16-bit logits: half of the registers of an NVIDIA multiprocessor, the other half is for the arithmetic.
_MOST_KEPT = 16
_ALIGNMENT = 16  # what Triton assumes of numbers, of elements and of bytes, before it makes 16-byte loads


def loss_configs(hardware: Hardware) -> list[LossConfig]:
    """Return the shapes of the loss's kernels, best first."""
    return [LOSS_CONFIGS[hardware.vendor], _SMALL]


def cross_entropy_configs(hardware: Hardware, logits: Tensor, columns: int) -> list[LossConfig]:
    """Return the shapes of `cross_entropy_` for logits [tokens, width] with `columns` that are not padding, best first.

    Rows that fit stay in registers between the two passes, so that each logit is read once. An NVIDIA multiprocessor
    then has one long row at a time, of which the compiler loads half before it computes: 48 KB of 50,304 bfloat16
    logits, where an H100's memory needs 20 to 30 in flight. What limits a row are its exponentials, two per logit: they
    take 3.6 us on one multiprocessor of an H100, whose part of the memory's bandwidth takes 9 us to read and write it.
    Float32 logits, longer rows, and rows without alignment are read twice.
    """
    best, *others = loss_configs(hardware)
    width = logits.shape[1]
    kept = ceil_div(width, best.block)
    aligned = logits.is_meta or logits.data_ptr() % _ALIGNMENT == 0
    fits = logits.element_size() == 2 and kept <= _MOST_KEPT and columns > (kept - 1) * best.block
    if fits and aligned and width % _ALIGNMENT == 0 and logits.stride(0) % _ALIGNMENT == 0:
        return [best._replace(kept=kept), best, *others]
    return [best, *others]
