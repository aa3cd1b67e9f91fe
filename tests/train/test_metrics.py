"""metrics.jsonl across restarts."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from btm_scale.model.shape import ModelShape
from btm_scale.train.metrics import DEV_LOSS, Metrics, read_metrics

SHAPE = ModelShape(layers=1, hidden=8, heads=2, kv_heads=2, ffn=16, positions=8, vocabulary=16)


def metrics(path: Path, first_step: int) -> Metrics:
    group: Any = SimpleNamespace(is_first=True, size=1, device=SimpleNamespace(type="cpu"))
    job: Any = SimpleNamespace(sequences=1, steps=9, trains="all", layout=SimpleNamespace(precision="fp32"))
    return Metrics(group, path, job, SHAPE, 8, first_step)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Limit file sizes, as on a disk that fills up during a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_restart_drops_repeated_steps_and_an_incomplete_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"step"')
    with metrics(path, 3):
        assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"{]\n", b"[3]\n", b'{"loss": 1.0}\n', b"[" * 100_000 + b"\n"])
def test_a_damaged_line_is_skipped_by_report_and_resume(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'{"step": 2}\n')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    with metrics(path, 2):
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_failed_restart_loses_no_recorded_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)))
    with files_of_at_most(20), pytest.raises(OSError, match="File too large"), metrics(path, 3):
        pass
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]


def test_a_dev_loss_is_on_the_disk_before_a_checkpoint_can_follow_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It decides which checkpoint is exported, so it must survive a power cut that the checkpoint survives."""
    result: Any = SimpleNamespace(loss=2.0, gradient_norm=1.0, overflowed=False, routing=None)
    path, sync = tmp_path / "metrics.jsonl", os.fsync
    synced: list[bytes] = []

    def recorded(descriptor: int) -> None:
        sync(descriptor)
        synced.append(path.read_bytes() if path.exists() else b"")

    monkeypatch.setattr(os, "fsync", recorded)
    with metrics(path, 0) as log:
        synced.clear()
        log.record(1, result, 1e-3)
        assert synced == []
        log.record(2, result, 1e-3, {DEV_LOSS: 1.5})
        assert len(synced) == 1
        assert synced[0].endswith(b"\n")
        assert b'"dev_loss": 1.5' in synced[0]
