"""Worlds of ranks on this machine. A script imports the engines once and forks every rank."""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from btm_scale.launch.local import free_port
from helpers.warm import warm_process


def run_script(script: Path, spec: Any, folder: Path) -> None:
    """Run `script SPEC.json` on CPU, as a process that has imported the engines; fail with the end of its output."""
    file = folder / f"{script.stem}.json"
    file.write_text(json.dumps(spec))
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = warm_process().run_script(script, file, environment={"PYTHONPATH": path})
    assert done.code == 0, (done.stdout + done.stderr)[-5000:]


def joined_anew(group: Any, layout: Any) -> Any:
    """In a script: leave `group`, unless None, and return the same ranks as a group of a different layout."""
    from megatron.core import parallel_state

    from btm_scale.distributed.group import ExpertGroup

    if group is not None:
        parallel_state.destroy_model_parallel()
    return ExpertGroup.join(layout)


def read_spec() -> Any:
    """In a script: return the spec that `run_script` was given."""
    return json.loads(Path(sys.argv[1]).read_text())


def fork_world(count: int, job: Callable[..., None], *arguments: Any) -> None:
    """In a script: run `job` in a world of `count` ranks; exit with 1 if one of them fails."""
    for module in ("deepspeed.runtime.zero.muon.muon_optimizer", "megatron.core.models.gpt"):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # the ranks collect garbage often; exempt the imported modules

    port = str(free_port())
    os.environ.update(
        {"WORLD_SIZE": str(count), "LOCAL_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    )
    forked = multiprocessing.get_context("fork")
    ranks = [forked.Process(target=_as_rank, args=(rank, job, *arguments)) for rank in range(count)]
    for rank in ranks:
        rank.start()
    waiting = {rank.sentinel: rank for rank in ranks}
    while waiting:
        for sentinel in wait(list(waiting)):
            ended = waiting.pop(sentinel)  # type: ignore[call-overload]
            ended.join()  # the exit code is set after the sentinel
            if ended.exitcode:
                for rank in ranks:
                    rank.kill()
                sys.exit(1)


def _as_rank(rank: int, job: Callable[..., None], *arguments: Any) -> None:
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    job(*arguments)
