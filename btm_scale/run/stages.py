"""Stages that train no model: preparing text, and evaluating the forest. Their failures are recorded for `status`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

from btm_scale.run_dir import RunDir
from btm_scale.util.rank_log import forget_failure, noting_failure

StageName = Literal["prepare", "evaluate"]


@contextlib.contextmanager
def as_stage(run: RunDir, stage: StageName) -> Iterator[None]:
    """Record a failure of the block as that of a stage; success removes the record of an earlier one."""
    log = run.stage_log(stage)
    with noting_failure(log):
        yield
    forget_failure(log)
    with contextlib.suppress(OSError):  # absent, or that of another stage is in it
        log.parent.rmdir()
