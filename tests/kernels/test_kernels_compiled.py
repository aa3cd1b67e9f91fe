"""Launch the kernels at real shapes for GPUs that need not be present, and check the compiled code.

Triton specializes a kernel by its arguments (1, a multiple of 16, or neither), so the launches are the real ones. A
spilled register is stack on the GPU: the kernel still runs, but several times slower.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton
from helpers.cuts import cut, full
from helpers.layer_cases import norm_case
from helpers.stub_gpu import LAYER_KERNELS, LOSS_KERNELS, SHARED_BYTES, StubGpus, stub_gpus

from btm_scale import kernels
from btm_scale.kernels import triton_launch
from btm_scale.kernels.tuning_table import MIX_RULES, SAME_AS, SCORE_RULES, ScoreRule

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = sorted(SHARED_BYTES)
BYTES = {16: torch.bfloat16, 32: torch.float32}


class Problem(NamedTuple):
    hidden: int
    vocab: int
    experts: int
    tokens: int
    soft_cap: float | None = None


HEADS = [(768, 50_304), (768, 50_257), (2048, 32_000), (4096, 128_256)]
PROBLEMS = [
    *(Problem(*head, *size) for head, *size in itertools.product(HEADS, (1, 8), (1, 64, 8192))),
    *(Problem(2304, 256_000, 1, tokens, 30.0) for tokens in (1, 33, 8192)),
    Problem(80, 5000, 3, 100),  # a hidden size that no block divides
    Problem(80, 5000, 3, 100, 30.0),
]
FEW_PROBLEMS = [Problem(2048, 32_000, 8, 8192), Problem(768, 50_257, 1, 64), Problem(2304, 256_000, 1, 8192, 30.0)]


def assert_resources(gpus: StubGpus, folder: Path) -> None:
    """Check that no compiled kernel spills a register, has a stack, or needs more shared memory than the device has."""
    compiled = gpus.compiled()
    assert compiled
    for number, (name, kernel) in enumerate(compiled):
        assert kernel.metadata.shared <= gpus.shared_bytes, name
        if "cubin" in kernel.asm:
            file = folder / f"{number}.cubin"
            file.write_bytes(kernel.asm["cubin"])
            command = [str(CUOBJDUMP), "--dump-resource-usage", str(file)]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            used = {word: int(re.search(rf"{word}:(\d+)", report).group(1)) for word in ("STACK", "LOCAL")}
        else:
            words = ("private_segment_fixed_size", "vgpr_spill_count")
            used = {word: int(re.search(rf"\.{word}:\s*(\d+)", kernel.asm["amdgcn"]).group(1)) for word in words}
        assert not any(used.values()), f"{name}: {used}"


def assert_resident(gpus: StubGpus, rule: ScoreRule, folder: Path) -> None:
    """Check that a multiprocessor has registers and shared memory for as many blocks as the row says."""
    lane_registers = 512 if rule.arch.startswith("gfx") else 65_536 // 32 // 4  # of each of four schedulers
    for number, (name, kernel) in enumerate(gpus.compiled()):
        if name != "score_kernel":
            continue
        if "cubin" in kernel.asm:
            command = [str(CUOBJDUMP), "--dump-resource-usage", str(folder / f"{number}.cubin")]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            registers = int(re.search(r"REG:(\d+)", report).group(1))
        else:
            registers = int(re.search(r"\.vgpr_count:\s*(\d+)", kernel.asm["amdgcn"]).group(1))
        warps_per_scheduler = rule.config.resident * rule.config.warps / 4
        assert warps_per_scheduler * -(-registers // 8) * 8 <= lane_registers
        assert rule.config.resident * (kernel.metadata.shared + 1024) <= gpus.shared_bytes + 1024 or (
            rule.config.resident == 1
        )


def score(gpus: StubGpus, rule: ScoreRule, problem: Problem) -> None:
    """Launch the scoring kernels with a row's blocks, as far from alignment as the row allows."""
    shift = 0 if rule.aligned else 1
    hidden, vocab, experts, tokens, soft_cap = problem
    dtype = BYTES[rule.bits]
    states = gpus.empty(experts, tokens, hidden + shift, dtype=dtype)[:, :, shift:]
    head = gpus.empty(vocab, hidden + shift, dtype=dtype)[:, shift:]
    targets = gpus.empty(tokens, dtype=torch.int64)
    settings = {"soft_cap": soft_cap, "config": rule.config}
    triton_launch.score_partials(states, [head] * experts, targets, **settings)
    if rule.bits == 32 and experts > 1:  # also the row of heads whose dtype differs from that of the hidden states
        triton_launch.score_partials(
            gpus.empty(*states.shape, dtype=torch.bfloat16), [head] * experts, targets, **settings
        )
        triton_launch.score_partials(
            states, [gpus.empty(*head.shape, dtype=torch.bfloat16)] * experts, targets, **settings
        )


