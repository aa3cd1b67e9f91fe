"""Speed, memory, error and repeatability of the kernels, beside other implementations.

    python benchmarks/kernels.py            # on a GPU: writes results/kernels.json
    python benchmarks/kernels.py --cpu      # the PyTorch reference: writes results/kernels_cpu.json
    python benchmarks/kernels.py --small    # runs the script under the interpreter: prints only

Peers run once for each expert: eager PyTorch, chunks of logits, torch.compile, torch's linear_cross_entropy, and Cut
Cross-Entropy and Liger-Kernel where they are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SCORE_SHAPES = [(768, 50_304), (2048, 32_000), (2048, 128_256), (4096, 128_256)]
EXPERTS = [1, 8, 64]
TOKENS = 8192
BATCH = 64


def main() -> None:
    """Measure what the options ask for, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--cpu", action="store_true", help="the PyTorch reference on the CPU")
    mode.add_argument("--small", action="store_true", help="small sizes under Triton's interpreter")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    if options.small:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

    import torch
    from environment import describe

    from btm_scale.kernels.hardware import interpreter_problem

    if options.small and (problem := interpreter_problem()):
        sys.exit(problem)
    if options.cpu:
        from kernels_cpu import measure_reference

        result, default = measure_reference(), RESULTS / "kernels_cpu.json"
    elif options.small:
        result, default = _measure("cpu", [(64, 1111)], [1, 2], tokens=33, batch=3), None
    elif torch.cuda.is_available():
        result, default = _measure("cuda", SCORE_SHAPES, EXPERTS, TOKENS, BATCH), RESULTS / "kernels.json"
    else:
        sys.exit("There is no GPU here, and the kernels are measured on one. Use --cpu or --small instead.")
    result = {"benchmark": "kernels", "interpreter": options.small, "environment": describe(), **result}
    for row in result["rows"]:
        print(" ".join(f"{name}={_short(value)}" for name, value in row.items()))
    out = options.out or default
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(out)


def _measure(device: str, shapes: list[tuple[int, int]], experts: list[int], tokens: int, batch: int) -> dict[str, Any]:
    from kernel_rows import mix_row, score_row
    from kernels_timing import copy_rate, matrix_rate

    rates = {"matrix_flops": matrix_rate(device), "copy_bytes": copy_rate(device)}
    rows = [score_row(device, count, tokens, hidden, vocab, rates) for hidden, vocab in shapes for count in experts]
    vocabularies = sorted({vocab for _, vocab in shapes})
    rows += [mix_row(device, count, batch, vocab, rates) for vocab in vocabularies for count in experts]
    return {"rates_per_second": rates, "rows": rows}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
