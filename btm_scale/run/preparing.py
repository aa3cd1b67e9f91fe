"""The stage that prepares text, as a process that logs its progress and leaves when it is asked to."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from btm_scale.config.run import RunConfig
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.data.prepare import prepare
from btm_scale.data.progress import Progress, logged_progress
from btm_scale.launch.shutdown import REQUEUE
from btm_scale.run.stages import PREPARE, as_stage, prepare_stage
from btm_scale.run_dir import RunDir
from btm_scale.util.rank_log import forget_failure
from btm_scale.util.stop_signal import leave_if_requested

logger = logging.getLogger(__name__)


def prepare_run(
    config: RunConfig, run: RunDir, on_progress: Progress | None = None, only: Sequence[str] = ()
) -> dict[str, Fingerprint]:
    """Prepare a run's text as `prepare` does; a failure is recorded for `status`, and progress is logged by default.

    On SIGTERM or SIGUSR1, which SLURM sends before a job's time is over, what is encoded is kept, and SystemExit is
    raised with the code that requests a restart.
    """
    stages = [prepare_stage(name) for name in only] or [PREPARE]
    with as_stage(run, *stages), _leaving_when_asked(config, run):
        fingerprints = prepare(config, run, on_progress or logged_progress(), only)
        for name in fingerprints:  # a task that was to prepare this domain alone may have failed before
            forget_failure(run.stage_log(prepare_stage(name)))
        return fingerprints


@contextlib.contextmanager
def _leaving_when_asked(config: RunConfig, run: RunDir) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        for again in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(again, signal.SIG_IGN)
        done = sum(run.fingerprint(name).is_file() for name in config.all_domains)
        logger.warning(
            "asked to stop: %d of %d domains are prepared; the same command resumes",
            done,
            len(config.all_domains),
        )
        raise SystemExit(REQUEUE)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        leave_if_requested()
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
