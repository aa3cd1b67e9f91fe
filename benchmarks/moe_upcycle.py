"""Upcycling of eight models without reading text: its memory, and its time beside copies of the bytes that it writes.

One copy is by a single process. Another is hashed while it is written, by one process per core, as upcycling does. The
third is written directly to the disk, by one thread per core, so that it does not wait for memory. It needs a file
system with direct I/O.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from environment import describe
from merge import FFN, HIDDEN, MODELS, VOCABULARY, _remove, llama_specs, make_model, measured

from btm_scale.checkpoint.formats.kept_hashes import NAME as HASHES
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.formats.safetensors_writer import ShardedWriter
from btm_scale.checkpoint.formats.tensors import TensorSpec
from btm_scale.checkpoint.hashing import content_hash, hash_and_keep
from btm_scale.config.yaml import dump_yaml
from btm_scale.forest.expert import CARD, Expert, Parent, read_expert
from btm_scale.run_dir import MOE, SEED, RunDir

_UPCYCLE = """
import sys
from pathlib import Path
from btm_scale.config.run import RunConfig
from btm_scale.run.mixture_recipe import Recipe
from btm_scale.run.upcycle import make_mixture
from btm_scale.run_dir import MOE, RunDir
if __name__ == "__main__":
    run = RunDir(Path(sys.argv[1]))
    jobs = int(sys.argv[3]) if len(sys.argv) > 3 else None
    make_mixture(RunConfig.load(run.config), run, Recipe(router=sys.argv[2]), run.model(MOE), jobs=jobs)
"""
_COPY = """
import os, sys
source, output = sys.argv[1:]
buffer = memoryview(bytearray(1 << 20))
out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
with os.scandir(source) as entries:
    files = sorted(entry.path for entry in entries if entry.is_file())
for file in files:
    into = os.open(file, os.O_RDONLY)
    while count := os.readv(into, [buffer]): os.write(out, buffer[:count])
"""
_HASHED_COPY = """
import hashlib, os, sys
source, output = sys.argv[1:]
with os.scandir(source) as entries:
    files = sorted(entry.path for entry in entries if entry.is_file())
open(output, "wb").close()
cores = len(os.sched_getaffinity(0))
def copy(rank):
    buffer, out, place = memoryview(bytearray(256 << 10)), os.open(output, os.O_WRONLY), 0
    for file in files:
        into, size = os.open(file, os.O_RDONLY), os.path.getsize(file)
        digest, start, stop = hashlib.sha256(), size * rank // cores, size * (rank + 1) // cores
        while start < stop:
            count = os.preadv(into, [buffer[:stop - start]], start)
            digest.update(buffer[:count])
            os.pwrite(out, buffer[:count], place + start)
            start += count
        place += size
ranks = []
for rank in range(cores):
    ranks.append(os.fork())
    if not ranks[-1]:
        copy(rank)
        os._exit(0)
for rank in ranks: assert os.waitpid(rank, 0)[1] == 0
"""
_DIRECT_COPY = """
import mmap, os, sys, threading
from concurrent.futures import ThreadPoolExecutor
source, output = sys.argv[1:]
piece, memory = 4 << 20, threading.local()
def copy(into, out, start):
    buffer = memory.__dict__.setdefault("buffer", memoryview(mmap.mmap(-1, piece)))
    count = os.preadv(into, [buffer], start)
    complete = count // 4096 * 4096
    assert os.pwrite(out[0], buffer[:complete], start) == complete
    assert os.pwrite(out[1], buffer[complete:count], start + complete) == count - complete
os.mkdir(output)
with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, os.scandir(source) as entries:
    copies = []
    for entry in entries:
        if not entry.is_file(): continue
        into, path = os.open(entry.path, os.O_RDONLY), os.path.join(output, entry.name)
        out = [os.open(path, os.O_WRONLY | os.O_CREAT | flag) for flag in (os.O_DIRECT, 0)]
        copies += [pool.submit(copy, into, out, start) for start in range(0, entry.stat().st_size, piece)]
    for one in copies: one.result()
