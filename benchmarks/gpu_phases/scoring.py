"""The kernels' speed, memory, error and repeatability: ours, beside peers, and with 64 experts."""

from __future__ import annotations

from functools import partial
from typing import Any

from gpu_phases.ledger import Row, Site

_SHAPES = [(768, 50_304), (2048, 32_000), (2048, 128_256), (4096, 128_256)]  # hidden size, vocabulary
_TOKENS, _BATCH = 8192, 64
# 48 experts of (4096, 128256) take 50 GB of bfloat16 heads, which a GPU of 80 GB holds beside the intermediate results.
_MANY = [(64, 768, 50_304), (64, 2048, 32_000), (64, 2048, 128_256), (48, 4096, 128_256)]
_TOY_SHAPES, _TOY_TOKENS, _TOY_BATCH = [(64, 1111)], 33, 3
_TOY_MANY = [(4, 64, 300)]


def rows_of_ours(site: Site) -> list[Row]:
    """Return one row per shape for 1 and 8 experts."""
    experts = (1, 2) if site.simulated else (1, 8)
    return _score_rows(site, experts, peers=False) + _mix_rows(site, experts, peers=False)


def rows_of_peers(site: Site) -> list[Row]:
    """Return the same shapes with every peer that is installed, which run once for each expert."""
    return _score_rows(site, (1,), peers=True) + _mix_rows(site, (2,) if site.simulated else (1, 8), peers=True)


def rows_of_many_experts(site: Site) -> list[Row]:
    """Return as many experts as the GPU holds."""
    many = _TOY_MANY if site.simulated else _MANY
    tokens, batch = (_TOY_TOKENS, _TOY_BATCH) if site.simulated else (_TOKENS, _BATCH)
    rows = [
        Row(f"score {count} experts {hidden}x{vocab}", 180, partial(_score, count, tokens, hidden, vocab, False))
        for count, hidden, vocab in many
    ]
    sizes = sorted({(count, vocab) for count, _, vocab in many if count == many[0][0]})
    return rows + [
        Row(f"mix {count} experts {vocab}", 120, partial(_mix, count, batch, vocab, True)) for count, vocab in sizes
    ]


def _score_rows(site: Site, experts: tuple[int, ...], *, peers: bool) -> list[Row]:
    shapes, tokens = (_TOY_SHAPES, _TOY_TOKENS) if site.simulated else (_SHAPES, _TOKENS)
    kind = "peers score" if peers else "score"
    return [
        Row(f"{kind} {count} experts {hidden}x{vocab}", 180, partial(_score, count, tokens, hidden, vocab, peers))
        for hidden, vocab in shapes
        for count in experts
    ]


def _mix_rows(site: Site, experts: tuple[int, ...], *, peers: bool) -> list[Row]:
    shapes, batch = (_TOY_SHAPES, _TOY_BATCH) if site.simulated else (_SHAPES, _BATCH)
    kind = "peers mix" if peers else "mix"
    return [
        Row(f"{kind} {count} experts {vocab}", 120, partial(_mix, count, batch, vocab, peers))
        for vocab in sorted({vocab for _, vocab in shapes})
        for count in experts
    ]


def _score(experts: int, tokens: int, hidden: int, vocab: int, peers: bool, site: Site) -> dict[str, Any]:
    device = site.use_kernels()
    from kernel_rows import score_row

    rates = _rates(site)
    return score_row(device, experts, tokens, hidden, vocab, rates, peers=peers) | rates


def _mix(experts: int, batch: int, vocab: int, peers: bool, site: Site) -> dict[str, Any]:
    device = site.use_kernels()
    from kernel_rows import mix_row

    rates = _rates(site)
    return mix_row(device, experts, batch, vocab, rates, peers=peers) | rates


def _rates(site: Site) -> dict[str, float]:
    """Return what this GPU reaches now: its clock depends on temperature and power."""
    from kernels_timing import copy_rate, matrix_rate

    return {"matrix_flops": matrix_rate(site.device), "copy_bytes": copy_rate(site.device)}
