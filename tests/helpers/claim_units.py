"""Results of families of benchmarks/claims, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ENVIRONMENT = {"hardware": {"cpu": "a CPU", "cores": 2}, "date": "2026-11-27T00:00:00"}
DOMAINS = ("math", "code")


def curve_units(
    curves: dict[str, dict[str, float]], seeds: tuple[int, ...] = (1, 2), domains: tuple[str, ...] = DOMAINS
) -> dict[str, Any]:
    """The units of a family from perplexity by point and method, equal on all domains and for all seeds.

    Bits per byte are a tenth of it; `dense` is trained with 8 flops, and `dense-2x` with 16.
    """
    flops = {"dense": 8.0, "dense-2x": 16.0}
    return {
        f"{point}/seed-{seed}": {
            "seconds": 60,
            "point": point,
            "random_seed": seed,
            "bytes": dict.fromkeys(domains, 1000),
            "perplexity": {method: dict.fromkeys(domains, value) for method, value in methods.items()},
            "bits_per_byte": {method: dict.fromkeys(domains, value / 10) for method, value in methods.items()},
            "compute": {method: {"tokens": 1, "flops": flops[method]} for method in methods if method in flops},
        }
        for point, methods in curves.items()
        for seed in seeds
    }


def write_family(folder: Path, name: str, units: dict[str, Any]) -> None:
    """Write the JSON of a family into a folder of results."""
    path = folder / "claims" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"units": units, "environment": ENVIRONMENT}))
