"""Low-communication data parallelism (DiLoCo, arXiv 2311.08105): local steps and periodic outer Nesterov steps.

Between outer steps the data ranks of a group exchange no gradients. An outer step uses the mean of their weight changes
as its gradient and averages their moments. Afterwards all ranks are in sync, and one checkpoint serves the group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from deepspeed import comm
from torch import Tensor
from torch.distributed import ProcessGroup


class OuterStep:
    """The weights at the last outer step, and the outer momentum; float32, each rank's tensor-parallel shard."""

    def __init__(self, group: ProcessGroup, lr: float, momentum: float) -> None:
        self._group = group
        self._ranks = comm.get_world_size(group)
        self._lr = lr
        self._beta = momentum
        self._anchor: dict[torch.nn.Parameter, Tensor] = {}
        self._momentum: dict[torch.nn.Parameter, Tensor] = {}

    def begin(self, parameter: torch.nn.Parameter, weights: Tensor, momentum: Tensor | None = None) -> None:
        """Set the weights, and the outer momentum (default: zero)."""
        self._anchor[parameter] = weights.clone()
        self._momentum[parameter] = torch.zeros_like(weights) if momentum is None else momentum.clone()

    def momentum(self, parameter: torch.nn.Parameter) -> Tensor:
        """Return the outer momentum of a parameter."""
        return self._momentum[parameter]

    def __call__(
        self, parameter: torch.nn.Parameter, weights: Tensor, moments: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weights and moments with which all ranks continue. All ranks call this together."""
        anchor, momentum = self._anchor[parameter], self._momentum[parameter]
        moved = self._mean(anchor - weights.view_as(anchor))
        momentum.mul_(self._beta).add_(moved)
        anchor.sub_(moved + self._beta * momentum, alpha=self._lr)
        return anchor, {kind: self._mean(moment.clone()) for kind, moment in moments.items()}

    def _mean(self, value: Tensor) -> Tensor:
        comm.all_reduce(value, group=self._group)
        return value.div_(self._ranks)
