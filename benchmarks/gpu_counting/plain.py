"""The peer: the plain PyTorch model under torch.compile, as inductor compiles its layer and its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from plain_pytorch import Layer
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from gpu_counting.cases import Case
from gpu_counting.regions import Count, lowered_count

Built = tuple[Callable[..., Tensor], list[Tensor]]


def layer_count(case: Case) -> Count:
    """Return the kernels and bytes of one layer besides products and attention, forward and backward."""
    shape = case.shape.model_copy(update={"family": "llama"})

    def build() -> Built:
        torch.set_default_dtype(torch.bfloat16)
        try:
            layer = Layer(shape)
        finally:
            torch.set_default_dtype(torch.float32)
        names = [name for name, _ in layer.named_parameters()]

        def forward(hidden: Tensor, cos: Tensor, sin: Tensor, *parameters: Tensor) -> Tensor:
            output: Tensor = functional_call(layer, dict(zip(names, parameters, strict=True)), (hidden, cos, sin))
            return output

        hidden = torch.empty(case.sequences, case.length, shape.hidden, dtype=torch.bfloat16, requires_grad=True)
        angles = [torch.empty(case.length, shape.head_size, dtype=torch.bfloat16) for _ in range(2)]
        return forward, [hidden, *angles, *layer.parameters()]

    return _compiled(build)


def loss_count(case: Case) -> Count:
    """Return the same of head and cross entropy."""
    hidden, vocabulary = case.shape.hidden, case.vocabulary

    def build() -> Built:
        def loss(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return functional.cross_entropy(functional.linear(states, weight).float(), targets)

        states = torch.empty(case.tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(vocabulary, hidden, dtype=torch.bfloat16, requires_grad=True)
        return loss, [states, weight, torch.zeros(case.tokens, dtype=torch.int64)]

    return _compiled(build)


def _compiled(build: Callable[[], Built]) -> Count:
    """Return the counts of forward and backward graph, as torch.compile divides them.

    `build` returns a function and its inputs, which include its parameters.
    """
    from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode

    counts: list[Count] = []

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def lower(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> Any:
            counts.append(lowered_count(graph, examples, mode))
            return make_boxed_func(graph.forward)

        function, inputs = build()
        compiled = aot_function(
            function,
            fw_compiler=lower,
            bw_compiler=lower,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        compiled(*inputs).sum().backward()
    return Count(sum(count.kernels for count in counts), sum(count.bytes for count in counts))
