"""Cluster faults: kills, damaged files, stops, hangs and full disks. Training always ends in the same weights."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers.cuts import full
from helpers.held_training import HeldTraining
from helpers.in_process import answer
from helpers.processes import wait_for
from helpers.tiny_run import share_text, start_btm_scale, tiny_values, write_config
from helpers.warm import Warm

from btm_scale.checkpoint.hashing import content_hash
from btm_scale.launch.shutdown import REQUEUE
from btm_scale.run_dir import RunDir
from btm_scale.train.checkpoint import newest_state

pytestmark = pytest.mark.slow

STEPS, EVERY, RANKS = 48, 4, 2


def write_run(folder: Path, text: Path) -> RunDir:
    """A run whose seed LM takes many small steps, with gradient accumulation and frequent checkpoints."""
    values = tiny_values(
        text,
        novel_domains={},
        model={"family": "llama", "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48},
        budget={
            "tokens": STEPS * 512 + 512,
            "seed_share": STEPS / (STEPS + 1),
            "sequence_length": 32,
            "batch_tokens": 512,
        },
        layout={"data": RANKS, "zero": 1, "micro_batch": 4},
        checkpoint={"every": EVERY, "keep": 3},
        evaluate={"tokens_per_domain": 500, "dev_blocks": 5},
    )
    write_config(folder / "tiny.yaml", values)
    return RunDir(folder / "run")


@pytest.fixture(scope="module")
def uninterrupted(real_text: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = write_run(folder, real_text)
    answer("prepare", folder / "tiny.yaml", "--out", run.root)
    warm.check(*training(run))
    return run


@pytest.fixture
def run(uninterrupted: RunDir, real_text: Path, tmp_path: Path) -> Iterator[RunDir]:
    """A run of the same text and config that has not started training."""
    run = write_run(tmp_path, real_text)
    share_text(run, uninterrupted)
    yield run
    for process in processes_of(run):
        process.kill()


def training(run: RunDir) -> tuple[object, ...]:
    return "train", run.root.parent / "tiny.yaml", "--model", "seed", "--out", run.root


def processes_of(run: RunDir) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(run.root) in " ".join(process.info["cmdline"] or []) and process.pid != os.getpid()
    ]


def ranks_of(run: RunDir) -> dict[int, psutil.Process]:
    ranks = {}
    for process in processes_of(run):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "deepspeed.launcher" not in " ".join(process.cmdline()) and "RANK" in process.environ():
                ranks[int(process.environ()["RANK"])] = process
    return ranks


def last_change(run: RunDir) -> int:
    """Return when the metrics were last written, in nanoseconds."""
    return run.metrics("seed").stat().st_mtime_ns if run.metrics("seed").is_file() else 0


def steps_taken(run: RunDir) -> int:
    try:
        lines = run.metrics("seed").read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (FileNotFoundError, IndexError, ValueError):
        return 0


@contextlib.contextmanager
def started_until_step(run: RunDir, step: int, *settings: str) -> Iterator[subprocess.Popen[str]]:
    """Start the training and yield once it has taken the step. It takes at most four more before the block ends."""
    before = last_change(run)
    with HeldTraining(run.root.parent, {"seed": step + EVERY}) as held:
        process = start_btm_scale(*training(run), *settings, environment=held.environment)

        def is_there() -> bool:
            # Steps of an earlier start do not count.
            return last_change(run) != before and steps_taken(run) >= step and len(ranks_of(run)) == 2

        wait_for(is_there, 600, process)
        yield process


def wait_for_the_end(run: RunDir, process: subprocess.Popen[str]) -> int:
    """Return the command's exit code; no process of the group may outlive it."""
    code = process.wait(600)
    wait_for(lambda: not processes_of(run), 30)
    return code


def cut_short(state: Path) -> None:
    os.truncate(state / "model.safetensors", 1000)


def flip_a_byte(state: Path) -> None:
    with (state / "model.safetensors").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))


def delete_half(state: Path) -> None:
    (state / "model.safetensors").unlink()