GPU_RULES = [rule for rule in SCORE_RULES if rule.arch in ARCHITECTURES]


def _name(rule: ScoreRule) -> str:
    return f"{rule.arch}-{rule.bits}-bit-{rule.config.blocks}"


@pytest.mark.parametrize(
    "rule", cut(GPU_RULES, lambda rule: rule.bits == 16 and (rule.min_tokens > 0 or rule.arch == "sm_90"), name=_name)
)
@pytest.mark.parametrize("problems", [pytest.param(FEW_PROBLEMS, id="few"), full(PROBLEMS, id="all")])
def test_no_block_shape_in_the_table_spills_registers(rule, problems, tmp_path):
    with stub_gpus(rule.arch) as gpus:
        for problem in problems:
            score(gpus, rule, problem)
        assert_resources(gpus, tmp_path)
        used = {kernel.metadata.shared for name, kernel in gpus.compiled() if name == "score_kernel"}
        # What the choice of a row expects, but for the barriers of Blackwell's asynchronous copies.
        assert max(used) <= rule.config.shared_bytes(rule.bits) + 64
        assert_resident(gpus, rule, tmp_path)


@pytest.mark.parametrize("arch", cut(sorted(SAME_AS), lambda arch: arch == "sm_120"))
def test_the_rows_of_a_similar_architecture_fit(arch, tmp_path):
    shared = {"sm_87": 163 << 10, "sm_103": 227 << 10, "gfx950": 160 << 10}.get(arch, 99 << 10)
    with stub_gpus(arch, shared_bytes=shared) as gpus:
        for hidden, vocab, experts, tokens, _ in FEW_PROBLEMS:
            states = gpus.empty(experts, tokens, hidden, dtype=torch.bfloat16)
            head = gpus.empty(vocab, hidden, dtype=torch.bfloat16)
            targets = gpus.tensor(torch.zeros(tokens, dtype=torch.int64))
            kernels.token_logprobs(states, [head] * experts, targets)
            assert kernels.last_path().backend == "triton"
        assert_resources(gpus, tmp_path)


@pytest.mark.parametrize("arch", cut(ARCHITECTURES, lambda arch: arch in ("sm_90", "gfx942")))
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([(1, 1, 50_257), (8, 64, 128_256)], id="few"),
        full([(1, 64, 32_000), (2, 3, 50_257), (8, 1, 128_256), (64, 64, 128_256)], id="more"),
    ],
)
def test_mixing_kernels_compile_without_spills(arch, sizes, tmp_path):
    with stub_gpus(arch) as gpus:
        for experts, batch, vocab in sizes:
            logits = gpus.empty(experts, batch, vocab, dtype=torch.bfloat16)
            weights = gpus.empty(batch, experts)
            running = gpus.empty(batch, experts, dtype=torch.float64)
            kernels.mix_logits(logits, weights)
            kernels.mix_sample(logits, weights, log_likelihood=running)
            kernels.mix_sample(logits, weights, temperature=0)
        assert {name for name, _ in gpus.compiled()} == {"normalizer_kernel", "mix_kernel", "draw_kernel"}
        assert_resources(gpus, tmp_path)


# Rows that stay in registers, up to the longest, and one that does not.
LOGITS = [(32_000, torch.bfloat16), (50_304, torch.bfloat16), (65_536, torch.float16), (65_536, torch.bfloat16)]
LOGITS += [(128_256, torch.bfloat16)]


