"""Run folders of version 0.1.0: one complete, one killed while it trained its second expert.

They are in `tests/run/old_runs.tar.xz`. Its members:

    text/                the text of two domains and a novel one
    finished/            a complete `btm-scale run`
    killed/              the same run, killed with SIGKILL while it trained its second expert
    resumed/metrics/     metrics.jsonl of the killed run's models after version 0.1.0 resumed it

To create it again, with version 0.1.0 installed in a virtual environment OLD:

    python tests/helpers/old_runs.py OLD/bin/btm-scale tests/run/old_runs.tar.xz
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from btm_scale.config.yaml import dump_text

ARCHIVE = Path(__file__).parents[1] / "run" / "old_runs.tar.xz"
DOMAINS, NOVEL = ("arithmetic", "poems"), "lists"
# The text folder in the archived configs; `unpack` replaces it.
_OLD_ROOT = "/nowhere/text"

# Keys of version 0.1.0, including every key that has been renamed since.
VALUES: dict[str, Any] = {
    "name": "old",
    "random_seed": 5,
    "model": {"family": "llama", "layers": 2, "hidden": 16, "heads": 2, "groups": 1, "ffn": 24, "tied": True},
    "tokenizer": {"vocab_size": 320},
    "domains": {name: {"text": f"{name}.jsonl"} for name in DOMAINS},
    "novel_domains": {NOVEL: {"text": f"{NOVEL}.jsonl"}},
    "data": {"dev": 0.15, "test": 0.15, "workers": 1},
    "budget": {"tokens": 52 * 256, "seed_share": 8 / 52, "sequence_length": 32, "batch_tokens": 256},
    "optimizer": {"lr": 1e-2},
    "group": {"precision": "fp32", "micro_batch": 2},
    "seed_group": {"zero": 0, "micro_batch": 4},
    "experts": {"poems": {"group": {"recompute": "full"}}},
    "checkpoint": {"every": 8, "keep": 1},
    "evaluate": {"tokens_per_domain": 600, "dev_blocks": 8, "averages": ["uniform", "posterior"]},
    "launch": {"local": {"slots": 1}},
}


def unpack(folder: Path) -> Path:
    """Unpack the archive, point its runs to their text, and return `folder`."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    for name in ("finished", "killed"):
        config = folder / name / "run.yaml"
        config.write_text(config.read_text().replace(_OLD_ROOT, str(folder / "text")))
    return folder


def losses(metrics: Path) -> dict[int, float]:
    """Return the loss of every step in a metrics.jsonl."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def main(old: str, archive: str) -> None:
    """Create the archive with the command `btm-scale` of version 0.1.0."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write_text(folder / "text")
        (folder / "old.yaml").write_text(dump_text(VALUES | {"text_root": str(folder / "text")}))
        command = [old, "run", str(folder / "old.yaml"), "--out"]
        subprocess.run([*command, str(folder / "finished")], check=True)
        _kill_in_second_expert([*command, str(folder / "killed")], folder / "killed")
        shutil.copytree(folder / "killed", folder / "again")
        subprocess.run([*command, str(folder / "again")], check=True)
        for metrics in sorted((folder / "again" / "train").glob("*/metrics.jsonl")):
            copy = folder / "resumed" / "metrics" / f"{metrics.parent.name}.jsonl"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(metrics, copy)
        for name in ("finished", "killed"):
            config = folder / name / "run.yaml"
            config.write_text(config.read_text().replace(str(folder / "text"), _OLD_ROOT))
        with tarfile.open(archive, "w:xz", preset=9) as output:
            for name in ("text", "finished", "killed", "resumed"):
                output.add(folder / name, arcname=name, filter=_portable)


def _kill_in_second_expert(command: list[str], run: Path) -> None:
    """Start a run in a process group and kill the group between two checkpoints of its second expert."""
    process = subprocess.Popen(command, start_new_session=True)
    metrics = run / "train" / DOMAINS[1] / "metrics.jsonl"
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 13:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    for child in _descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)


def _descendants(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def _portable(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    # Logs contain the host name, and the index cache absolute paths.
    if "/.index" in member.name or "/log" in member.name or member.name.endswith((".partial", ".lock")):
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = int(member.mtime)
    return member


def _write_text(folder: Path) -> None:
    """Write 60 distinct short documents per domain, with a fixed modification time."""
    folder.mkdir()
    draw = random.Random(11)
    words = ("river", "stone", "light", "winter", "song", "evening", "bird", "field", "snow", "road", "wind", "star")

    def arithmetic() -> str:
        sums = [(draw.randrange(100), draw.randrange(100)) for _ in range(12)]
        return "\n".join(f"{one} + {other} = {one + other}" for one, other in sums)

    def poem() -> str:
        lines = [" ".join(draw.choices(words, k=draw.randrange(4, 7))) for _ in range(6)]
        return ",\n".join(lines) + "."

    def shopping() -> str:
        return "\n".join(f"- {draw.randrange(1, 20)} x {draw.choice(words)}" for _ in range(12))

    for name, make in zip((*DOMAINS, NOVEL), (arithmetic, poem, shopping), strict=True):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": make()}) + "\n" for _ in range(60)))
        os.utime(path, (1_760_000_000, 1_760_000_000))


if __name__ == "__main__":
    main(*sys.argv[1:])
