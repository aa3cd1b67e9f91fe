"""Stages that train no model: preparing text, and evaluating the forest. Their failures are recorded for `status`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from btm_scale.run_dir import RunDir
from btm_scale.util.rank_log import forget_failure, noting_failure

PREPARE, EVALUATE = "prepare", "evaluate"


def prepare_stage(domain: str) -> str:
    """Return the name of the stage that prepares one domain alone."""
    return f"{PREPARE}-{domain}"


@contextlib.contextmanager
def as_stage(run: RunDir, *stages: str) -> Iterator[None]:
    """Record a failure of the block as that of each of these stages; success removes the record of an earlier one."""
    logs = [run.stage_log(stage) for stage in stages]
    with contextlib.ExitStack() as stack:
        for log in logs:
            stack.enter_context(noting_failure(log))
        yield
    for log in logs:
        forget_failure(log)
    with contextlib.suppress(OSError):  # absent, or that of another stage is in it
        logs[0].parent.rmdir()
