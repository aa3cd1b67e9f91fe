"""Record finished runs as a benchmark's result: results.json, time and environment.

    python benchmarks/record.py NAME RUN [RUN ...]

One run gives {environment, results, seconds}; several give {environment, runs: [...]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from environment import describe

from btm_scale.evaluate.results import load_results
from btm_scale.run_dir import RunDir


def main() -> None:
    """Write benchmarks/results/NAME.json."""
    name, *folders = sys.argv[1:]
    runs = [recorded(RunDir(Path(folder))) for folder in folders]
    result: dict[str, Any] = {"environment": describe()}
    result |= runs[0] if len(runs) == 1 else {"runs": runs}
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


def recorded(run: RunDir) -> dict[str, Any]:
    """A run's results, and the seconds from its config to its page."""
    seconds = run.report.stat().st_mtime - (run.root / "run.yaml").stat().st_mtime
    return {"results": load_results(run).document(), "seconds": round(seconds)}


if __name__ == "__main__":
    main()
