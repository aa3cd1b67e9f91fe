"""The routers of a mixture of experts in training: weights of their losses, and how they route each step's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from btm_scale.config.moe import MoeTrainConfig
from btm_scale.distributed.group import ExpertGroup
from btm_scale.errors import CheckpointError
from btm_scale.model.moe import Routing, routers_of, take_routing


class Routers:
    """The routers of one model; none unless it is a mixture. All ranks of the group call every method together."""

    def __init__(
        self, group: ExpertGroup, model: torch.nn.Module, settings: MoeTrainConfig | None, domains: Sequence[str]
    ) -> None:
        self._group, self._model, self._domains = group, model, domains
        for router in routers_of(model) if settings is not None else []:
            assert settings is not None
            router.z_loss, router.balance = settings.z_loss, settings.balance

    def begin_step(self) -> None:
        """Discard the counts since the last step, such as those of dev text."""
        for router in routers_of(self._model):
            router.counts = None

    def end_step(self, domains: Sequence[str]) -> Routing | None:
        """Return how the step's tokens were routed. The next step's load-balancing loss uses these loads.

        `domains` are those of this data rank's sequences, if they are known.
        """
        world = dist.group.WORLD if self._group.size > 1 else None
        routing = take_routing(self._model, world, self._group.device, domains, self._domains)
        if routing is not None:
            self.load = routing.load
        return routing

    @property
    def load(self) -> Sequence[Sequence[float]]:
        """Each expert's fraction of the last step's uses, [layers, experts]; empty before the first step."""
        loads = [router.load for router in routers_of(self._model)]
        return [load.tolist() for load in loads if load is not None]

    @load.setter
    def load(self, load: Sequence[Sequence[float]]) -> None:
        """Set the loads. Raises CheckpointError if they are not those of a model of this shape."""
        routers = routers_of(self._model)
        expected, given = [router.experts for router in routers], [len(row) for row in load]
        if given not in ([], expected):
            raise CheckpointError(
                f"The checkpoint's router_load has {given} experts by layer, and the model has {expected}. Both must "
                "be the same. Use another checkpoint of the run."
            )
        rows = [torch.tensor(row, dtype=torch.float32, device=self._group.device) for row in load]
        for i, router in enumerate(routers):
            router.load = rows[i] if rows else None
