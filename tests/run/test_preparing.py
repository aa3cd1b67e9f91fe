"""Preparing text as a job: a requested stop keeps what is complete, and a failure is recorded for `status`."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import pytest
from helpers.text_samples import prose_texts, write_jsonl
from helpers.tiny_run import tiny_values, write_config

from btm_scale.config.run import RunConfig
from btm_scale.errors import DataError
from btm_scale.launch.shutdown import REQUEUE
from btm_scale.run.preparing import prepare_run
from btm_scale.run_dir import RunDir
from btm_scale.util.rank_log import read_failure


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    for number, name in enumerate(("python", "licences")):
        write_jsonl(tmp_path / f"{name}.jsonl", prose_texts(200)[number * 100 : number * 100 + 100])
    return write_config(
        tmp_path / "run.yaml", tiny_values(tmp_path, novel_domains={}, data={"dev": 0.2, "test": 0.2, "workers": 1})
    )


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_what_is_prepared_survives_a_requested_stop(
    number: signal.Signals,
    config: RunConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The stop comes while the second domain is encoded."""
    run = RunDir(tmp_path / "run")

    def stop(domain: str, encoded_bytes: int, documents: int, expected: int) -> None:
        if domain == "licences":
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as left:
        prepare_run(config, run, stop)
    assert left.value.code == REQUEUE
    assert "asked to stop: 1 of 2 domains are prepared; the same command resumes" in caplog.text
    assert signal.getsignal(number) == before
    assert read_failure(run.stage_log("prepare")) is None
    kept = run.fingerprint("python").stat().st_mtime_ns
    assert list(prepare_run(config, run)) == ["python", "licences"]
    assert run.fingerprint("python").stat().st_mtime_ns == kept


def test_a_failure_is_recorded_until_text_is_prepared(config: RunConfig, tmp_path: Path) -> None:
    run, text = RunDir(tmp_path / "run"), tmp_path / "licences.jsonl"
    good = text.read_bytes()
    text.write_bytes(good + b'{"text": "half')
    with pytest.raises(DataError, match=r"licences\.jsonl"):
        prepare_run(config, run)
    failure = read_failure(run.stage_log("prepare"))
    assert failure is not None
    assert failure.mistake
    assert "licences.jsonl" in failure.error
    text.write_bytes(good)
    prepare_run(config, run)
    assert not (run.root / "stages").exists()
