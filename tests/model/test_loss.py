from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from btm_scale.model import loss
from btm_scale.model.loss import head_loss


@pytest.mark.parametrize("chunk", [16, 64], ids=["many chunks", "one chunk"])
@pytest.mark.parametrize("rows", [37, 40], ids=["no padding", "padded"])
def test_loss_and_gradients_equal_cross_entropys(rows: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "tokens_per_chunk", lambda *_, **__: chunk)
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(rows, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 37, (50,))
    expected = functional.cross_entropy(functional.linear(hidden, weight[:37]), targets)
    gradients = torch.autograd.grad(3.0 * expected, (hidden, weight))
    ours = [value.detach().float().requires_grad_() for value in (hidden, weight)]
    mean_loss = head_loss(*ours, targets, vocabulary=37)
    (3.0 * mean_loss).backward()
    assert mean_loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for value, gradient in zip(ours, gradients, strict=True):
        assert value.grad is not None
        torch.testing.assert_close(value.grad.double(), gradient, atol=1e-6, rtol=1e-4)


def test_inputs_without_gradients_give_a_loss_without_gradient() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(9, 8)
    value = head_loss(hidden, weight, torch.arange(4), vocabulary=9)
    assert not value.requires_grad
    assert value.item() == pytest.approx(functional.cross_entropy(hidden @ weight.T, torch.arange(4)).item(), abs=1e-5)


@pytest.mark.parametrize("chunk", [16, 0], ids=["on a CPU", "on a GPU"])
def test_without_tokens_the_loss_is_nan_and_the_gradients_are_zero_as_of_pytorchs(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "tokens_per_chunk", lambda *_, **__: chunk)
    targets = torch.zeros(0, dtype=torch.int64)
    results = []
    for computed in (
        lambda h, w: head_loss(h, w, targets, vocabulary=9),
        lambda h, w: functional.cross_entropy(h @ w.T, targets),
    ):
        hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
        value = computed(hidden, weight)
        value.backward()
        results.append((value, hidden.grad, weight.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert results[0][0].isnan()
    assert (results[0][2] == 0).all()
