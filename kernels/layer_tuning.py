"""The block shapes of a layer's kernels, by vendor. None has been timed on a GPU."""

from __future__ import annotations

from typing import NamedTuple

from btm_scale.kernels.hardware import Hardware

LARGEST_NORM = 8192  # columns of a row, which is held in registers
_ELEMENTS_PER_THREAD = 16
# Programs of the norm's backward pass, each with a row of sums: two for each multiprocessor of an H100 or H200. There
# are more of kernels with smaller blocks.
_PROGRAMS = 264
_HEAD_ELEMENTS = 1024  # of each half of a block of heads
_GELU = 2048  # columns of a block of GELU's kernel


class ColumnsConfig(NamedTuple):
    """Columns of a block, its warps, and the most programs that sum the same columns over rows."""

    block: int
    warps: int
    programs: int

    @property
    def blocks(self) -> str:
        """The block's shape, for messages."""
        return str(self.block)


class RotaryConfig(NamedTuple):
    """Heads and pairs of dimensions of a block, its warps, and the most programs that sum its heads over tokens."""

    heads: int
    half: int
    warps: int
    programs: int

    @property
    def blocks(self) -> str:
        """The block's shape, for messages."""
        return f"{self.heads}x{self.half}"


def norm_configs(hardware: Hardware, hidden: int) -> list[ColumnsConfig]:
    """Return the configs of the norm's kernels, best first; none if a row, which is a block, exceeds the registers."""
    block = max(64, _power_of_two(hidden))
    if block > LARGEST_NORM:
        return []
    warps = block // (_ELEMENTS_PER_THREAD * _warp(hardware))
    return [ColumnsConfig(block, max(1, min(16, warps)), _PROGRAMS)]


def rotary_configs(hardware: Hardware, head_size: int) -> list[RotaryConfig]:
    """Return the configs of the rotary kernels, best first."""
    half = _power_of_two(head_size // 2)
    # Rows that are not aligned are read element by element, each with its own address in registers.
    elements = _HEAD_ELEMENTS if head_size // 2 % 8 == 0 else _HEAD_ELEMENTS // 4
    return [RotaryConfig(max(1, elements // half), half, 4 * 32 // _warp(hardware), 4 * _PROGRAMS)]


def gelu_configs(hardware: Hardware) -> list[ColumnsConfig]:
    """Return the configs of GELU's kernel, best first."""
    return [ColumnsConfig(_GELU, _GELU // (_ELEMENTS_PER_THREAD * _warp(hardware)), 2 * _PROGRAMS)]


def _warp(hardware: Hardware) -> int:
    return 64 if hardware.vendor == "amd" else 32


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
