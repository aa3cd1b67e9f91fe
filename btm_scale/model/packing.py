"""Which tokens a token may attend to, computed once per batch: those of its document, within the model's window.

They are the boundaries of sequences, never a mask [length, length].
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_LARGEST_HEAD = 256  # of the flash kernel
# Queries that attend through one mask, which also has the keys of a window before them.
_BLOCK = (32, 256)


@dataclass(frozen=True)
class Piece:
    """Queries of one row of a batch, and the keys that they attend to: causally, or `banded`, through `Packed.band`."""

    row: int
    queries: slice
    keys: slice
    banded: bool = False


@dataclass(frozen=True)
class Packed:
    """The sequences of a batch, one after another. A token attends to earlier tokens of its sequence.

    `starts` int32 [sequences + 1] has the first token of each sequence, and the end of the last. With a window of n, a
    token attends to itself and the n - 1 tokens before it.
    """

    starts: Tensor
    longest: int  # of the sequences, in tokens
    length: int  # of a row of the batch: no sequence spans two
    window: int | None = None

    @functools.cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The parts of the batch that kernels without packed sequences attend to, one after the other.

        A sequence is a piece. One that is longer than the window is several: the first tokens, up to the window, and
        blocks of the others.
        """
        pieces = []
        for begin, end in pairwise(self.starts.tolist()):
            row, first = divmod(begin, self.length)
            last = first + end - begin
            window = last - first if self.window is None else self.window
            stop = min(last, first + window)
            pieces.append(Piece(row, slice(first, stop), slice(first, stop)))
            for block in range(stop, last, self.block):
                stop = min(last, block + self.block)
                pieces.append(Piece(row, slice(block, stop), slice(block - window + 1, stop), banded=True))
        return tuple(pieces)

    @property
    def block(self) -> int:
        """Queries of a piece that has keys before them."""
        return min(max(self.window or 0, _BLOCK[0]), _BLOCK[1])

    @functools.cached_property
    def band(self) -> Tensor:
        """Whether a query of a piece attends to a key, bool [block, block + window - 1]; shorter pieces are a part."""
        window = self.window or 1
        near = torch.ones(self.block, self.block + window - 1, dtype=torch.bool, device=self.starts.device)
        return near.triu().tril(window - 1)


def visible(
    tokens: Tensor, *, end_of_text: int | None, window: int | None, starts: Tensor | None = None
) -> Packed | None:
    """Return what each token of a batch [batch, length] may attend to; None if that is every earlier token.

    Without `end_of_text`, documents attend to each other. `starts`, bool [batch, length], are the first tokens of
    documents, if others than those after `end_of_text`.
    """
    batch, length = tokens.shape
    if window is not None and window >= length:
        window = None
    if end_of_text is None:
        if window is None:
            return None
        rows = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=tokens.device)
        return Packed(rows, length, length, window)
    firsts = first_tokens(tokens, end_of_text) if starts is None else starts.clone()
    firsts[:, 0] = True
    # The boundaries are needed on the host, which waits for the device: once per batch, not per layer.
    begins = functional.pad(firsts.flatten().nonzero()[:, 0], (0, 1), value=batch * length)
    return Packed(begins.to(torch.int32), int(begins.diff().max()), length, window)


def first_tokens(tokens: Tensor, end_of_text: int) -> Tensor:
    """Return which tokens [batch, length] are the first of a document or of their sequence, bool [batch, length].

    Each document ends with `end_of_text`, which belongs to it.
    """
    return functional.pad(tokens[:, :-1] == end_of_text, (1, 0), value=True)


def positions_in_documents(firsts: Tensor) -> Tensor:
    """Return the position of each token in its document, int64 [batch, length], from the first tokens of documents."""
    positions = torch.arange(firsts.shape[1], device=firsts.device)
    return positions - torch.where(firsts, positions, 0).cummax(1).values


def has_flash(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Return whether PyTorch has a flash kernel for this device, dtype and head size, forward and backward.

    `meta` counts as a GPU that has one, so that a model can be checked without a GPU.
    """
    if device.type == "cpu" or dtype not in (torch.bfloat16, torch.float16) or head_size > _LARGEST_HEAD:
        return False
    return device.type != "cuda" or _cuda_has_flash(device, dtype, head_size)


@functools.cache
def varlen_attention() -> Callable[..., Any] | None:
    """Return PyTorch's attention over packed sequences; None in a version without windows or grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    wanted = {"window_size", "enable_gqa", "scale"}
    return varlen_attn if wanted <= set(inspect.signature(varlen_attn).parameters) else None


@functools.cache
def _cuda_has_flash(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    head = torch.empty(1, 1, 8, head_size, dtype=dtype, device=device, requires_grad=True)
    asked = torch.backends.cuda.SDPAParams(head, head, head, None, 0.0, True, False)
    return bool(torch.backends.cuda.can_use_flash_attention(asked))
