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
from btm_scale.data.prepare import prepare
from btm_scale.errors import ConfigError, DataError, GroupFailed
from btm_scale.launch.shutdown import REQUEUE
from btm_scale.run.preparing import prepare_run
from btm_scale.run.slurm_notes import SlurmNotes
from btm_scale.run.stage_status import stage_status
from btm_scale.run_dir import RunDir
from btm_scale.util.files import partial_path
from btm_scale.util.locks import held
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


def test_domains_prepared_one_by_one_are_those_prepared_together(config: RunConfig, tmp_path: Path) -> None:
    together, apart = RunDir(tmp_path / "together"), RunDir(tmp_path / "apart")
    whole = prepare_run(config, together)
    assert list(prepare_run(config, apart, only=["licences"])) == ["licences"]
    assert not apart.domain("python").exists()
    leftover, other = partial_path(apart.domain("python")), partial_path(apart.domain("more"))
    for folder in (leftover, other):
        folder.mkdir()
    # Another process, which prepares another domain, is not disturbed.
    with held(apart.domain_lock("licences")):
        assert list(prepare_run(config, apart, only=["python"])) == ["python"]
    assert (leftover.exists(), other.exists()) == (False, True)
    for name, fingerprint in whole.items():
        assert prepare_run(config, apart)[name].text == fingerprint.text
        for path in together.domain(name).glob("*.bin"):
            assert path.read_bytes() == (apart.domain(name) / path.name).read_bytes()
    with pytest.raises(ConfigError, match="Unknown domain 'law'"):
        prepare_run(config, apart, only=["law"])


def test_a_domain_that_another_process_prepares_is_left_to_it(config: RunConfig, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    prepare_run(config, run, only=["python"])
    under_way = partial_path(run.domain("licences"))
    under_way.mkdir()
    with held(run.domain_lock("licences")):
        assert stage_status(config, run, SlurmNotes())[0].state == "running"
        for only in (["licences"], []):
            with pytest.raises(GroupFailed, match="Another process is preparing the domain 'licences'"):
                prepare_run(config, run, only=only)
        assert under_way.is_dir()


def test_a_domain_that_another_process_prepares_meanwhile_is_kept(config: RunConfig, tmp_path: Path) -> None:
    run, times = RunDir(tmp_path / "run"), list[int]()

    def meanwhile(domain: str, encoded_bytes: int, documents: int, expected: int) -> None:
        if domain == "python" and not times:
            prepare(config, run, only=["licences"])
            times.append(run.fingerprint("licences").stat().st_mtime_ns)

    prepare(config, run, meanwhile)
    assert times == [run.fingerprint("licences").stat().st_mtime_ns]


def test_the_failure_of_one_domain_is_that_of_the_stage_until_it_is_prepared(config: RunConfig, tmp_path: Path) -> None:
    run, text = RunDir(tmp_path / "run"), tmp_path / "licences.jsonl"
    good = text.read_bytes()
    text.write_bytes(good + b'{"text": "half')
    with pytest.raises(DataError, match=r"licences\.jsonl"):
        prepare_run(config, run, only=["licences"])
    [stage, _] = stage_status(config, run, SlurmNotes())
    assert (stage.state, stage.note.startswith("licences: ")) == ("failed", True)
    text.write_bytes(good)
    prepare_run(config, run)
    assert not (run.root / "stages").exists()


def test_a_domain_that_is_prepared_again_after_the_stage_has_failed_is_running(
    config: RunConfig, tmp_path: Path
) -> None:
    run, text = RunDir(tmp_path / "run"), tmp_path / "licences.jsonl"
    text.write_bytes(text.read_bytes() + b'{"text": "half')
    with pytest.raises(DataError, match=r"licences\.jsonl"):
        prepare_run(config, run)
    with held(run.domain_lock("licences")):
        [stage, _] = stage_status(config, run, SlurmNotes())
        assert (stage.state, stage.note) == ("running", "licences")
    [stage, _] = stage_status(config, run, SlurmNotes())
    assert (stage.state, "licences.jsonl" in stage.note) == ("failed", True)
