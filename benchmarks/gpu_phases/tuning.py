"""Time block shapes: compile all candidates in parallel, then time those that do not spill registers.

The fastest shapes are in DIR/tuning.json after every row; `tune_kernels.py --write` puts those of a GPU into the table.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from gpu_phases.ledger import Row, Site

if TYPE_CHECKING:
    from btm_scale.kernels.tuning_table import MixConfig, ScoreConfig

_BATCH = 6  # candidates per row
_SHARED_BYTES = 228 << 10  # of a multiprocessor of an H100 or H200
# Tokens, hidden size and vocabulary of each class of problems, by name.
_CLASSES = {"decode": (32, 2048, 32_000), "score": (8192, 1024, 50_304), "score wide": (8192, 4096, 128_256)}
_TOY_CLASSES = {"decode": (17, 32, 300)}
_MIX_PROBLEM, _TOY_MIX_PROBLEM = (8, 64, 128_256), (2, 3, 1000)
_FEW_TOKENS = 128  # enough to compile the same kernel; a shape that spills would run for seconds on 8192


def rows(site: Site) -> list[Row]:
    """Return, for each class, a row that compiles and rows that time."""
    listed = []
    for name, problem in (_TOY_CLASSES if site.simulated else _CLASSES).items():
        listed.append(Row(f"compile {name}", 300, partial(_compile, name, problem)))
        for first in range(0, len(_score_candidates(site)), _BATCH):
            listed.append(Row(f"tune {name} {first + 1}-{first + _BATCH}", 180, partial(_time, name, problem, first)))
    mix = _TOY_MIX_PROBLEM if site.simulated else _MIX_PROBLEM
    return [*listed, Row("tune mix", 240, partial(_time_mix, mix))]


def _score_candidates(site: Site) -> list[ScoreConfig]:
    """Return the shapes worth compiling: blocks of two sizes, with two and three stages, four and eight warps."""
    from btm_scale.kernels.tuning_table import ScoreConfig

    if site.simulated:
        return [ScoreConfig(16, 64, 32, 128, 2, 4, 1), ScoreConfig(32, 128, 32, 128, 2, 4, 1)]
    shapes = [
        (32, 128, 64, 2048, 16, 4, 3),
        (32, 128, 128, 1024, 16, 4, 3),
        (32, 256, 64, 1024, 16, 4, 3),
        (32, 64, 128, 1024, 16, 4, 4),
        (64, 128, 64, 2048, 16, 4, 3),
        (64, 256, 64, 2048, 16, 8, 3),
        (128, 128, 64, 8192, 16, 4, 3),
        (128, 128, 64, 4096, 16, 4, 3),
        (128, 128, 64, 8192, 8, 4, 3),
        (128, 128, 64, 8192, 16, 8, 3),
        (128, 128, 64, 8192, 16, 4, 4),
        (128, 128, 128, 8192, 16, 4, 2),
        (128, 128, 32, 8192, 16, 4, 4),
        (128, 256, 64, 8192, 16, 8, 3),
        (128, 256, 64, 4096, 16, 8, 3),
        (128, 256, 64, 2048, 16, 8, 3),
        (128, 256, 64, 8192, 8, 8, 3),
        (128, 256, 64, 8192, 16, 8, 4),
        (128, 256, 32, 8192, 16, 8, 4),
        (256, 128, 64, 8192, 16, 8, 3),
        (256, 128, 64, 4096, 8, 8, 3),
        (256, 128, 64, 8192, 8, 8, 4),
        (256, 64, 64, 8192, 16, 8, 3),
        (64, 128, 64, 8192, 16, 4, 4),
    ]
    return [ScoreConfig(*shape).with_resident(16, _SHARED_BYTES) for shape in shapes]


def _mix_candidates(site: Site) -> list[MixConfig]:
    from btm_scale.kernels.tuning_table import MixConfig

    if site.simulated:
        return [MixConfig(128, 512, 4), MixConfig(256, 512, 4)]
    return [
        MixConfig(block, split, warps)
        for block in (1024, 2048, 4096)
        for split in (4096, 8192, 16_384)
        for warps in (4, 8)
    ]


def _compile(name: str, problem: tuple[int, int, int], site: Site) -> dict[str, Any]:
    """Compile every candidate, several at once; record the resources of each in DIR/tuning.json."""
    device = site.use_kernels()
    candidates = _score_candidates(site)
    context = multiprocessing.get_context("spawn")
    workers = min(len(candidates), len(os.sched_getaffinity(0)))
    with context.Pool(workers) as pool:
        resources = pool.starmap(_resources, [(device, problem, tuple(config)) for config in candidates])
    table = _table(site)
    for config, used in zip(candidates, resources, strict=True):
        table.setdefault(name, {})[_key(config)] = used
    _write(site, table)
    usable = [used for used in resources if not used.get("spills") and "error" not in used]
    return {"candidates": len(candidates), "usable": len(usable), "workers": workers}


def _resources(device: str, problem: tuple[int, int, int], shape: tuple[int, ...]) -> dict[str, Any]:
    """Compile one candidate by a short launch; return its registers, spills and shared memory, or its error."""
    from btm_scale.kernels.scoring import score_kernel
    from btm_scale.kernels.tuning_table import ScoreConfig

    tokens, hidden, vocab = problem
    try:
        _score_launch(device, min(tokens, _FEW_TOKENS), hidden, vocab)(ScoreConfig(*shape))
    except Exception as error:  # a compiler may raise anything; the candidate is left out
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    compiled = [binary for cache in getattr(score_kernel, "device_caches", {}).values() for binary in cache[0].values()]
    if not compiled:  # the interpreter compiles nothing
        return {}
    binary = compiled[-1]
    return {"registers": binary.n_regs, "spills": binary.n_spills, "shared_bytes": binary.metadata.shared}


def _time(name: str, problem: tuple[int, int, int], first: int, site: Site) -> dict[str, Any]:
    """Time a few candidates of a class; return the fastest of them and of all so far."""
    device = site.use_kernels()
    from kernels_timing import seconds

    launch = _score_launch(device, *problem)
    table = _table(site)
    entries = table.setdefault(name, {})
    for config in _score_candidates(site)[first : first + _BATCH]:
        entry = entries.setdefault(_key(config), {})
        if entry.get("spills") or "error" in entry:
            continue
        try:
            entry["seconds"] = seconds(lambda config=config: launch(config), device, repeats=5)
        except Exception as error:  # one candidate that cannot run must not hide the others
            entry["error"] = f"{type(error).__name__}: {error}"[:200]
        _write(site, table)
    return _fastest(entries)


def _time_mix(problem: tuple[int, int, int], site: Site) -> dict[str, Any]:
    """Time every candidate of the mixing kernels; return the fastest."""
    device = site.use_kernels()
    import torch
    from kernels_timing import seconds

    from btm_scale.kernels import triton_launch

    experts, batch, vocab = problem
    logits = torch.randn(experts, batch, vocab, device=device).bfloat16()
    log_weights = torch.randn(batch, experts, device=device)
    table = _table(site)
    entries = table.setdefault("mix", {})
    for config in _mix_candidates(site):
        entries[_key(config)] = {
            "seconds": seconds(
                lambda config=config: triton_launch.mix_logits(logits, log_weights, config=config),
                site.device,
                repeats=5,
            )
        }
        _write(site, table)
    return _fastest(entries)


def _score_launch(device: str, tokens: int, hidden: int, vocab: int) -> Any:
    """Return a function that launches the scoring kernels for one expert with a shape."""
    import torch

    from btm_scale.kernels import triton_launch

    states = torch.randn(1, tokens, hidden, device=device).bfloat16()
    heads = [torch.randn(vocab, hidden, device=device).bfloat16()]
    targets = torch.randint(vocab, (tokens,), device=device)
    return lambda config: triton_launch.score_partials(states, heads, targets, config=config)


def _fastest(entries: dict[str, Any]) -> dict[str, Any]:
    timed = {key: entry["seconds"] for key, entry in entries.items() if "seconds" in entry}
    if not timed:
        raise RuntimeError("no candidate ran; DIR/tuning.json has the reasons")
    best = min(timed, key=timed.__getitem__)
    return {"timed": len(timed), "fastest": best, "seconds": timed[best]}


def _key(config: ScoreConfig | MixConfig) -> str:
    return " ".join(str(number) for number in config)


def _table(site: Site) -> dict[str, dict[str, dict[str, Any]]]:
    path = site.out / "tuning.json"
    table: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text()) if path.exists() else {}
    return table


def _write(site: Site, table: dict[str, Any]) -> None:
    path = site.out / "tuning.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(table, indent=1) + "\n")
    temporary.replace(path)