"""
NAMES = [f"domain-{i}" for i in range(MODELS)]
_PIECE = 1 << 24  # elements
_SCRATCH = 1 << 20  # bytes
_ASIDE = f"{HASHES}.aside"
_WORDS = ("branch", "train", "merge", "expert", "domain", "seed", "router", "layer", "token", "text", "model", "forest")


@dataclass(frozen=True)
class _Case:
    """What the experts trained, the router, and whether the hashes of blocks were kept, as training does."""

    trains: Literal["all", "mlp"]
    router: Literal["random", "fitted"] = "random"
    has_hashes: bool = True


_CASES = {
    "averaged": _Case("all"),
    "shared": _Case("mlp"),
    "averaged_fitted": _Case("all", "fitted"),
    "shared_fitted": _Case("mlp", "fitted"),
    "averaged_anew": _Case("all", has_hashes=False),
    "shared_anew": _Case("mlp", has_hashes=False),
}


def measure_upcycling(
    work: Path, *, billions: float = 0.5359, vocabulary: int = VOCABULARY, rounds: int = 5
) -> dict[str, Any]:
    """Return the figures of experts that trained everything, whose rest is averaged, and their MLPs alone.

    Times include that until the output is on the disk. All write as many bytes, so each round takes all and the
    copies, whose medians are compared. A virtual machine takes several times as long to write into memory
    that it did not have yet, so before each the inputs are read, and a file of the same size is written and removed.
    The first round, in which that size is not known and the fitted router's sums are computed, is left out.
    """
    specs = llama_specs(billions * 1e9, vocabulary)
    work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"environment": describe()}
    with tempfile.TemporaryDirectory(dir=work, prefix="upcycle-") as folder:
        run = _run(Path(folder), specs)
        copies = {"copy": _COPY, "hashed_copy": _HASHED_COPY, "direct_copy": _DIRECT_COPY}
        timed: dict[str, list[dict[str, float]]] = {name: [] for name in (*copies, *_CASES)}
        for _ in range(1 + rounds):
            for case in _CASES:
                timed[case].append(_upcycled(run, case))
            for name, script in copies.items():
                output = Path(folder) / "copy"
                command = [sys.executable, "-c", script, str(run.model(MOE)), str(output)]
                timed[name].append(_timed(command, [run.model(MOE)], output, _size(run.model(MOE))))
                written = _size(output) if output.is_dir() else output.stat().st_size
                assert written == _size(run.model(MOE))
                _remove(output)  # from memory too, where the models are
        seconds = {name: statistics.median(one["synced_seconds"] for one in runs[1:]) for name, runs in timed.items()}
        for case in _CASES:
            result[case] = {
                "seconds": seconds[case],
                "anonymous_bytes": max(one["anonymous_bytes"] for one in timed[case][1:]),
                **_same_bytes(run, case),
                "runs": timed[case],
            }
    sizes = {"models": MODELS, "bytes_per_model": sum(spec.nbytes for spec in specs.values())}
    beside = {f"{name}_seconds": seconds[name] for name in copies}
    beside |= {"copies": timed["copy"], "hashed_copies": timed["hashed_copy"], "direct_copies": timed["direct_copy"]}
    return result | beside | sizes | {"shape": {"hidden": HIDDEN, "ffn": FFN}}


def _upcycled(run: RunDir, case: str, *jobs: str) -> dict[str, float]:
    """Make the mixture of the experts of a case anew, and return its time and memory."""
    for name in (SEED, *NAMES):
        there, gone = (HASHES, _ASIDE) if _CASES[case].has_hashes else (_ASIDE, HASHES)
        if not (run.model(name) / there).exists():
            (run.model(name) / gone).rename(run.model(name) / there)
    for name in NAMES:
        _write_card(run, name, _CASES[case].trains)
    output, router = run.model(MOE), _CASES[case].router
    inputs = [run.model(name) for name in (SEED, *NAMES)] + ([run.router(MOE).parent] if router == "fitted" else [])
    return _timed([sys.executable, "-c", _UPCYCLE, str(run.root), router, *jobs], inputs, output, _size(output))


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir()) if directory.is_dir() else 0


def _timed(command: list[str], inputs: Sequence[Path], output: Path, size: int) -> dict[str, float]:
    """Return the figures of a command that reads inputs from memory, and writes `size` bytes into memory it has."""
    if output.exists():
        _remove(output)
    os.sync()
    scratch = output.with_name("scratch")
    with scratch.open("wb") as file:
        for start in range(0, size, _SCRATCH):
            file.write(bytes(min(_SCRATCH, size - start)))
    buffer = memoryview(bytearray(_SCRATCH))
    for path in (path for directory in inputs for path in sorted(directory.glob("*.safetensors"))):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    os.sync()
    scratch.unlink()  # last: a host takes back memory that is free for a few seconds
    figures: dict[str, float] = measured(command, output)
    return figures


def _same_bytes(run: RunDir, case: str) -> dict[str, Any]:
    """Return how much a case writes, and whether one process writes the same, all of which its hash is of."""
    output = run.model(MOE)
    written = []
    for jobs in ([], ["1"]):
        _upcycled(run, case, *jobs)
        written += [content_hash(output), read_expert(output).content_hash]
    return {"bytes_written": _size(output), "same_bytes_with_one_process": len(set(written)) == 1}


def _run(folder: Path, specs: Mapping[str, TensorSpec]) -> RunDir:
    """Write a run of a seed LM and experts, which have the seed LM's bits in all but their MLPs."""
    run = _prepared(folder)
    make_model(run.model(SEED), specs, seed=0)
    _write_card(run, SEED)
    with SafetensorsModel(run.model(SEED)) as seed:
        for number, name in enumerate(NAMES, 1):
            draw = torch.Generator().manual_seed(number)
            with ShardedWriter(run.model(name), specs) as writer:
                for tensor, spec in specs.items():
                    for start in range(0, spec.elements, _PIECE):
                        stop = min(start + _PIECE, spec.elements)
                        if ".mlp." in tensor:
                            piece = torch.randn(stop - start, generator=draw).mul_(0.02).bfloat16()
                        else:
                            piece = seed.read_range(tensor, start, stop)
                        writer.write_range(tensor, start, piece)
            shutil.copy(run.model(SEED) / "config.json", run.model(name))
    for name in (SEED, *NAMES):
        hash_and_keep(run.model(name))
    return run


