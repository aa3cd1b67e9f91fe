"""Registers, shared memory, blocks per multiprocessor and instructions of every kernel's configurations, without a GPU.

    python benchmarks/kernel_resources.py

Writes results/kernel_resources.json: what Triton's compiler makes of each configuration for each architecture of the
tuning table, under the pinned Triton and the oldest allowed (`make older-triton`), and the grid of the scoring kernel
for 1 to 8,192 tokens on an H100.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "kernel_resources.json"
OLDER_TRITON = "triton-3.6.0"
TOKENS = (1, 16, 64, 65, 128, 256, 512, 1024, 2048, 4096, 8192)
VOCABULARIES = (4000, 32_000, 50_304, 128_256)  # the first is one of 8 ranks' part of 32,000
ARCHITECTURES = ("sm_90", "sm_100", "sm_80", "gfx942", "sm_89", "gfx90a")


def main() -> None:
    """Compile under both versions, each in its own process, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument(
        "--arch",
        choices=ARCHITECTURES,
        action="append",
        help="compile for this one and keep the rows of the others. Default: all",
    )
    parser.add_argument("--rows", action="store_true", help="print the rows of the Triton that is imported, and end")
    options = parser.parse_args()
    architectures = options.arch or list(ARCHITECTURES)
    if options.rows:
        for arch in architectures:
            for row in compiled_rows(arch):
                print(json.dumps(row), flush=True)
        return
    from environment import describe

    older = Path(os.environ.get("BTM_SCALE_OLDER_TRITON", f"{sys.prefix}/{OLDER_TRITON}"))
    if not older.is_dir():
        sys.exit(f"{older} does not exist. It holds an older Triton: run `make older-triton`.")
    kept: dict[str, Any] = json.loads(options.result.read_text()) if options.result.exists() else {}
    kernels: dict[str, list[dict[str, Any]]] = kept.get("kernels", {"pinned": [], "oldest": []})
    for arch in architectures:
        for version, triton in (("pinned", None), ("oldest", older)):
            others = [row for row in kernels[version] if row["arch"] != arch]
            kernels[version] = sorted(
                others + _rows_under(triton, arch), key=lambda row: ARCHITECTURES.index(row["arch"])
            )
        # After each architecture: compiling for all of them takes minutes.
        result = {"environment": describe(), "kernels": kernels, "grids": grids()}
        options.result.write_text(json.dumps(result, indent=1) + "\n")


