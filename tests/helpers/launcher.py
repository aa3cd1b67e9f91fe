"""Run a script in ranks started by the real `deepspeed` launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from btm_scale.launch.local import free_port

TESTS = Path(__file__).parents[1]


def launched(script: Path, ranks: int, spec: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `script SPEC.json` in `ranks` CPU ranks, like local groups; fail with the end of the log."""
    file = folder / f"{script.stem}-{ranks}.json"
    file.write_text(json.dumps(spec))
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile",
        os.devnull,
        "--num_gpus",
        str(ranks),
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(port),
        "--no_local_rank",
        str(script),
        str(file),
    ]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS / "train"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done
