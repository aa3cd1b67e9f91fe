"""Kernels and bytes of a function that torch.compile compiles, as inductor's scheduler fuses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_KNOWN: dict[Any, Count] = {}


class Count(NamedTuple):
    """Kernels, and bytes read and written."""

    kernels: int
    bytes: int


def inductor_count(function: Callable[..., Any], arguments: Sequence[Any]) -> Count:
    """Return what inductor generates for a function of these tensors, of which only shapes and dtypes are read."""
    key = (function, *(_key(argument) for argument in arguments))
    if key not in _KNOWN:
        _KNOWN[key] = _counted(function, arguments)
    return _KNOWN[key]


def _key(argument: Any) -> Any:
    return (argument.shape, argument.stride(), argument.dtype) if isinstance(argument, Tensor) else argument


def _counted(function: Callable[..., Any], arguments: Sequence[Any]) -> Count:
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    places = [index for index, argument in enumerate(arguments) if isinstance(argument, Tensor)]

    def of_tensors(*values: Tensor) -> Any:
        filled = list(arguments)
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        return function(*filled)

    with FakeTensorMode() as mode, torch.no_grad():
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in tensors]
        graph = make_fx(of_tensors, decomposition_table=select_decomp_table())(*fakes)
        return lowered_count(graph, fakes, mode)


def lowered_count(graph: torch.fx.GraphModule, inputs: Sequence[Tensor], mode: Any) -> Count:
    """Return the kernels and bytes of a graph, without the matrix products and attention that inductor calls."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
    from torch._inductor.virtualized import V

    lowering = GraphLowering(graph, example_inputs=inputs)
    with V.set_fake_mode(mode), V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
        lowering.run(*inputs)
        lowering._update_scheduler()
        outside = (ExternKernelSchedulerNode, NopKernelSchedulerNode)
        nodes = [node for node in lowering.scheduler.nodes if not isinstance(node, outside)]
        return Count(len(nodes), sum(int(node.get_read_write_buffers_sizes()) for node in nodes))
