"""Time of saving a training checkpoint by one rank and by two, on a file system in memory.

    python benchmarks/checkpoint.py [--rounds 12] [--zero 0 1] [--folder /dev/shm]

Takes under 3 minutes. The ranks of both groups wait while the other group saves, and the groups take turns, so that
other programs disturb both alike. Ratios are medians over rounds: of the time that passes and, less disturbed, of the
processor time of the busier rank. Storage is as fast as memory, so what is measured is hashing and writing; removing
the old checkpoint, which frees memory here, is not included. Without ZeRO every rank has the complete state and writes
half of it; with ZeRO it writes its partition. The same is done by groups whose ranks only hash and write as many bytes
(`plain`): their ratio is what two cores of this machine gain. Writes results/checkpoint.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

RESULT = Path(__file__).parent / "results" / "checkpoint.json"
_GROUPS = (1, 2)


def main() -> None:
    """Measure both groups in turn, for every ZeRO stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 1], choices=(0, 1, 2, 3))
    parser.add_argument("--preset", default="gpt2-125m")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)  # makes this process a rank of a group
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ranks:
        serve(options.preset, options.ranks, options.zero[0], options.folder, plain=options.plain)
        return
    from environment import describe

    environment = describe()
    result = {"environment": environment, "preset": options.preset}
    result["zero"] = {str(stage): measured(options, stage) for stage in options.zero}
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(options.out)


def measured(options: argparse.Namespace, zero: int) -> dict[str, Any]:
    """Return the times of both groups in every round, and the medians of their ratios."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, ExitStack() as stack:
        groups = {}
        for plain in (False, True):
            for ranks in _GROUPS:
                own = Path(folder, _name(ranks, plain=plain))
                own.mkdir()
                groups[own.name] = stack.enter_context(Group(options.preset, ranks, zero, own, plain=plain))
                groups[own.name].save()  # warm, and its port is taken before another group asks for one
        rounds = [{name: group.save() for name, group in groups.items()} for _ in range(options.rounds)]
    result: dict[str, Any] = {"rounds": rounds}
    for plain, prefix in ((False, ""), (True, "plain_")):
        one, two = (_name(ranks, plain=plain) for ranks in _GROUPS)
        for kind in ("seconds", "processor_seconds"):
            result[f"{prefix}median_{kind}"] = {
                name: statistics.median(row[name][kind] for row in rounds) for name in (one, two)
            }
            ratio = statistics.median(row[two][kind] / row[one][kind] for row in rounds)
            result[f"{prefix}ratio_of_{kind}"] = ratio
            print(f"ZeRO {zero}: {prefix}{kind} {ratio:.3f}", flush=True)
    return result


def _name(ranks: int, *, plain: bool) -> str:
    return f"plain {ranks}" if plain else str(ranks)


class Group:
    """The processes of a group, each of which saves when it reads a line."""

    def __init__(self, preset: str, ranks: int, zero: int, folder: Path, *, plain: bool) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, __file__, "--preset", preset, "--zero", str(zero), "--folder", str(folder)]
        command += ["--plain"] if plain else []
        self._ranks = []
        for rank in range(ranks):
            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            environment = os.environ | {name: str(value) for name, value in where.items()}
            self._ranks.append(
                subprocess.Popen(
                    [*command, "--ranks", str(ranks)],
                    env=environment | {"MASTER_ADDR": "127.0.0.1"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )

    def save(self) -> dict[str, float]:
        """Return the seconds of one save, and the processor time of the busier rank."""
        for rank in self._ranks:
            assert rank.stdin is not None
            print(file=rank.stdin, flush=True)
        rows = [self._answer(rank) for rank in self._ranks]
        return {name: max(row[name] for row in rows) for name in ("seconds", "processor_seconds")}

    @staticmethod
    def _answer(rank: subprocess.Popen[str]) -> dict[str, float]:
        assert rank.stdout is not None
        for line in rank.stdout:  # libraries print, too
            if line.startswith("{"):
                answer: dict[str, float] = json.loads(line)
                return answer
        raise SystemExit("a rank failed; its message is above")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for rank in self._ranks:
            rank.kill() if error else rank.communicate()
        for rank in self._ranks:
            rank.wait()


def serve(preset: str, ranks: int, zero: int, folder: Path, *, plain: bool) -> None:
    """Save a new model's state, or as many plain bytes, as one rank of a group, for every line on stdin."""
    import torch
    from training_peers import Case

    from btm_scale.config.layout import Layout
    from btm_scale.config.training import OptimizerConfig
    from btm_scale.distributed.group import ExpertGroup
    from btm_scale.train.build import new_model
    from btm_scale.train.checkpoint import remove_old_states, save_state
    from btm_scale.train.engine import Engine
    from btm_scale.train.jobs import TrainingJob

    torch.set_num_threads(1)
    case = Case(
        preset=preset, ranks=ranks, threads=1, precision="bf16", length=64, vocabulary=4096, sequences=2, micro_batch=1
    )
    layout = Layout(data=ranks, zero=zero, precision="bf16", micro_batch=1)
    group = ExpertGroup.join(layout)
    job = TrainingJob(
        model="benchmark",
        branch=None,
        weights={},
        part=None,
        steps=1,
        sequences=2,
        batch_share=1.0,
        first_sample=0,
        samples=2,
        progress=(0.0, 1.0),
        layout=layout,
    )
    engine = Engine(group, new_model(group, case.shape, job, OptimizerConfig(), {}), job, OptimizerConfig(), {})
    save: Callable[[int], object] = lambda step: save_state(engine, folder, step, keep=step)  # noqa: E731
    if plain:
        size = 12 * sum(parameter.numel() for parameter in engine.model.parameters())
        del engine
        save = plain_writer(folder, size, group.data_rank, ranks)
    for step, _ in enumerate(sys.stdin, 1):
        torch.distributed.barrier()
        begin, began = time.perf_counter(), time.process_time()
        save(step)
        row = {"seconds": time.perf_counter() - begin, "processor_seconds": time.process_time() - began}
        if group.is_first:
            if plain:
                (folder / str(step)).unlink()
            else:
                remove_old_states(folder, step, keep=1)
        print(f"\n{json.dumps(row)}", flush=True)
    group.leave()


def plain_writer(folder: Path, size: int, rank: int, ranks: int) -> Callable[[int], None]:
    """Return a function that hashes and writes this rank's range of a file of `size` bytes."""
    import torch

    begin, end = size * rank // ranks, size * (rank + 1) // ranks
    data = memoryview(torch.randint(0, 256, (end - begin,), dtype=torch.uint8).numpy())
    block_size = 1 << 20

    def write(step: int) -> None:
        digest = hashlib.sha256()
        descriptor = os.open(folder / str(step), os.O_CREAT | os.O_RDWR, 0o600)
        for at in range(0, len(data), block_size):
            block = data[at : at + block_size]
            digest.update(block)
            os.pwrite(descriptor, block, begin + at)
        os.fdatasync(descriptor)
        os.close(descriptor)
        torch.distributed.barrier()

    return write


if __name__ == "__main__":
    main()
