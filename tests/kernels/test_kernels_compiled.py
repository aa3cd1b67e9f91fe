"""Compile the kernels for GPUs that need not be present, and check their resource usage.

A spilled register appears as stack: the kernel still runs, but several times slower.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
import triton.language as tl
from helpers.cuts import cut, full
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from btm_scale.kernels import mixing, scoring
from btm_scale.kernels.tuning import MIX_RULES, SCORE_RULES, ScoreRule

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SIZES = {"experts", "batch", "tokens", "splits", "columns", "blocks", "rows"}
POINTERS = {
    "heads_ptr": "*i64",
    "targets_ptr": "*i64",
    "seed_ptr": "*i64",
    "token_ptr": "*i32",
    "out_token_ptr": "*i64",
    "log_weights_ptr": "*fp64",
    "log_likelihood_ptr": "*fp64",
}


def compile_kernel(
    kernel: Any, arch: str, element: str, constants: dict[str, Any], *, ones: bool = False, **options: int
) -> Any:
    """Compile a kernel as a launch does; with `ones`, sizes are constants of 1 and weights are float32."""
    types, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants or (ones and name in SIZES):
            types[name] = "constexpr"
            constexprs[(index,)] = constants.get(name, 1)
        elif name.endswith("_ptr"):
            types[name] = POINTERS.get(name, element if name in ("hidden_ptr", "logits_ptr") else "*fp32")
            if ones and types[name] == "*fp64":
                types[name] = "*fp32"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32" if name in ("soft_cap", "temperature") else "i32"
            if name.endswith("_stride") or name == "inner":
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", int(arch[3:]), 32), options=options)


def assert_no_spills(compiled: Any, arch: str, folder: Path) -> None:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [str(CUOBJDUMP), "--dump-resource-usage", str(cubin)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", report).group(1)) for word in ("REG", "STACK", "LOCAL"))
    assert (stack, local) == (0, 0), f"{stack} bytes of stack at {registers} registers"
    assert compiled.metadata.shared <= SHARED_BYTES[arch]


def score_constants(rule: ScoreRule, element: Any, **changes: Any) -> dict[str, Any]:
    config = rule.config
    return {
        "HEAD_DTYPE": element,
        "DOT_DTYPE": element,
        "SOFT_CAP": False,
        "EVEN_K": True,
        "ALIGN": 16,
        "SPLIT": config.split,
        "GROUP": config.group,
        "BLOCK_T": config.block_t,
        "BLOCK_V": config.block_v,
        "BLOCK_K": config.block_k,
        **changes,
    }


@pytest.mark.parametrize(
    "rule",
    cut(
        [rule for rule in SCORE_RULES if rule.arch in ARCHITECTURES],
        # One rule for each of the other architectures.
        lambda rule: rule.arch == "sm_90" or (rule.bits == 16 and not rule.aligned),
        name=lambda rule: f"{rule.arch}-{rule.bits}-bit-{rule.config.block_t}x{rule.config.block_v}",
    ),
)
def test_no_block_shape_in_the_tuning_table_spills_registers(rule, tmp_path):
    pointer, element = ("*bf16", tl.bfloat16) if rule.bits == 16 else ("*fp32", tl.float32)
    variants: list[dict[str, Any]] = [{}, {"EVEN_K": False}, {"SOFT_CAP": True}]
    if not rule.aligned:
        variants.append({"ALIGN": rule.bits // 8})
    for changes in variants:
        compiled = compile_kernel(
            scoring.score_kernel,
            rule.arch,
            pointer,
            score_constants(rule, element, **changes),
            num_warps=rule.config.warps,
            num_stages=rule.config.stages,
        )
        assert_no_spills(compiled, rule.arch, tmp_path)


@pytest.mark.parametrize(("arch", "instruction"), [("sm_90", "wgmma.mma_async"), ("sm_100", "tcgen05.mma")])
def test_launches_with_many_tokens_use_tensor_cores_and_16_byte_copies(arch, instruction):
    rule = next(rule for rule in SCORE_RULES if rule.arch == arch and rule.min_tokens > 0)
    options = {"num_warps": rule.config.warps, "num_stages": rule.config.stages}
    constants = score_constants(rule, tl.bfloat16)
    ptx = compile_kernel(scoring.score_kernel, arch, "*bf16", constants, **options).asm["ptx"]
    assert instruction in ptx
    widths = set(re.findall(r"cp\.async\.\S+ \[[^\]]*\], \[[^\]]*\], (0x\w+)", ptx))
    assert widths == {"0x10"}


@pytest.mark.parametrize(
    ("arch", "ones"),
    [("sm_90", False), ("sm_90", True), ("sm_80", True), ("sm_100", True), full("sm_80", False), full("sm_100", False)],
)
def test_mixing_and_combining_kernels_compile_without_spills(arch, ones, tmp_path):
    config = MIX_RULES[arch]
    blocks = {"EXPERTS": 8, "SPLITS": 8, "BLOCK": config.block}
    kernels = [
        (mixing.normalizer_kernel, {"SPLIT": config.split, "BLOCK": config.block}),
        (mixing.mix_kernel, blocks),
        (mixing.draw_kernel, {**blocks, "GREEDY": False}),
        (mixing.draw_kernel, {**blocks, "GREEDY": True}),
        (mixing.pick_kernel, {"EXPERTS": 8, "SPLITS": 8, "BLOCKS": 64, "UPDATE": True}),
        (scoring.combine_kernel, {"BLOCK": 1024}),
    ]
    for kernel, constants in kernels:
        compiled = compile_kernel(kernel, arch, "*bf16", constants, ones=ones, num_warps=config.warps)
        assert_no_spills(compiled, arch, tmp_path)


def test_scoring_a_single_token_of_a_single_expert_compiles_without_spills(tmp_path):
    rule = next(rule for rule in SCORE_RULES if rule.arch == "sm_90")
    constants = score_constants(rule, tl.bfloat16)
    compiled = compile_kernel(scoring.score_kernel, "sm_90", "*bf16", constants, ones=True, num_warps=rule.config.warps)
    assert_no_spills(compiled, "sm_90", tmp_path)
