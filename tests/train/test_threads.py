"""The threads of a model are recorded when its training begins, and kept when it resumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from btm_scale.errors import CheckpointError
from btm_scale.run_dir import RunDir
from btm_scale.train.threads import Threads, keep_threads

Keep = Callable[[], None]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


@pytest.fixture
def keep(run: RunDir, tmp_path: Path) -> Iterator[Keep]:
    """`keep_threads` of the seed LM in a world of one rank."""
    group: Any = SimpleNamespace(is_first=True, size=1, device=torch.device("cpu"))
    before = torch.get_num_threads()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield lambda: keep_threads(group, run, "seed")
    dist.destroy_process_group()
    torch.set_num_threads(before)


def test_a_model_resumes_with_the_threads_with_which_it_began(
    run: RunDir, keep: Keep, caplog: pytest.LogCaptureFixture
) -> None:
    torch.set_num_threads(2)
    keep()
    assert Threads.load(run.threads("seed")).threads == 2
    (run.checkpoints("seed") / "step-1").mkdir(parents=True)
    torch.set_num_threads(1)
    keep()
    assert torch.get_num_threads() == 2
    assert "seed resumes with the 2 threads per rank with which it began, not with the 1" in caplog.text


def test_a_model_without_a_checkpoint_begins_with_the_threads_that_its_launcher_sets(run: RunDir, keep: Keep) -> None:
    for threads in (2, 1):
        torch.set_num_threads(threads)
        keep()
        assert Threads.load(run.threads("seed")).threads == torch.get_num_threads() == threads


def test_more_threads_than_cores_are_reported(
    keep: Keep, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3})
    torch.set_num_threads(1)
    keep()
    assert "share" not in caplog.text
    torch.set_num_threads(2)
    keep()
    assert "2 threads share 1 cores of" in caplog.text


def test_a_damaged_record_of_threads_is_refused(run: RunDir, keep: Keep) -> None:
    (run.checkpoints("seed") / "step-1").mkdir(parents=True)
    run.threads("seed").write_text('{"schema": 1, "threads": 0}')
    with pytest.raises(CheckpointError, match="'threads' must be greater than 0"):
        keep()
