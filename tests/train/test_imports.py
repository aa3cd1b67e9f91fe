"""On a CPU, imports dominate the start-up time of a rank, so unused libraries must not be imported."""

from __future__ import annotations

import subprocess
import sys

import pytest


def imported_by(module: str) -> set[str]:
    """Return the modules that importing `module` loads in a fresh process."""
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_a_rank_without_a_gpu_imports_no_compiler() -> None:
    imported = imported_by("btm_scale.run.worker")
    assert {"torch", "deepspeed", "megatron.core.models.gpt"} <= imported
    assert "deepspeed.runtime.zero.muon.muon_optimizer" in imported, "DeepSpeed's engine imports it"
    assert not imported & {"torch._inductor", "torch._dynamo"}


@pytest.mark.parametrize("module", ["btm_scale.run.launchers", "btm_scale.run.status"])
def test_modules_that_start_groups_do_not_import_torch(module: str) -> None:
    assert not imported_by(module) & {"torch", "deepspeed", "megatron", "transformers"}
