"""Products in float8: their error, their gradients, and which models and devices have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from btm_scale.config.layout import Layout
from btm_scale.errors import LaunchError
from btm_scale.model import float8
from btm_scale.model.float8 import Float8Product, product, quantized, require_float8
from btm_scale.model.shape import ModelShape

SIZES: dict[str, Any] = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96, "positions": 16}
SHAPE = ModelShape(family="llama", vocabulary=65, **SIZES)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def restored(rows: Tensor) -> Tensor:
    values, scales = quantized(rows)
    return values.double() * scales.double()


def test_each_number_is_rounded_to_four_significant_bits_whatever_the_size_of_its_row() -> None:
    sizes = 2.0 ** torch.randint(-60, 60, (50, 1), generator=torch.Generator().manual_seed(1)).double()
    rows = (numbers(50, 64).double() * sizes).bfloat16()
    error = (restored(rows) - rows.double()).abs()
    assert bool(
        (error <= (rows.double().abs() / 16).clamp(min=rows.double().abs().amax(1, keepdim=True) / 2**17)).all()
    )


def test_scales_are_powers_of_two_that_bring_the_largest_number_near_the_largest_float8() -> None:
    rows = torch.cat([numbers(30, 32), torch.full((1, 32), 448.0), torch.full((1, 32), 449.0), torch.zeros(1, 32)])
    values, scales = quantized(rows.bfloat16())
    assert bool((torch.frexp(scales).mantissa == 0.5).all())
    largest = values.double().abs().amax(1)
    assert bool(((largest[:-1] > 224 - 1e-9) & (largest[:-1] <= 448)).all())
    assert scales[-3].item() == 1.0
    assert not values[-1].double().any()


def test_a_transposed_weight_is_copied_in_its_own_order() -> None:
    weight = numbers(48, 32)
    values, scales = quantized(weight.t())
    assert values.is_contiguous()
    assert values.shape == (32, 48)
    torch.testing.assert_close(values.float() * scales, weight.t().float(), rtol=0.07, atol=0.02)


def test_products_of_integers_are_exact() -> None:
    left, right = (
        torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(2)) for shape in ((21, 32), (48, 32))
    )
    exact = left.double() @ right.double().t()
    assert torch.equal(product(left.bfloat16(), right.bfloat16()).double(), exact.bfloat16().double())


def test_the_error_of_a_product_is_that_of_four_bits() -> None:
    left, right = numbers(200, 512), numbers(96, 512, seed=1)
    exact = left.double() @ right.double().t()
    found = float((product(left, right).double() - exact).norm() / exact.norm())
    assert found < 0.05
    by_copies = restored(left) @ restored(right).t()
    assert float((product(left, right).double() - by_copies).norm() / exact.norm()) < 4e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_makes_its_row_and_no_other_not_a_number(value: float) -> None:
    left, right = numbers(5, 32), numbers(16, 32, seed=1)
    expected = product(left, right)
    left[2, 7] = value
    result = product(left, right)
    assert bool(result[2].isnan().all())
    assert torch.equal(result[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@pytest.mark.parametrize("summed", [False, True])
def test_gradients_are_a_float8_product_and_a_bfloat16_product(summed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight = numbers(3, 4, 32).requires_grad_(), numbers(48, 32, seed=1).requires_grad_()
    upstream = numbers(3, 4, 48, seed=2)
    sums = torch.ones(48, 32) if summed else None

    def add(rows: Tensor, gradient: Tensor, total: Tensor) -> None:
        total += gradient.float().t() @ rows.float()

    monkeypatch.setattr(
        float8.layers,
        "fused_weight_gradient_mlp_cuda",
        type("Sums", (), {"wgrad_gemm_accum_fp32": staticmethod(add)}),
        raising=False,
    )
    result = Float8Product.apply(states, weight, sums, None, False)
    assert torch.equal(result, product(states.flatten(0, 1), weight).view(3, 4, 48))
    result.backward(upstream)
    assert states.grad is not None
    assert torch.equal(states.grad, product(upstream.flatten(0, 1), weight.t()).view(3, 4, 32))
    exact = upstream.flatten(0, 1).float().t() @ states.detach().flatten(0, 1).float()
    if sums is None:
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad.float(), exact, rtol=0.01, atol=0.01)
    else:
        assert weight.grad is None
        torch.testing.assert_close(sums, 1 + exact)


def test_frozen_weights_have_no_gradient() -> None:
    states, weight = numbers(4, 32).requires_grad_(), numbers(48, 32, seed=1)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        result = Float8Product.apply(states, weight, None, None, False)
    result.sum().backward()
    assert states.grad is not None
    assert weight.grad is None
    assert [tensor.shape for tensor in saved] == [weight.shape], "the states are of use to the weight's gradient only"


def test_evaluation_is_left_to_megatron_core() -> None:
    class Plain:
        def _forward_impl(self, input: str, weight: str, **named: Any) -> Any:
            return input, weight, named

    class Layer(float8._Float8, Plain):
        training = False

    named = {"bias": 1, "gradient_accumulation_fusion": 2, "allreduce_dgrad": 3, "sequence_parallel": 4, "tp_group": 5}
    given: Any = {**named, "wgrad_deferral_limit": 6}
    assert Layer()._forward_impl(input="states", weight="weight", **given) == ("states", "weight", given)  # type: ignore[arg-type]


def test_this_cpu_computes_float8_products_and_what_does_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    require_float8.cache_clear()
    require_float8(cpu)

    def raising(error: Exception) -> Any:
        def product(*_: Tensor) -> Tensor:
            raise error

        return product

    def wrong(rows: Tensor, columns: Tensor, *_: Tensor) -> Tensor:
        return (rows.float() @ columns.float()).bfloat16()  # without scales

    for replacement, error, message in (
        (raising(RuntimeError("scaled_mm needs 8.9\nC++ CapturedTraceback")), LaunchError, r"\(scaled_mm needs 8.9\)"),
        (raising(NotImplementedError()), LaunchError, r"\(NotImplementedError\)"),
        (raising(torch.OutOfMemoryError("full")), torch.OutOfMemoryError, "full"),
        (wrong, LaunchError, "relative error"),
    ):
        require_float8.cache_clear()
        monkeypatch.setattr(float8, "_emulated", replacement)
        with pytest.raises(error, match=message):
            require_float8(cpu)
    require_float8.cache_clear()


def test_a_cpu_emulates_the_operator_that_a_gpu_runs() -> None:
    (rows, of_rows), (columns, of_columns) = quantized(numbers(40, 64)), quantized(numbers(48, 64, seed=1))
    arguments = rows, columns.t(), of_rows, of_columns.t()
    torch.testing.assert_close(float8._scaled(*arguments), float8._emulated(*arguments), rtol=0.01, atol=0.01)


def test_one_compilation_serves_weights_of_all_shapes_frozen_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU runs the compiled function; torch compiles a function at most eight times, and runs it as it is then."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    by_backend = torch.compile(float8._quantize, backend=backend, dynamic=True)
    monkeypatch.setattr(float8, "_quantize", by_backend)
    for frozen in (False, True):
        for outputs, width in ((48, 32), (64, 32), (32, 64), (96, 48), (16, 80)):
            weight = torch.nn.Parameter(numbers(outputs, width), requires_grad=not frozen)
            for rows in (4, 8, 20):
                states = numbers(rows, width).requires_grad_()
                result = Float8Product.apply(states, weight, None, None, False)
                result.backward(torch.ones_like(result))
    torch._dynamo.reset()
    assert 1 <= len(compiled) <= 3


@pytest.mark.parametrize("precision", ["auto", "fp16", "fp32"])
def test_other_precisions_than_bfloat16_are_refused(precision: str) -> None:
    with pytest.raises(ValidationError, match="set precision to bf16"):
        Layout(float8=True, precision=precision)  # type: ignore[arg-type]


def test_widths_must_be_multiples_of_16_on_every_tensor_rank() -> None:
    layout = Layout(float8=True, precision="bf16")
    assert layout.problems(SHAPE, 16) == []
    assert layout.model_copy(update={"tensor": 2}).problems(SHAPE, 16) == []
    odd = SHAPE.model_copy(update={"ffn": 112})
    assert layout.problems(odd, 16) == []
    (problem,) = layout.model_copy(update={"tensor": 2}).problems(odd, 16)
    assert "MLP 56 on each of 2 tensor ranks" in problem
    assert len(layout.model_copy(update={"tensor": 3}).problems(SHAPE, 16)) == 1, "3 divides nothing"
    assert "lower tensor" in problem
    assert "mixture" in layout.problems(SHAPE.mixture(4, 2), 16)[0]


def test_a_layout_with_float8_says_so() -> None:
    assert "bf16 with float8 products" in str(Layout(float8=True, precision="bf16"))
