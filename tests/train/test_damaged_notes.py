"""Notes that no training needs: damaged or unreadable ones are logged, and a restart continues without them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from btm_scale.run_dir import RunDir
from btm_scale.train.bad_batches import SkippedBatches, _skipped_before
from btm_scale.train.metrics import read_metrics
from btm_scale.train.progress import read_progress


@pytest.mark.parametrize("content", ["", "\0" * 40, '{"batches": {"three": 3}}', "[1]", '{"schema": 9, "batches": {}}'])
def test_a_damaged_record_of_skipped_batches_stops_no_restart(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "skipped.json"
    SkippedBatches(batches={3: "the loss is nan"}).save(path)
    assert _skipped_before(path) == {3: "the loss is nan"}
    path.write_text(content)
    assert _skipped_before(path) == {}
    assert str(path) in caplog.text
    assert "a bad one is undone again" in caplog.text


def test_metrics_that_cannot_be_read_stop_neither_a_restart_nor_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDir(tmp_path)
    run.metrics("seed").parent.mkdir(parents=True)
    run.metrics("seed").write_bytes(b'{"step": 1, "loss": 5.0}\n' + b"\0" * 40 + b"\n" + b'{"step": 2, "loss": 4.0}\n')
    assert [row["step"] for row in read_metrics(run.metrics("seed"))] == [1, 2]
    assert read_progress(run, "seed", 4, state="stopped").step == 2

    def fails(*_: object) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "read_bytes", fails)
    monkeypatch.setattr(Path, "open", fails)
    assert read_metrics(run.metrics("seed")) == []
    assert f"{run.metrics('seed')} cannot be read (Stale file handle)" in caplog.text
    assert read_progress(run, "seed", 4, state="stopped").step == 0
