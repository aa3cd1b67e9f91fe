"""The stage that prepares text, as a process that logs its progress and leaves when it is asked to."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from btm_scale.config.run import RunConfig
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.data.prepare import prepare
from btm_scale.data.progress import Progress, logged_progress
from btm_scale.launch.shutdown import REQUEUE
from btm_scale.run.stages import as_stage
from btm_scale.run_dir import RunDir

logger = logging.getLogger(__name__)


def prepare_run(config: RunConfig, run: RunDir, on_progress: Progress | None = None) -> dict[str, Fingerprint]:
    """Prepare a run's text as `prepare` does; a failure is recorded for `status`, and progress is logged by default.

    On SIGTERM or SIGUSR1, which SLURM sends before a job's time is over, what is encoded is kept, and SystemExit is
    raised with the code that requests a restart.
    """
    with as_stage(run, "prepare"), _leaving_when_asked(config, run):
        return prepare(config, run, on_progress or logged_progress())


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
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
