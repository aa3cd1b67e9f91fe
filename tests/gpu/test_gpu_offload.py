"""Inputs of recomputed layers that wait on the host, on the streams of a real GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from btm_scale.model.offload import HostInputs

LAYERS, TOKENS, HIDDEN = 6, 8192, 1024


def test_gradients_have_the_bits_of_inputs_that_stay_and_the_gpu_holds_two() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    weights = [torch.randn(HIDDEN, HIDDEN, device=device) / 32 for _ in range(LAYERS)]
    results, peaks = [], []
    for host in (None, HostInputs(LAYERS)):
        own = [weight.clone().requires_grad_() for weight in weights]
        torch.cuda.reset_peak_memory_stats(device)
        for seed in range(3):  # buffers are used again
            _train(own, host, seed, device)
        results.append([weight.grad for weight in own])
        peaks.append(torch.cuda.max_memory_allocated(device))
        del own
    assert all(torch.equal(kept, offloaded) for kept, offloaded in zip(*results, strict=True))
    # The second measurement also holds the gradients of the first.
    first = LAYERS * HIDDEN * HIDDEN * 4
    assert peaks[0] - (peaks[1] - first) > (LAYERS - 3) * TOKENS * HIDDEN * 4


def _train(weights: list[Tensor], host: HostInputs | None, seed: int, device: torch.device) -> None:
    torch.manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, device=device).requires_grad_()
    for number, weight in enumerate(weights, start=1):

        def layer(values: Tensor, weight: Tensor = weight) -> Tensor:
            return torch.tanh(values @ weight)

        if host is None:
            hidden = checkpoint(layer, hidden, use_reentrant=True)
        else:
            with host.holding(hidden, number):
                hidden = checkpoint(layer, hidden, use_reentrant=True)
    hidden.square().mean().backward()