@pytest.mark.parametrize("arch", cut(ARCHITECTURES, lambda arch: arch in ("sm_90", "gfx942")))
def test_the_kernels_of_the_loss_compile_without_spills_and_move_16_bytes_at_a_time(arch, tmp_path):
    with stub_gpus(arch) as gpus:
        for width, dtype in LOGITS:
            logits = gpus.empty(2, width, dtype=dtype)
            targets = gpus.tensor(torch.zeros(2, dtype=torch.int64))
            kernels.cross_entropy_(logits, targets, vocab_size=width - 47)
            maximum, sum_exp, _ = kernels.logit_partials(logits, targets, vocab_size=width - 47)
            kernels.logit_gradient_(logits, targets, maximum, sum_exp, vocab_size=width - 47)
        assert {name for name, _ in gpus.compiled()} == {kernel.fn.__name__ for kernel in LOSS_KERNELS}
        assert_resources(gpus, tmp_path)
        for name, kernel in gpus.compiled() if arch == "sm_90" else []:
            assert re.search(r"ld\.global\S*\.v4\.b32", kernel.asm["ptx"])
            assert re.search(r"st\.global\S*\.v4\.b32", kernel.asm["ptx"]) or name == "logit_partials_kernel"


# (hidden, KV heads, query heads of each, head size) of models of 125 M to 70 B parameters, and an odd one
LAYERS = [(768, 12, 1, 64), (4096, 8, 4, 128), (8192, 8, 8, 128), (2048, 16, 1, 128), (600, 3, 2, 100)]


@pytest.mark.parametrize("arch", cut(ARCHITECTURES, lambda arch: arch in ("sm_90", "gfx942")))
@pytest.mark.parametrize("layers", [pytest.param(LAYERS[:3], id="layers"), full(LAYERS[3:], id="more_layers")])
def test_the_kernels_of_a_layer_compile_without_spills_and_move_16_bytes_at_a_time(arch, layers, tmp_path):
    with stub_gpus(arch) as gpus:
        for hidden, groups, per, size in layers:
            for kind in ("RMS norm", "last RMS norm", "layer norm of a sum with bias"):
                case = norm_case((2, 1, hidden), torch.bfloat16, kind)
                tensors = [None if tensor is None else gpus.tensor(tensor) for tensor in case]
                added, bias, residual, weight, shift, upstream, gradient = tensors
                total, _, mean, scale = kernels.add_norm(added, weight, bias=bias, residual=residual, shift=shift)
                kernels.add_norm_backward(
                    upstream,
                    total,
                    weight,
                    mean,
                    scale,
                    gradient=gradient,
                    has_shift=shift is not None,
                    has_bias=bias is not None,
                )
            mixed = gpus.empty(4, 2, groups, per + 2, size, dtype=torch.bfloat16)
            angles = gpus.empty(4, size // 2, dtype=torch.bfloat16)
            query, key = kernels.split_rotated(mixed, angles, angles)
            kernels.join_rotated(query, key, key, angles, angles)
            kernels.join_rotated(query, key, key, has_bias=True)
            values = gpus.empty(2, 4 * hidden, dtype=torch.bfloat16)
            kernels.bias_gelu_backward(values, values, values[0])
        assert {name for name, _ in gpus.compiled()} == {kernel.fn.__name__ for kernel in LAYER_KERNELS}
        assert_resources(gpus, tmp_path)
        for name, kernel in gpus.compiled() if arch == "sm_90" and layers == LAYERS[:3] else []:
            if name != "column_sums_kernel":  # which reads little
                assert re.search(r"ld\.global\S*\.v4\.b32", kernel.asm["ptx"]), name


@pytest.mark.parametrize(("arch", "instruction"), [("sm_90", "wgmma.mma_async"), ("sm_100", "tcgen05.mma")])
def test_launches_with_many_tokens_use_tensor_cores_and_16_byte_copies(arch, instruction):
    rule = next(rule for rule in SCORE_RULES if rule.arch == arch and rule.min_tokens > 0)
    with stub_gpus(arch) as gpus:
        score(gpus, rule, FEW_PROBLEMS[0])
        ptx = next(kernel.asm["ptx"] for name, kernel in gpus.compiled() if name == "score_kernel")
    assert instruction in ptx
    widths = set(re.findall(r"cp\.async\.\S+ \[[^\]]*\], \[[^\]]*\], (0x\w+)", ptx))
    assert widths == {"0x10"}


def test_every_architecture_of_the_table_is_compiled_for():
    assert {rule.arch for rule in SCORE_RULES} == set(MIX_RULES) == {*ARCHITECTURES, "interpreter"}
    assert set(SAME_AS.values()) <= set(ARCHITECTURES)
