"""Kernels and bytes of everything that runs on `meta` tensors, by operator.

A PyTorch operator is one kernel, which reads each element of its inputs once and writes each of its outputs once. An
operator of btm_scale.kernels counts what it declares, and a function that is compiled what inductor makes of it.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from btm_scale import kernels
from btm_scale.kernels.hardware import Hardware
from gpu_counting.regions import Count, inductor_count

H100 = Hardware("nvidia", "sm_90", 227 << 10, 132)
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "add_product_", "_scaled_mm_v2")
_NO_KERNEL = ("detach", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_MORE_KERNELS = {"native_layer_norm_backward": 2}  # gradients of input and weight


class Counts:
    """Kernels and bytes by operator."""

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def add(self, name: str, count: Count) -> None:
        self.kernels[name] += count.kernels
        self.bytes[name] += count.bytes

    def total(self, *, products: bool = True) -> Count:
        """Return the sum; without `products`, of what is neither a matrix product nor attention."""
        names = [name for name in self.kernels if products or not is_product(name)]
        return Count(sum(self.kernels[name] for name in names), sum(self.bytes[name] for name in names))

    def less(self, other: Counts) -> Counts:
        """Return these counts without those of another run."""
        difference = Counts()
        for name in self.kernels:
            kernels_left = self.kernels[name] - other.kernels[name]
            difference.add(name, Count(kernels_left, self.bytes[name] - other.bytes[name]))
        return difference


def is_product(name: str) -> bool:
    """Return whether an operator is a matrix product or attention."""
    return name in _PRODUCTS or "attention" in name or "attn" in name


@contextlib.contextmanager
def counted() -> Iterator[Counts]:
    """Count everything that runs on `meta` tensors in this context, forward and backward."""
    mode = _Counting()
    with contextlib.ExitStack() as stack:
        for module, name in _compiled():
            stack.enter_context(mock.patch.object(module, name, mode.as_region(name, getattr(module, name))))
        stack.enter_context(_GpuFunctions(mode.counts))
        stack.enter_context(mode)
        yield mode.counts


def _compiled() -> list[tuple[ModuleType, str]]:
    """Return the functions that Megatron-core and this project compile on a GPU, of the modules that are loaded."""
    names = {
        "megatron.core.fusions.fused_bias_swiglu": ("swiglu", "swiglu_back"),
        "megatron.core.fusions.fused_bias_gelu": ("bias_gelu", "bias_gelu_back"),
        "btm_scale.model.float8": ("_quantize",),
    }
    loaded = {name: sys.modules.get(name) for name in names}
    return [(module, name) for file, module in loaded.items() if module is not None for name in names[file]]


class _GpuFunctions(TorchFunctionMode):
    """What PyTorch computes by one operator on a GPU is one on `meta` too."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.rms_norm:
            if kwargs.get("weight") is None:
                self._counts.add("rms_norm", Count(1, 2 * _touched(args[0])))
                return torch.empty_like(args[0])
            return _RMSNorm.apply(args[0], kwargs["weight"], self._counts)
        if function is torch.nn.functional.scaled_dot_product_attention and kwargs.get("attn_mask") is None:
            query, key, value = args[:3]
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(query, key, value, 0.0, kwargs["is_causal"])[0]
        if function is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = args[:3]
            bias = kwargs["attn_mask"].expand(*query.shape[:3], key.shape[2])
            return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, False)[0]
        return function(*args, **kwargs)


class _RMSNorm(torch.autograd.Function):
    """PyTorch's kernels on a GPU: one forward, and backward one each for the gradients of input and weight."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, counts: Counts) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.counts = counts
        counts.add("rms_norm", Count(1, 2 * _touched(values) + _touched(weight) + _statistics(values)))
        return torch.empty_like(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        values, weight = ctx.saved_tensors
        rows = _touched(values)
        # Each reads gradient, input and statistics.
        ctx.counts.add("rms_norm_backward", Count(2, 5 * rows + 2 * _statistics(values) + 2 * _touched(weight)))
        return torch.empty_like(values), torch.empty_like(weight), None


def _statistics(values: Tensor) -> int:
    return 4 * values.numel() // values.shape[-1]


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def as_region(self, name: str, function: Any) -> Any:
        """Return a function that counts as the kernels which inductor generates for it."""

        def region(*arguments: Tensor) -> Any:
            with torch.utils._python_dispatch._disable_current_modes():
                function_itself = getattr(function, "_torchdynamo_orig_callable", function)
                self.counts.add(name, inductor_count(function_itself, arguments))
                return function_itself(*arguments)

        return region

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        name = operator.overloadpacket._qualified_op_name.partition("::")[2]
        if name in _NO_KERNEL or _is_view(operator):
            return result
        if operator.namespace == "btm_scale":
            self.counts.add(name, _declared(name, args))
        else:
            self.counts.add(name, Count(_MORE_KERNELS.get(name, 1), _bytes(operator, name, args, kwargs, result)))
        return result


def _is_view(operator: Any) -> bool:
    aliases = [returned.alias_info for returned in operator._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _declared(name: str, args: Any) -> Count:
    if name == "add_product_":
        cost = kernels.products.product_cost(*args)
    elif name in ("cross_entropy_", "logit_partials", "logit_gradient_"):
        cost = kernels.cost(name, args[0], vocab_size=args[-1], on=H100)
    elif name == "mix_sample":
        logits, log_weights, *settings = args
        cost = kernels.cost(name, logits, log_weights, *settings[2:], on=H100)
    elif name == "token_logprobs":
        hidden, heads, targets, vocabulary, *_ = args
        cost = kernels.cost(name, hidden, heads, targets, vocab_size=vocabulary, on=H100)
    else:
        cost = kernels.cost(name, *args, on=H100)
    return Count(cost.launches, cost.bytes_read + cost.bytes_written)


def _bytes(operator: Any, name: str, args: Any, kwargs: Any, result: Any) -> int:
    """Return the bytes read and written: of rows that are looked up only those, of an output that is given no read."""
    written = [*_leaves(result)]
    read = []
    for argument, value in zip(operator._schema.arguments, [*args, *[None] * 20], strict=False):
        value = kwargs.get(argument.name, value)
        is_output = argument.alias_info is not None and argument.alias_info.is_write
        if is_output:
            written = [*_leaves(value)]
        if not (is_output and (argument.is_out or name in ("copy_", "fill_", "zero_", "normal_"))):
            read += _leaves(value)
    if name in ("gather", "embedding", "index_select"):
        read = [*_leaves(result), read[-1]]
    if name in ("scatter_add_", "scatter_", "index_add_"):
        changed = [tensor for tensor in read[1:] if tensor.dtype != torch.int64]
        read, written = [*read[1:], *changed], changed
    return sum(_touched(tensor) for tensor in (*read, *written))


def _touched(tensor: Tensor) -> int:
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


def _leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
