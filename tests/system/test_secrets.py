"""Marked secrets everywhere in the environment: a run neither writes, prints nor passes them on command lines."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from helpers.tiny_run import TINY_MODEL, tiny_values, write_config

MARK = "canary7c1f"


def environment(home: Path) -> dict[str, str]:
    """A user whose environment and home hold secrets."""
    home.mkdir()
    (home / ".deepspeed_env").write_text(f"HF_TOKEN=hf_{MARK}inafile\n")
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {MARK}netrc\n")
    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".cache" / "huggingface" / "token").write_text(f"hf_{MARK}cached")
    for path in home.rglob("*"):
        path.chmod(0o600 if path.is_file() else 0o700)
    names = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "GITHUB_TOKEN", "MY_PASSWORD")
    secrets = {name: f"{MARK}{name}" for name in names}
    return {**os.environ, **secrets, "HOME": str(home)}


class Watch(threading.Thread):
    """Collects the command lines of a process and all below it."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.seen: set[str] = set()

    def run(self) -> None:
        while psutil.pid_exists(self.pid):
            try:
                own = psutil.Process(self.pid)
                for process in [own, *own.children(recursive=True)]:
                    self.seen.add(" ".join(process.cmdline()))
            except psutil.Error:
                pass
            time.sleep(0.1)


@pytest.mark.slow
def test_no_secret_of_the_environment_reaches_a_run(real_text: Path, tmp_path: Path) -> None:
    values = tiny_values(real_text, model=TINY_MODEL, baselines={"dense": False}, novel_domains={})
    values["domains"] = {"python": {"text": "python.jsonl"}}
    values["evaluate"] = {"tokens_per_domain": 1000, "dev_blocks": 5, "averages": ["uniform"]}
    write_config(tmp_path / "tiny.yaml", values)
    command = [sys.executable, "-m", "btm_scale.cli"]
    out, variables = tmp_path / "run", environment(tmp_path / "home")
    steps = [["run", str(tmp_path / "tiny.yaml"), "--verbose", "--json"], ["status"], ["merge"], ["doctor", "--json"]]
    steps[1].append(str(out))
    steps[0] += ["--out", str(out)]
    steps[2] += [str(tmp_path / "merged"), str(out / "experts" / "python"), str(out / "seed")]
    for arguments in steps:
        process = subprocess.Popen(
            [*command, *arguments], env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        watch = Watch(process.pid)
        watch.start()
        shown, _ = process.communicate(timeout=900)
        assert process.returncode in (0, 1 if arguments[0] == "doctor" else 0), shown[-3000:]
        assert MARK not in shown
        assert watch.seen
        assert not [line for line in watch.seen if MARK in line]
    written = [path for folder in (out, tmp_path / "merged") for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 30
    assert not [path for path in written if MARK.encode() in path.read_bytes()]
