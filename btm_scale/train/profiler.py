"""PyTorch's profiler over a few steps: one trace per rank."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

from btm_scale.config.training import ProfileConfig
from btm_scale.distributed.group import ExpertGroup
from btm_scale.util.files import make_directory, write_file


class Profile:
    """Records `steps` steps after the first `after`; does nothing if `steps` is 0.

    Leaves `rank-<n>.json`, which chrome://tracing and Perfetto open, and `rank-<n>.txt`, the most expensive operations.
    """

    def __init__(self, group: ExpertGroup, config: ProfileConfig, folder: Path) -> None:
        self._config = config
        self._path = folder / f"rank-{group.rank}.json"
        self._sort = "self_cpu_time_total" if group.device.type == "cpu" else "self_cuda_time_total"
        self._taken = 0
        self._profiler: profile | None = None

    def __enter__(self) -> Self:
        self._start_or_stop()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._save()

    def step(self) -> None:
        """Count a completed step; starts or stops the profiler."""
        self._taken += 1
        self._start_or_stop()

    def _start_or_stop(self) -> None:
        if self._taken == self._config.after and self._config.steps > 0:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities)
            self._profiler.__enter__()
        elif self._taken == self._config.after + self._config.steps:
            self._save()

    def _save(self) -> None:
        if self._profiler is None:
            return
        self._profiler.__exit__(None, None, None)
        make_directory(self._path.parent)
        self._profiler.export_chrome_trace(str(self._path))
        table = self._profiler.key_averages().table(sort_by=self._sort, row_limit=40)
        write_file(self._path.with_suffix(".txt"), table + "\n")
        self._profiler = None
