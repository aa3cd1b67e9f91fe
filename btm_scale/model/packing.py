"""Which tokens a token may attend to, computed once per batch: those of its document, within the model's window.

A GPU's flash kernel takes the boundaries of packed sequences. Other kernels take a mask, which PyTorch's fastest ones
refuse.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_LARGEST_HEAD = 256


@dataclass(frozen=True)
class Packed:
    """The sequences of a batch, one after another. A token attends to earlier tokens of its sequence.

    `starts` int32 [sequences + 1] has the first token of each sequence, and the end of the last. With a window of n, a
    token attends to itself and the n - 1 tokens before it.
    """

    starts: Tensor
    longest: int  # an upper bound of the sequences' lengths
    window: int | None = None


def visible(
    tokens: Tensor, *, end_of_text: int | None, window: int | None, packs: bool, starts: Tensor | None = None
) -> Tensor | Packed | None:
    """Return what each token of a batch [batch, length] may attend to; None if that is every earlier token.

    With `packs`, return the boundaries of sequences; otherwise a mask, [batch, 1, length, length] or [length, length],
    that is True where a token attends to another. Without `end_of_text`, documents attend to each other.
    `starts`, bool [batch, length], are the first tokens of documents, if others than those after `end_of_text`.
    """
    length = tokens.shape[1]
    if window is not None and window >= length:
        window = None
    if end_of_text is None and window is None:
        return None
    ends = None
    if end_of_text is not None:
        ends = tokens == end_of_text if starts is None else functional.pad(starts[:, 1:], (0, 1))
    if packs:
        return Packed(_starts(tokens, ends), length, window)
    mask = None if ends is None else _before_ends(ends)
    if window is not None:
        near = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril().triu(1 - window)
        mask = near if mask is None else mask & near
    return mask


def within_documents(tokens: Tensor, end_of_text: int) -> Tensor:
    """Return the causal mask [batch, 1, length, length] of packed documents that do not attend to each other.

    `tokens` [batch, length]; each document ends with `end_of_text`, which belongs to it.
    """
    return _before_ends(tokens == end_of_text)


def _before_ends(ends: Tensor) -> Tensor:
    document = ends.cumsum(1) - ends.long()
    same_document = document[:, None, :, None] == document[:, None, None, :]
    return same_document.tril()


def has_flash(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Return whether PyTorch has a flash kernel for this device, dtype and head size, forward and backward.

    `meta` counts as a GPU that has one, so that a model can be checked without a GPU.
    """
    if device.type == "cpu" or dtype not in (torch.bfloat16, torch.float16) or head_size > _LARGEST_HEAD:
        return False
    return device.type != "cuda" or _cuda_has_flash(device, dtype, head_size)


def packs_sequences(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Return whether attention on this device takes packed sequences rather than a mask."""
    # Without a mask, PyTorch pads the heads for its kernel; packed sequences go to the kernel as they are.
    return head_size % 8 == 0 and varlen_attention() is not None and has_flash(device, dtype, head_size)


@functools.cache
def varlen_attention() -> Callable[..., Any] | None:
    """Return PyTorch's attention over packed sequences; None in a version without windows or grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters) else None


@functools.cache
def _cuda_has_flash(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    head = torch.empty(1, 1, 8, head_size, dtype=dtype, device=device, requires_grad=True)
    asked = torch.backends.cuda.SDPAParams(head, head, head, None, 0.0, True, False)
    return bool(torch.backends.cuda.can_use_flash_attention(asked))


def _starts(tokens: Tensor, ends: Tensor | None) -> Tensor:
    batch, length = tokens.shape
    if ends is None:
        return torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=tokens.device)
    ends[:, -1] = True
    # The number of documents is needed on the host, which waits for the device: once per batch, not per layer.
    return functional.pad(ends.flatten().nonzero()[:, 0] + 1, (1, 0)).to(torch.int32)