@pytest.mark.parametrize("kills", [2, full(20)])
def test_repeated_kills_and_damaged_checkpoints_do_not_change_the_weights(
    kills: int, run: RunDir, uninterrupted: RunDir, warm: Warm
) -> None:
    chance = random.Random(1)
    damages = [[cut_short, flip_a_byte], [delete_half]]  # by kill: of the newest checkpoint, the one before, ...
    for number in range(kills):
        # Soon after the previous kill, so that enough steps are left for the next one.
        step = 14 + (STEPS - 26) * number // kills + chance.randrange(EVERY)
        with started_until_step(run, step) as process:
            time.sleep(chance.random() * 0.2)
            ranks_of(run)[chance.randrange(RANKS)].kill()
        wait_for(lambda: not ranks_of(run), 30)  # a group follows its dead rank
        assert wait_for_the_end(run, process) == 1
        states = sorted(run.checkpoints("seed").glob("step-*"), reverse=True)
        if number < len(damages):
            for damage, state in zip(damages[number], states, strict=False):
                damage(state)
            assert newest_state(run.checkpoints("seed")) == states[len(damages[number])]
    warm.check(*training(run))
    assert content_hash(run.model("seed")) == content_hash(uninterrupted.model("seed"))
    steps = [json.loads(line)["step"] for line in run.metrics("seed").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    assert "going back to the state before it" in run.log("seed").read_text()


def test_a_suspended_rank_is_a_hang_and_sigterm_requests_a_restart(
    run: RunDir, uninterrupted: RunDir, warm: Warm
) -> None:
    with started_until_step(run, 8, "--set", "health.hang=5", "--set", "health.patience=10") as process:
        ranks_of(run)[1].suspend()
    assert wait_for_the_end(run, process) == 1
    logs = [run.log("seed"), run.log("seed").with_name("log.1")]
    assert "the group hangs" in logs[0].read_text()
    for log in logs:
        text = log.read_text()
        assert "most recent call first" in text, "every rank dumps its stacks"
        assert "in step" in text or "in train" in text

    with started_until_step(run, 20) as process:
        ranks_of(run)[1].send_signal(signal.SIGTERM)
    assert wait_for_the_end(run, process) == 1
    text = run.log("seed").read_text()
    assert f"return code = {REQUEUE}" in text
    stopped = int((run.train("seed") / "stopped").read_text())
    assert f"asked to stop: saved the state after step {stopped}" in text
    assert max(run.checkpoints("seed").glob("step-*")).name == f"step-{stopped:08d}"

    warm.check(*training(run))
    assert not (run.train("seed") / "stopped").exists()
    assert content_hash(run.model("seed")) == content_hash(uninterrupted.model("seed"))


def test_a_full_disk_is_detected_before_writing_and_loses_no_checkpoint(
    run: RunDir, uninterrupted: RunDir, warm: Warm
) -> None:
    folder = run.checkpoints("seed")
    folder.mkdir(parents=True)
    size = sum(file.stat().st_size for file in max(uninterrupted.checkpoints("seed").glob("step-*")).iterdir())
    # Two checkpoints fit, and no third.
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={5 * size // 2}", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
        )
        if shutil.which("mount")
        else None
    )
    if mounted is None or mounted.returncode:
        pytest.skip("only root may mount the small file system that this test fills")
    try:
        assert warm.run(*training(run)).code != 0
        log = run.log("seed").read_text()
        assert "GB free. Nothing was written. Free some space" in log
        checkpoints = sorted(folder.glob("step-*"))
        assert [state.name for state in checkpoints] == [f"step-{EVERY:08d}", f"step-{2 * EVERY:08d}"]
        assert newest_state(folder) == checkpoints[-1]
        subprocess.run(["mount", "-o", f"remount,size={5 * size}", str(folder)], check=True)
        warm.check(*training(run))
        assert content_hash(run.model("seed")) == content_hash(uninterrupted.model("seed"))
    finally:
        subprocess.run(["umount", str(folder)], check=True)
