"""Stopping on request: a cluster that is about to take its nodes back says so by SIGUSR1."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from btm_scale.group import ExpertGroup

_MARKER = "stopped"


class StopRequest:
    """Hears SIGUSR1, whichever rank it reaches. `stopped` in the model's folder says that training ended early."""

    def __init__(self, group: ExpertGroup, folder: Path) -> None:
        self._group = group
        self._marker = folder / _MARKER
        self._heard = False
        signal.signal(signal.SIGUSR1, self._hear)
        if group.is_first:
            self._marker.unlink(missing_ok=True)

    def agreed(self) -> bool:
        """Whether any rank has heard it. All ranks call this together, so that all stop after the same step."""
        if self._group.size == 1:
            return self._heard
        heard = torch.tensor(float(self._heard), device=self._group.device)
        dist.all_reduce(heard, dist.ReduceOp.MAX)
        return bool(heard)

    def leave(self, step: int) -> None:
        """End this process in good order; the state after `step` steps has been saved."""
        if self._group.is_first:
            self._marker.write_text(f"{step}\n")
            print(f"asked to stop: saved the state after step {step}", flush=True)
        raise SystemExit(0)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = True