def _rows_under(triton: Path | None, arch: str) -> list[dict[str, Any]]:
    """Return the rows of a process that imports Triton from a folder, or from the environment."""
    environment = os.environ | ({"PYTHONPATH": str(triton)} if triton else {})
    command = [sys.executable, "-W", "ignore", __file__, "--rows", f"--arch={arch}"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def grids() -> list[dict[str, int]]:
    """Return programs, and multiprocessors with work, of the scoring kernel for one expert on an H100."""
    from btm_scale.kernels.hardware import Hardware
    from btm_scale.kernels.pieces import ceil_div, split_columns
    from btm_scale.kernels.tuning import score_configs

    gpu = Hardware("nvidia", "sm_90", 227 << 10, 132)
    rows = []
    for vocabulary in VOCABULARIES:
        for tokens in TOKENS:
            config = score_configs(gpu, 16, tokens, 2048)[0]
            split = split_columns(tokens, vocabulary, config, gpu.multiprocessors)
            programs = ceil_div(tokens, config.block_t) * ceil_div(vocabulary, split)
            row = {"vocabulary": vocabulary, "tokens": tokens, "columns": split, "programs": programs}
            rows.append(row | {"multiprocessors": min(programs, gpu.multiprocessors)})
    return rows


def compiled_rows(arch: str) -> Iterator[dict[str, Any]]:
    """Yield the resources of each kernel with each configuration of an architecture."""
    sys.path[:0] = [str(ROOT / "tests")]
    import triton
    from gpu_counting.machine_code import resources
    from helpers.stub_gpu import SHARED_BYTES, stub_gpus

    from btm_scale.kernels import paths

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with stub_gpus(arch) as gpus:
        seen: set[int] = set()
        compiled: list[tuple[str, Any, Any]] = []

        def every_config(operator: str, tensor: Any, configs: Any, launch: Any, reference: Any) -> Any:
            """In place of `paths.run`: launch with every configuration, and keep what each compiled."""
            device = paths.hardware(tensor.device)
            results = []
            for config in configs(device):
                results.append(launch(config))
                new = [(name, kernel) for name, kernel in gpus.compiled() if id(kernel) not in seen]
                compiled.extend((name, config, kernel) for name, kernel in new)
                seen.update(id(kernel) for _, kernel in new)
            return results[-1]

        with mock.patch.object(paths, "run", every_config):
            for call in _calls(gpus):
                call()
                for name, config, kernel in compiled:
                    warps = kernel.metadata.num_warps
                    found = resources(kernel, warps, SHARED_BYTES[arch] + 1024, tools)
                    threads = warps * kernel.metadata.warp_size
                    elements = _elements(name, config) / threads
                    row = {"triton": triton.__version__, "arch": arch, "kernel": name}
                    row |= {"blocks": _blocks(name, config), "warps": warps, "stages": kernel.metadata.num_stages}
                    row |= {"registers": found.registers, "shared_bytes": found.shared_bytes}
                    row |= {"stack_bytes": found.stack_bytes, "resident": found.resident}
                    if not arch.startswith("gfx"):
                        row["instructions"] = round(found.always / elements, 2)
                        row["instructions_at_most"] = round(found.at_most / elements, 2)
                    yield row
                compiled.clear()


def _calls(gpus: Any) -> list[Callable[[], object]]:
    """Return calls of every operator with tensors of real shapes."""
    import torch

    from btm_scale import kernels
    from btm_scale.kernels import operators

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Any:
        return gpus.empty(*shape, dtype=dtype)

    def score(dtype: torch.dtype) -> object:
        head, states = tensor(32_000, 2048, dtype=dtype), tensor(8, 8192, 2048, dtype=dtype)
        targets = tensor(8192, dtype=torch.int64)
        return operators.TOKEN_LOGPROBS(states, [head] * 8, targets, None, -100, None)

    logits, log_weights = tensor(8, 64, 128_256), tensor(64, 8, dtype=torch.float64)
    rows, targets = tensor(2, 32_000), gpus.tensor(torch.zeros(2, dtype=torch.int64))
    longer = tensor(2, 50_304)
    statistics = tensor(2, dtype=torch.float32)
    added, weight = tensor(64, 2048), tensor(2048)
    mixed, angles = tensor(64, 2, 16, 3, 128), tensor(64, 64)

    def norm() -> None:
        total, _, mean, scale = kernels.add_norm(added, weight, residual=added)
        kernels.add_norm_backward(added, total, weight, mean, scale)

    def rotate() -> None:
        query, key = kernels.split_rotated(mixed, angles, angles)
        kernels.join_rotated(query, key, key, angles, angles, has_bias=True)

    return [
        lambda: score(torch.bfloat16),
        lambda: score(torch.float32),
        lambda: kernels.mix_logits(logits, log_weights),
        lambda: kernels.mix_sample(logits, log_weights, log_likelihood=log_weights),
        lambda: kernels.cross_entropy_(rows, targets),
        lambda: kernels.cross_entropy_(longer, targets),
        lambda: kernels.logit_partials(rows, targets),
        lambda: kernels.logit_gradient_(rows, targets, statistics, statistics),
        norm,
        rotate,
        lambda: kernels.bias_gelu_backward(added, added, weight),
    ]


def _elements(name: str, config: Any) -> int:
    """Return how many elements a block handles in one step of its main loop, or in all if it has none."""
    from btm_scale.kernels.pieces import COMBINE_BLOCK, COMBINE_SPLITS

    if name == "score_kernel":
        return int(config.block_t * config.block_v)
    if name == "combine_kernel":
        return COMBINE_BLOCK * COMBINE_SPLITS
    if name == "column_sums_kernel":
        return 64 * 32
    if name in ("split_rotated_kernel", "join_rotated_kernel"):
        return int(config.heads * config.half * 2)
    if name == "resident_cross_entropy_kernel":
        return int(config.block * config.kept)
    return int(config.block)


def _blocks(name: str, config: Any) -> str:
    shapes = {"combine_kernel": "64x32", "column_sums_kernel": "64x32"}
    return shapes.get(name) or config.blocks


if __name__ == "__main__":
    main()
