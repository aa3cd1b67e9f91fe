"""Host time and launches of the mixing kernels, with a driver that launches nothing: no GPU is needed.

    python benchmarks/mixing_host.py [--beside CHECKOUT]

Writes results/mixing_host.json. CHECKOUT is another version of this repository, measured in alternation with this one.
The time is that of everything above the driver: allocation, specialization, and the look-up of the compiled kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "mixing_host.json"
SHAPES = ((8, 32, 32_000), (8, 64, 128_256), (64, 64, 128_256))  # experts, batch, vocabulary
ROUNDS = 3


def main() -> None:
    """Measure, in several processes, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--beside", type=Path, help="a checkout of another version")
    parser.add_argument("--here", action="store_true", help="print the measurements of the imported version, and end")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measured()))
        return
    from environment import describe

    checkouts = {"ours": ROOT} | ({"beside": options.beside.resolve()} if options.beside else {})
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    for _ in range(ROUNDS):
        for name, checkout in checkouts.items():
            environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, __file__, "--here"]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            rounds[name].append(json.loads(done.stdout))
    result: dict[str, Any] = {"environment": describe()}
    for name, found in rounds.items():
        best = {key: min(found, key=lambda row: float(row[key]["microseconds"]))[key] for key in found[0]}
        result[name] = {"commit": _commit(checkouts[name]), "calls": best}
    options.result.write_text(json.dumps(result, indent=1) + "\n")


def _commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def measured() -> dict[str, dict[str, float]]:
    """Return launches, and the median host time of a call in microseconds, of each function and shape."""
    import torch
    from triton.runtime import driver

    torch.set_num_threads(1)
    launches: list[object] = []
    driver.set_active(_driver(launches))
    mix_logits, mix_sample = _functions()
    found: dict[str, dict[str, float]] = {}
    for experts, batch, vocabulary in SHAPES:
        logits = torch.empty(experts, batch, vocabulary, dtype=torch.bfloat16)
        log_weights = torch.zeros(batch, experts)
        running = torch.zeros(batch, experts, dtype=torch.float64)
        calls = {
            "mix_logits": lambda logits=logits, weights=log_weights: mix_logits(logits, weights),
            "mix_sample": lambda logits=logits, weights=log_weights, sums=running: mix_sample(logits, weights, sums),
        }
        for name, call in calls.items():
            call()
            launches.clear()
            call()
            row = {"launches": len(launches)}
            seconds = []
            for _ in range(50):
                before = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - before)
            row["microseconds"] = round(statistics.median(seconds) * 1e6, 1)
            found[f"{name} {experts}x{batch}x{vocabulary}"] = row
    return found


def _functions() -> tuple[Any, Any]:
    """Return `mix_logits(logits, weights)` and `mix_sample(logits, weights, running)` of this or an older version."""
    try:
        from btm_scale.kernels import triton_launch
        from btm_scale.kernels.tuning_table import MIX_RULES
    except ImportError:  # bc32293
        from btm_scale.kernels import launch, tuning  # type: ignore[attr-defined]

        tuning.architecture = lambda device: "sm_90"  # type: ignore[attr-defined]
        return launch.mix_logits, lambda logits, weights, sums: launch.mix_sample(logits, weights, log_likelihood=sums)
    config = MIX_RULES["sm_90"]

    def sample(logits: Any, weights: Any, sums: Any) -> Any:
        return triton_launch.mix_sample(logits, weights, 1.0, None, sums, config=config)

    return lambda logits, weights: triton_launch.mix_logits(logits, weights, config=config), sample


def _driver(launches: list[object]) -> Any:
    """Return a Triton driver of an H100 that records launches and does nothing."""
    from triton.backends.compiler import GPUTarget

    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 64, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
        unload_module=lambda module: None,
    )
    return SimpleNamespace(
        utils=utils,
        launcher_cls=lambda source, metadata: lambda *arguments: launches.append(source),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        is_active=lambda: True,
    )


if __name__ == "__main__":
    main()
