"""Measure everything that needs a GPU, in calls of a few minutes each.

    python benchmarks/gpu_day.py --phase 1 --out DIR              # tests, and the kernels' speed
    python benchmarks/gpu_day.py --phase 2 --out DIR              # the kernels' peers, and 64 experts
    python benchmarks/gpu_day.py --phase 3 --out DIR              # block shapes
    python benchmarks/gpu_day.py --phase 4 --out DIR              # training
    python benchmarks/gpu_day.py --phase 5 --out DIR              # the demo, generation, checkpoints
    python benchmarks/gpu_day.py --simulate --out DIR             # every phase at toy size on a CPU

Each measurement is a row of DIR/rows.jsonl, written when it is finished and measured in its own process: a row
that fails or takes too long is recorded as such. A call starts no row that may exceed --budget, and skips finished
rows: give the same command again until it says that the phase is complete. The messages of a row are in DIR/logs.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from gpu_phases import PHASES, rows_of
from gpu_phases.ledger import Ledger, Site, measure, print_table, run_row, variables

_BUDGET_S = 540.0


def main() -> int:
    """Measure the rows of the phases that are missing. Returns 0 if none is left, otherwise 3."""
    options = _options()
    site = Site(options.out.resolve(), simulated=options.simulate)
    os.environ.update(variables(site))
    if options.row:
        row = next(row for phase in PHASES for row in rows_of(phase, site) if row.name == options.row)
        run_row(row, site)
        return 0
    if not options.simulate:
        import torch

        if not torch.cuda.is_available():
            sys.exit("PyTorch sees no GPU here. Use --simulate to check that every phase runs.")
    ledger = Ledger(site.out / "rows.jsonl", retry=options.retry)
    rows = [row for phase in options.phase or PHASES for row in rows_of(phase, site)]
    budget = options.budget
    if budget is None:
        budget = math.inf if options.simulate else _BUDGET_S
    left = measure(rows, ledger, site, budget)
    print_table(ledger, rows)
    if left:
        print(f"{len(left)} rows are left, beginning with '{left[0].name}'. Give the command again.")
        return 3
    print("Complete.")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", type=int, choices=PHASES, action="append", help="may be repeated; default: all")
    parser.add_argument(
        "--budget", type=float, help="seconds that this call may take (default: 540; with --simulate, no limit)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; calls continue each other")
    parser.add_argument("--retry", action="store_true", help="measure rows again that failed or took too long")
    parser.add_argument("--simulate", action="store_true", help="toy sizes on a CPU, to check that the phases run")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # measures one row in this process
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