def _prepared(folder: Path) -> RunDir:
    """Prepare a little text of each domain, which the fitted router's sums are computed of, but not timed."""
    for name in NAMES:
        draw = random.Random(name)
        lines = [json.dumps({"text": " ".join(draw.choices(_WORDS, k=50))}) + "\n" for _ in range(200)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    values = {
        "domains": {name: {"text": str(folder / f"{name}.jsonl")} for name in NAMES},
        "tokenizer": {"vocab_size": 320},
        "data": {"dev": 0.1, "test": 0.1, "workers": 1},
        "budget": {"tokens": 1 << 16, "sequence_length": 64, "batch_tokens": 1024},
        "evaluate": {"tokens_per_domain": 256, "dev_blocks": 4},
    }
    dump_yaml(values, folder / "run.yaml")
    run = RunDir(folder / "run")
    command = [sys.executable, "-m", "btm_scale.cli", "prepare", folder / "run.yaml", "--out", run.root]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return run


def _write_card(run: RunDir, name: str, trains: Literal["all", "mlp"] = "all") -> None:
    is_seed = name == SEED
    Expert(
        name=name,
        domains={} if is_seed else {name: 1.0},
        parents=() if is_seed else (Parent(SEED, 1.0),),
        tokens=1,
        steps=1,
        layout={},
        data_fingerprint={},
        content_hash=name,
        trains=trains,
    ).save(run.model(name) / CARD)
