"""What the start of a rank costs is, on a CPU, the import of its libraries: none may come that nobody uses."""

from __future__ import annotations

import subprocess
import sys

import pytest


def imported_by(module: str) -> set[str]:
    """What is imported once `module` is, in a fresh process."""
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_a_rank_without_a_gpu_imports_no_compiler() -> None:
    found = imported_by("btm_scale.run.worker")
    assert {"torch", "deepspeed", "megatron.core.models.gpt"} <= found
    assert "deepspeed.runtime.zero.muon.muon_optimizer" in found, "DeepSpeed's engine imports it"
    assert not found & {"torch._inductor", "torch._dynamo"}


@pytest.mark.parametrize("module", ["btm_scale.run.launchers", "btm_scale.run.status"])
def test_who_starts_groups_imports_no_torch(module: str) -> None:
    assert not imported_by(module) & {"torch", "deepspeed", "megatron", "transformers"}
