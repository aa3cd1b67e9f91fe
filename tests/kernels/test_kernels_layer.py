"""A layer's elementwise kernels: the reference against float64, the operators, and launches on GPUs in name only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.layer_cases import (
    FLOATS,
    KINDS,
    assert_gelu_is_exact,
    assert_norm_is_exact,
    assert_rotation_is_exact,
    gelu_case,
    norm_case,
    rotary_case,
)
from helpers.stub_gpu import StubGpus, stub_gpus
from triton.runtime.errors import OutOfResources

from btm_scale import kernels
from btm_scale.kernels import layer_operators
from btm_scale.kernels.cost import Cost

OPERATORS = {
    "add_norm": "1024",
    "add_norm_backward": "1024",
    "split_rotated": "32x32",
    "join_rotated": "32x32",
    "join_rotated with bias": "32x32",
    "bias_gelu_backward": "2048",
}


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_of_the_norm_is_exact(dtype, kind):
    assert_norm_is_exact(norm_case((5, 3, 100), dtype, kind))
    assert str(kernels.last_path("add_norm_backward")) == "reference"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("groups", "per"), [(3, 1), (2, 3)])
def test_the_reference_of_the_rotation_is_exact(dtype, groups, per):
    assert_rotation_is_exact(rotary_case(7, 2, groups, per, 12, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_reference_of_gelu_is_exact(dtype):
    assert_gelu_is_exact(*gelu_case((5, 3, 100), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorch_finds_schema_and_fake_of_gelu_consistent(dtype):
    torch.library.opcheck(layer_operators.BIAS_GELU_BACKWARD, gelu_case((5, 3, 16), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["RMS norm", "layer norm of a sum with bias"])
def test_pytorch_finds_schema_and_fake_of_the_norm_consistent(dtype, kind):
    added, bias, residual, weight, shift, upstream, gradient = norm_case((5, 3, 16), dtype, kind)
    torch.library.opcheck(layer_operators.ADD_NORM, (added, bias, residual, weight, shift, 1e-5))
    total, _, mean, scale = kernels.add_norm(added, weight, bias=bias, residual=residual, shift=shift)
    arguments = (gradient, upstream, total, weight, mean, scale, shift is not None, bias is not None)
    torch.library.opcheck(layer_operators.ADD_NORM_BACKWARD, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorch_finds_schema_and_fake_of_the_rotation_consistent(dtype):
    mixed, cos, sin = rotary_case(4, 2, 2, 3, 8, dtype)
    torch.library.opcheck(layer_operators.SPLIT_ROTATED, (mixed, cos, sin))
    query, key = kernels.split_rotated(mixed, cos, sin)
    for angles, has_bias in (((cos, sin), False), ((None, None), True)):
        torch.library.opcheck(layer_operators.JOIN_ROTATED, (query, key, mixed[:, :, :, -1], *angles, has_bias))


def test_rows_that_do_not_exist_have_no_norm_and_gradients_of_zero():
    case = norm_case((0, 16), torch.float32, "layer norm of a sum with bias")
    total, normed, mean, scale = kernels.add_norm(
        case.added, case.weight, bias=case.bias, residual=case.residual, shift=case.shift
    )
    assert [part.shape for part in (total, normed, mean, scale)] == [(0, 16), (0, 16), (0,), (0,)]
    result, sums = kernels.add_norm_backward(
        case.upstream, total, case.weight, mean, scale, has_shift=True, has_bias=True
    )
    assert result.shape == (0, 16)
    assert torch.equal(sums, torch.zeros(3, 16))


def test_wrong_arguments_are_our_own_errors():
    added, _, residual, weight, _, upstream, _ = norm_case((5, 16), torch.float32, "RMS norm of a sum")
    with pytest.raises(ValueError, match=r"must have the same shape and dtype"):
        kernels.add_norm(added, weight, residual=residual[:3])
    with pytest.raises(ValueError, match=r"weight and shift must be \[hidden\]"):
        kernels.add_norm(added, weight, shift=weight[:3])
    with pytest.raises(ValueError, match=r"Use bfloat16, float16 or float32"):
        kernels.add_norm(added.double(), weight)
    with pytest.raises(ValueError, match="on different devices"):
        kernels.add_norm(added, weight.to("meta"))
    total, _, mean, scale = kernels.add_norm(added, weight)
    with pytest.raises(ValueError, match="as add_norm returns them"):
        kernels.add_norm_backward(upstream, total, weight, mean, scale[:2])
    mixed, cos, sin = rotary_case(4, 2, 2, 3, 8, torch.float32)
    with pytest.raises(ValueError, match=r"cos and sin must be \[length, d / 2\]"):
        kernels.split_rotated(mixed, cos[:2], sin)
    with pytest.raises(ValueError, match=r"Heads must be \[length, batch"):
        kernels.split_rotated(mixed[:, :, :, :2], cos, sin)
    query, key = kernels.split_rotated(mixed, cos, sin)
    with pytest.raises(ValueError, match=r"Heads must be \[length, batch"):
        kernels.join_rotated(query, key, query, cos, sin)
    with pytest.raises(ValueError, match="the same for all of them"):
        kernels.join_rotated(query, key, key.bfloat16(), cos, sin)
    with pytest.raises(ValueError, match=r"cos and sin must be \[length, d / 2\]"):
        kernels.join_rotated(query, key, key, cos)
    with pytest.raises(ValueError, match=r"bias must be \[hidden\]"):
        kernels.bias_gelu_backward(added, added, weight[:3])


def call(gpus: StubGpus, operator: str) -> list[Any]:
    """Call an operator with bfloat16 tensors; return the arguments of its schema."""

    def on_gpu(tensors: Any) -> list[Any]:
        return [None if tensor is None else gpus.tensor(tensor) for tensor in tensors]

    if operator == "bias_gelu_backward":
        gelu = on_gpu(gelu_case((1500, 2, 3000), torch.bfloat16))
        kernels.bias_gelu_backward(*gelu)
        return gelu
    if "rotated" in operator:
        mixed, cos, sin = on_gpu(rotary_case(4, 2, 2, 3, 64, torch.bfloat16))
        query, key = kernels.split_rotated(mixed, cos, sin)
        if operator == "split_rotated":
            return [mixed, cos, sin]
        gpus.launches.clear()
        has_bias = operator.endswith("bias")
        kernels.join_rotated(query, key, key, cos, sin, has_bias=has_bias)
        return [query, key, key, cos, sin, has_bias]
    case = norm_case((150, 2, 1000), torch.bfloat16, "layer norm of a sum with bias")
    added, bias, residual, weight, shift, upstream, gradient = on_gpu(case)
    total, _, mean, scale = kernels.add_norm(added, weight, bias=bias, residual=residual, shift=shift)
    if operator == "add_norm":
        return [added, bias, residual, weight, shift, 1e-5]
    gpus.launches.clear()
    kernels.add_norm_backward(upstream, total, weight, mean, scale, gradient=gradient, has_shift=True, has_bias=True)
    return [gradient, upstream, total, weight, mean, scale, True, True]


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_declared_cost_is_what_the_driver_counts(operator):
    with stub_gpus("sm_90") as gpus:
        arguments = call(gpus, operator)
        name = operator.partition(" ")[0]
        assert str(kernels.last_path(name)) == f"triton {OPERATORS[operator]}"
        counted = [Cost(1, launch.bytes_read(), launch.bytes_written()) for launch in gpus.launches]
        assert kernels.cost(name, *arguments) == sum(counted, Cost(0, 0, 0))


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_reference_runs_where_a_gpu_refuses_the_kernel(operator, caplog):
    with stub_gpus("sm_90") as gpus:
        gpus.fail = lambda kernel: (_ for _ in ()).throw(OutOfResources(3, 2, "registers"))
        call(gpus, operator)
        assert str(kernels.last_path(operator.partition(" ")[0])) == "reference"
        assert "as PyTorch operations" in caplog.text


def test_rows_that_do_not_fit_the_registers_run_as_pytorch_operations():
    with stub_gpus("sm_90") as gpus:
        kernels.add_norm(gpus.tensor(torch.ones(2, 16_384)), gpus.tensor(torch.ones(16_384)))
        assert str(kernels.last_path("add_norm")) == "reference"
        assert gpus.launches == []
