"""Measure a function's time, memory and repeatability, and the peak rates of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(run: Callable[[], Any], device: str, repeats: int = 10) -> float:
    """Median time of a call after three warm-up calls; on a GPU from its events."""
    samples = []
    for _ in range(3):
        run()
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            run()
            samples.append(time.perf_counter() - began)
    return statistics.median(samples)


def extra_bytes(run: Callable[[], Any], device: str) -> int | None:
    """Peak GPU memory of a call above the memory before it, with its result; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def repeats_to_the_bit(run: Callable[[], torch.Tensor], runs: int) -> bool:
    """Whether `runs` calls return the same bits."""
    first = run()
    return all(torch.equal(run(), first) for _ in range(runs - 1))


def matrix_rate(device: str) -> float:
    """FLOP/s of a large bfloat16 matrix product."""
    size = 8192 if device == "cuda" else 512
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / seconds(lambda: left @ right, device)


def copy_rate(device: str) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.empty(1 << 32 if device == "cuda" else 1 << 24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device)
