"""The tests that need a GPU, and the memory checker of the CUDA toolkit."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from gpu_phases.ledger import ROOT, Row, Site, UnavailableError

_SMALL_CASES = {
    "token_logprobs": "states = torch.randn(2, 100, 80, device='cuda').bfloat16()\n"
    "heads = [torch.randn(1111, 80, device='cuda').bfloat16() for _ in range(2)]\n"
    "kernels.token_logprobs(states, heads, torch.randint(1111, (100,), device='cuda'))",
    "mix_sample": "logits = torch.randn(3, 5, 1111, device='cuda').bfloat16()\n"
    "kernels.mix_sample(logits, torch.randn(5, 3, device='cuda'))",
}
_SECONDS = {"test_gpu_run": 500}  # which starts a dozen processes
_FOUND = 9  # exit code of compute-sanitizer that found an error
_OUTCOME = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")


def rows(site: Site) -> list[Row]:
    """Return one row per file of tests/gpu, and one per small case under compute-sanitizer."""
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    tests = [Row(f"tests {file.stem}", _SECONDS.get(file.stem, 300), partial(_run_tests, file)) for file in files]
    return tests + [Row(f"sanitizer {name}", 180, partial(_sanitize, code)) for name, code in _SMALL_CASES.items()]


def _run_tests(file: Path, site: Site) -> dict[str, Any]:
    """Return the number of tests by outcome, and the names of those that failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", str(file)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(result.stdout, result.stderr)
    summary = result.stdout.strip().splitlines()[-1]
    counts = {outcome.rstrip("s"): int(count) for count, outcome in _OUTCOME.findall(summary)}
    if not counts or "error" in counts or not (counts.keys() & {"passed", "failed"} or site.simulated):
        raise RuntimeError(f"pytest ended with exit code {result.returncode}: {summary}")
    failed = [line.removeprefix("FAILED ") for line in result.stdout.splitlines() if line.startswith("FAILED ")]
    return {**counts, "failed_tests": failed}


def _sanitize(code: str, site: Site) -> dict[str, Any]:
    """Return the number of memory errors of a small launch."""
    checker = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if checker is None or site.simulated:
        raise UnavailableError("compute-sanitizer is not installed" if checker is None else "there is no GPU")
    program = f"import torch\nfrom btm_scale import kernels\n{code}\ntorch.cuda.synchronize()\n"
    program += "assert kernels.last_path().backend == 'triton', 'Triton did not run'"
    command = [checker, "--error-exitcode", str(_FOUND), sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    print(result.stdout, result.stderr)
    summary_line = re.search(r"ERROR SUMMARY: (\d+) error", result.stdout)
    if summary_line is None or result.returncode not in (0, _FOUND):
        raise RuntimeError(f"compute-sanitizer ended with exit code {result.returncode}")
    return {"memory_errors": int(summary_line.group(1))}
