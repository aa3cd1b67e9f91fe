"""What other fused losses do for the micro-batches of `CASES`: PyTorch's own, and Liger-Kernel's by its algorithm."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gpu_counting.cases import META, Case
from gpu_counting.counter import Counts, counted
from gpu_counting.regions import Count

_BFLOAT16, _FLOAT, _INT = 2, 4, 8  # bytes


def pytorch_counts(case: Case) -> Counts:
    """Return what `torch.nn.functional.linear_cross_entropy` does, with the options that it chooses on a GPU.

    A tensor parallel rank's part of the vocabulary counts as a complete one: the function has no tensor parallelism.
    """
    from torch.nn.modules import linear_cross_entropy

    rows, hidden = case.vocabulary // case.tensor, case.shape.hidden
    states = torch.empty(case.tokens, hidden, dtype=torch.bfloat16, device=META)
    weight = torch.empty(rows, hidden, dtype=torch.bfloat16, device=META)
    targets = torch.zeros(case.tokens, dtype=torch.int64, device=META)
    options = torch.nn.LinearCrossEntropyOptions(acc_dtype=torch.float32)._adjust(
        case.tokens, hidden, rows, torch.bfloat16, torch.device("cuda")
    )
    with counted() as counts, _OnCuda():
        # The operator itself has no kernel for `meta`; this is its body.
        _, *gradients = linear_cross_entropy._linear_cross_entropy_batch_chunked_accumulator(
            states,
            weight,
            targets,
            None,
            None,
            "mean",
            -100,
            0.0,
            options.batch_chunk_size,
            options.acc_policy,
            options.acc_dtype,
            True,
            True,
            False,
        )
        upstream = torch.empty((), device=META)
        for gradient in gradients[:2]:
            gradient.mul_(upstream)
    return counts


def liger_count(case: Case) -> Count:
    """Return the kernels and bytes of Liger-Kernel's fused linear cross entropy (arXiv 2410.10989, section 3.2).

    Chunks have T / ceil(V / H) tokens, rounded up to a power of two, so that their logits take no more memory than the
    hidden states. A chunk is three products, the last of which adds to the weight's gradient in bfloat16, and a kernel
    that reads each logit in two passes and writes its gradient. Gradients and losses are cleared before; the upstream
    gradient is 1, so that nothing is scaled in the backward pass. Kernels that move a few bytes per token are left out.
    """
    tokens, rows, hidden = case.tokens, case.vocabulary // case.tensor, case.shape.hidden
    size = min(tokens, _power_of_two(_ceil_div(tokens, _ceil_div(rows, hidden))))
    chunks = _ceil_div(tokens, size)
    states, logits, weight = (_BFLOAT16 * count for count in (tokens * hidden, tokens * rows, rows * hidden))
    cleared = states + weight + tokens * _FLOAT
    products = (
        (states + chunks * weight + logits)  # logits
        + (logits + chunks * weight + states)  # gradient of the hidden states
        + (logits + states + 2 * chunks * weight)  # gradient of the weight, which is read and written
    )
    losses = 3 * logits + tokens * (_INT + _FLOAT)
    return Count(3 + 4 * chunks, cleared + products + losses)


class _OnCuda(TorchFunctionMode):
    """`meta` tensors report a GPU as their device, so that functions which ask for it do what they do on a GPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device("cuda")
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = META
        return function(*args, **kwargs)


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
