"""Inputs of recomputed layers in host memory, from a layer's forward pass to its backward pass.

PyTorch's `save_on_cpu` copies on the stream that computes, and Megatron-core 0.16 offloads inputs of modules inside of
layers, but not of layers that are recomputed. Here a side stream copies while layers run, and the host never waits.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Copies(Protocol):
    """Copies between device and host in the order in which they are given, beside what the device computes."""

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Begin a copy of what is computed by now; return what to wait for."""

    def wait(self, copied: Any) -> None:
        """Let what is computed from now on see the copy."""


class SideStream:
    """Copies on a separate CUDA stream."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        """See `Copies.copy`."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, copied: torch.cuda.Event) -> None:
        """See `Copies.wait`."""
        torch.cuda.current_stream().wait_event(copied)


class Immediate:
    """Copies at once, on a CPU."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See `Copies.copy`."""
        target.copy_(source)

    def wait(self, copied: None) -> None:
        """See `Copies.wait`."""


def copies_of(device: torch.device) -> Copies:
    """Return how a device copies."""
    return SideStream() if device.type == "cuda" else Immediate()


class HostInputs:
    """The inputs of a model's layers in host memory, in buffers that every micro-batch uses again.

    The device holds the inputs of the running layer and of the last layer, and in the backward pass that of the next.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._copies: Copies | None = None
        self._free: defaultdict[Any, list[Tensor]] = defaultdict(list)
        self._forward: list[_Held] = []  # of the layers whose backward pass has not begun, in the order of the model

    @contextlib.contextmanager
    def holding(self, hidden: Tensor, layer: int) -> Iterator[None]:
        """Hold the input of layer 1, 2, ..., the only tensor that autograd saves in this context."""
        if self._copies is None:
            self._copies = copies_of(hidden.device)
        if layer == 1:
            self._forget()
        # The backward pass begins with the last layer.
        held = _Held(self, hidden.detach(), self._copies, copied=layer < self._layers)
        self._forward.append(held)
        with saved_tensors_hooks(lambda _: held, self._returned):
            yield
        held.leave_device()

    def buffer(self, tensor: Tensor) -> Tensor:
        """Return a buffer in host memory for a tensor."""
        free = self._free[_form(tensor)]
        return free.pop() if free else torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")

    def take_back(self, buffer: Tensor) -> None:
        """Use a buffer again. Copies are made in order, so that one that still reads it comes first."""
        self._free[_form(buffer)].append(buffer)

    def _returned(self, held: _Held) -> Tensor:
        """Return a layer's input, and begin to return that of the layer before it."""
        if held in self._forward:
            del self._forward[self._forward.index(held) :]
        held.fetch()
        if self._forward:
            self._forward[-1].fetch()
        return held.take()

    def _forget(self) -> None:
        """Forget layers whose backward pass did not run; their tensors are then freed in the order of the stream."""
        for held in self._forward:
            held.settle()
        self._forward.clear()


class _Held:
    """A layer's input, on the device, on the host, or being copied."""

    def __init__(self, host: HostInputs, tensor: Tensor, copies: Copies, *, copied: bool) -> None:
        self._host = host
        self._device = tensor.device
        self._copies = copies
        self._tensor: Tensor | None = tensor
        self._buffer = host.buffer(tensor) if copied else None
        self._copied = None if self._buffer is None else (copies.copy(self._buffer, tensor),)

    def leave_device(self) -> None:
        """Release the tensor when it is copied. What is allocated in its place is written after that."""
        if self._buffer is not None:
            self.settle()
            self._tensor = None

    def fetch(self) -> None:
        """Begin to copy the tensor to the device, if it is not there."""
        if self._tensor is None:
            assert self._buffer is not None
            self._tensor = torch.empty_like(self._buffer, device=self._device)
            self._copied = (self._copies.copy(self._tensor, self._buffer),)

    def take(self) -> Tensor:
        """Return the tensor that was fetched."""
        self.settle()
        tensor = self._tensor
        assert tensor is not None
        if self._buffer is not None:
            self._tensor = None
        return tensor

    def settle(self) -> None:
        """Let what is computed from now on come after the copy."""
        if self._copied is not None:
            self._copies.wait(*self._copied)
            self._copied = None

    def __del__(self) -> None:
        if self._buffer is not None:
            self._host.take_back(self._buffer)


def _form(tensor: Tensor) -> Any:
    """Return what tensors that share buffers have in common: a copy has the strides of its source."""
    return tensor.dtype, tensor.size(), tensor.stride()
