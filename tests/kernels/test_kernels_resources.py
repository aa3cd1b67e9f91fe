"""Instructions, registers and shared memory of the compiled kernels, and the committed table of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from helpers.stub_gpu import KERNELS, SHARED_BYTES, stub_gpus

from btm_scale.kernels import triton_launch
from btm_scale.kernels.tuning_table import SCORE_RULES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMITTED: dict[str, Any] = json.loads((BENCHMARKS / "results" / "kernel_resources.json").read_text())
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MOST_INSTRUCTIONS = 8  # per logit, beside the matrix products
H100_RULES = [rule for rule in SCORE_RULES if rule.arch == "sm_90" and rule.aligned]


@pytest.mark.parametrize("rule", H100_RULES, ids=lambda rule: rule.config.blocks)
def test_scoring_on_an_h100_has_few_instructions_per_logit_and_two_blocks_per_multiprocessor(rule, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_counting.machine_code import resources

    config = rule.config
    with stub_gpus("sm_90") as gpus:
        states, head = gpus.empty(8, 8192, 2048, dtype=torch.bfloat16), gpus.empty(32_000, 2048, dtype=torch.bfloat16)
        triton_launch.token_logprobs(states, [head] * 8, gpus.empty(8192, dtype=torch.int64), config=config)
        kernel = next(kernel for name, kernel in gpus.compiled() if name == "score_kernel")
        found = resources(kernel, config.warps, SHARED_BYTES["sm_90"] + 1024, TOOLS)
    logits_of_a_thread = config.block_t * config.block_v / (32 * config.warps)
    assert found.always <= MOST_INSTRUCTIONS * logits_of_a_thread
    assert found.resident >= config.resident == 2
    assert found.stack_bytes == 0
    row = next(
        row
        for row in COMMITTED["kernels"]["pinned"]
        if (row["arch"], row["kernel"], row["blocks"]) == ("sm_90", "score_kernel", config.blocks)
    )
    assert row["instructions"] == round(found.always / logits_of_a_thread, 2)
    assert (row["registers"], row["shared_bytes"]) == (found.registers, found.shared_bytes)


@pytest.mark.parametrize("version", ["pinned", "oldest"])
def test_the_committed_table_has_every_kernel_and_row_without_a_spilled_register(version):
    rows = COMMITTED["kernels"][version]
    architectures = {row["arch"] for row in rows}
    assert "sm_90" in architectures
    for arch in architectures:
        of_arch = [row for row in rows if row["arch"] == arch]
        assert {row["kernel"] for row in of_arch} == {kernel.fn.__name__ for kernel in KERNELS}
        scored = [row["blocks"] for row in of_arch if row["kernel"] == "score_kernel"]
        assert sorted(scored) == sorted(rule.config.blocks for rule in SCORE_RULES if rule.arch == arch)
    assert not any(row["stack_bytes"] for row in rows)


def test_the_committed_grids_are_those_of_this_code_and_fill_an_h100(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import kernel_resources

    assert kernel_resources.grids() == COMMITTED["grids"]
    assert all(row["multiprocessors"] == 132 for row in COMMITTED["grids"] if row["vocabulary"] >= 32_000)


def test_a_loop_inside_of_the_main_loop_and_what_a_branch_skips_are_counted_apart(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_counting.machine_code import main_loop

    lines = [
        "s_mov_b32 s0, 0",
        ".LBB0_1:",
        "v_add_f32 v0, v1, v2",
        ".LBB0_2:",
        "v_mfma_f32 v0",
        "s_cbranch_scc1 .LBB0_2",
    ]
    lines += ["s_cbranch_vccz .LBB0_3", "v_cmp_eq_u32 v0", "v_cndmask_b32 v0", ".LBB0_3:", "s_cbranch_scc1 .LBB0_1"]
    code = "\n".join(line if line.startswith(".") else f"\t{line}" for line in lines)
    counts = main_loop(SimpleNamespace(asm={"amdgcn": code}), TOOLS)
    assert counts == (3, 5)
