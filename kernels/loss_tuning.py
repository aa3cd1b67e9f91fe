"""The block shapes of the loss's kernels, by vendor."""

from __future__ import annotations

from typing import NamedTuple

from btm_scale.kernels.hardware import Hardware


class LossConfig(NamedTuple):
    """Vocabulary columns per block, and the warps that share a row."""

    block: int
    warps: int

    @property
    def blocks(self) -> str:
        """The block's shape, for messages."""
        return str(self.block)


# Not timed. A thread has 8 logits, one 16-byte load of bfloat16. Many warps per row keep few rows in flight, so that
# more of a row is still in the cache when it is read again.
LOSS_CONFIGS = {
    "nvidia": LossConfig(4096, 16),
    "amd": LossConfig(4096, 8),
    "interpreter": LossConfig(4096, 4),
}
_SMALL = LossConfig(512, 4)


def loss_configs(hardware: Hardware) -> list[LossConfig]:
    """Return the shapes of the loss's kernels, best first."""
    return [LOSS_CONFIGS[hardware.vendor], _SMALL]
