"""Interrupted merges, and how the next attempt resumes them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from helpers.cuts import full
from helpers.small_models import Save, random_weights

from btm_scale.checkpoint.formats.safetensors_writer import ShardedWriter
from btm_scale.checkpoint.hashing import content_hash
from btm_scale.checkpoint.merge import journal, runner, workers
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.checkpoint.merge.shares import Shares
from btm_scale.errors import CheckpointError, WorkerLost
from btm_scale.util.files import partial_path
from btm_scale.util.pools import lost_workers_told


def test_a_model_folder_may_contain_a_dangling_link_and_the_output(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (models[0] / ".#config.json").symlink_to("nowhere")
    out = models[0] / "out"
    with monkeypatch.context() as patch:
        patch.setattr("btm_scale.checkpoint.merge.output._publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge(out, [(models[0], 1), (models[1], 1)])
    noted = journal.finished(partial_path(out))
    monkeypatch.setattr(runner.UnitRunner, "__call__", interrupted)
    assert noted
    merge(out, [(models[0], 1), (models[1], 1)])


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_merge_resumes_with_the_remaining_units(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [(model, 1.0) for model in models]
    expected = merge(tmp_path / "uninterrupted", pairs).content_hash
    monkeypatch.setattr(workers, "_NOTE_EVERY", 1)
    monkeypatch.setattr(workers, "MOST", 1)
    run, ran = runner.UnitRunner.__call__, []

    def stops_after_two(self: runner.UnitRunner, unit: object) -> object:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(unit)
        return run(self, unit)  # type: ignore[arg-type]

    monkeypatch.setattr(runner.UnitRunner, "__call__", stops_after_two)
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "out", pairs)
    assert not (tmp_path / "out").exists()
    noted = journal.finished(partial_path(tmp_path / "out"))
    ran.clear()
    rest: list[object] = []

    def counts(self: runner.UnitRunner, unit: object) -> object:
        rest.append(unit)
        return run(self, unit)  # type: ignore[arg-type]

    monkeypatch.setattr(runner.UnitRunner, "__call__", counts)
    assert merge(tmp_path / "out", pairs).content_hash == expected
    assert noted.keys()
    assert not noted.keys() & set(rest)
    assert len(noted) + len(rest) == 5


def test_a_killed_worker_leaves_the_recorded_units(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [(model, 1.0) for model in models]

    def loses_a_worker(outputs: Sequence[workers.Output], jobs: int | None, *, chunk_bytes: int) -> None:
        given = Shares(outputs[0][0]).of(workers.remaining(outputs), 2)
        workers.merge_share(outputs, 0, 2, chunk_bytes=chunk_bytes, given=given)
        with lost_workers_told():
            raise BrokenProcessPool

    with monkeypatch.context() as patch:
        patch.setattr("btm_scale.checkpoint.merge.merge.merge_in_processes", loses_a_worker)
        with pytest.raises(WorkerLost, match="Completed work is kept"):
            merge(tmp_path / "out", pairs)
    assert journal.finished(partial_path(tmp_path / "out"))
    assert not (tmp_path / ".out.partial.lock").exists()
    assert merge(tmp_path / "out", pairs).content_hash == content_hash(tmp_path / "out")


def test_a_kill_while_shards_are_renamed_does_not_block_the_next_attempt(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = ShardedWriter.close

    def killed_after(self: ShardedWriter) -> None:
        close(self)
        raise KeyboardInterrupt  # not an Exception: no handler cleans up

    with monkeypatch.context() as patch:
        patch.setattr(ShardedWriter, "close", killed_after)
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path / "out", [(models[0], 1), (models[1], 1)])
    merge(tmp_path / "out", [(models[0], 1), (models[1], 1)])
    assert (tmp_path / "out/model.safetensors").is_file()


def test_the_leftovers_of_a_different_merge_are_removed(models: list[Path], tmp_path: Path) -> None:
    partial = partial_path(tmp_path / "out")
    partial.mkdir()
    journal.begin(partial, "of a different merge")
    (partial / "stray").touch()
    merge(tmp_path / "out", [(models[0], 1), (models[1], 1)])
    assert not (tmp_path / "out/stray").exists()


def test_two_merges_into_one_output_do_not_mix(models: list[Path], tmp_path: Path) -> None:
    with (
        journal.only_merge_into(partial_path(tmp_path / "out")),
        pytest.raises(CheckpointError, match="Another process"),
    ):
        merge(tmp_path / "out", [(models[0], 1)])


KILLED = """
import sys, time
from pathlib import Path
from btm_scale.checkpoint.merge import workers
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.checkpoint.merge.numpy_runner import NumpyRunner
workers._NOTE_EVERY = 1
run = NumpyRunner.__call__
def slowly(self, unit):
    time.sleep(0.03)
    return run(self, unit)
NumpyRunner.__call__ = slowly
print("ready", flush=True)
merge(Path(sys.argv[1]), [(Path(path), 1.0) for path in sys.argv[2:]], chunk_bytes=256)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kills", [4, full(20)])
def test_a_merge_killed_at_random_points_resumes_to_the_same_hash(kills: int, save: Save, tmp_path: Path) -> None:
    models = [
        save(
            f"m{i}",
            {
                f"{layer:02d}.{name}": tensor
                for layer in range(3 * kills)
                for name, tensor in random_weights(100 * i + layer).items()
            },
            shard=9000,
        )
        for i in range(3)
    ]
    expected = merge(tmp_path / "uninterrupted", [(model, 1.0) for model in models], max_shard_bytes=5e9).content_hash
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out"), *map(str, models)]
    progress = []
    delays = torch.rand(kills, generator=torch.Generator().manual_seed(7)).mul(0.1).tolist()
    for kill, delay in enumerate(delays):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            # Half of the kills come after a new unit was recorded, however slow the machine is.
            while kill % 2 and len(journal.finished(partial_path(tmp_path / "out"))) <= progress[-1]:
                assert process.poll() is None
                time.sleep(0.001)
            time.sleep(delay)
            os.kill(process.pid, signal.SIGKILL)
        assert not (tmp_path / "out").exists()
        progress.append(len(journal.finished(partial_path(tmp_path / "out"))))
    assert progress == sorted(progress)
    assert progress[-1] > 0
    assert merge(tmp_path / "out", [(model, 1.0) for model in models]).content_hash == expected
