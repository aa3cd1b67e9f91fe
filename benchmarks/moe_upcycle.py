"""Upcycling of eight models with a random router: time beside a copy of the bytes that it writes, and memory."""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from environment import describe
from merge import FFN, HIDDEN, MODELS, VOCABULARY, _remove, llama_specs, make_model, measured

from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.formats.safetensors_writer import ShardedWriter
from btm_scale.checkpoint.formats.tensors import TensorSpec
from btm_scale.checkpoint.hashing import content_hash
from btm_scale.config.run import RunConfig
from btm_scale.forest.expert import CARD, Expert, Parent
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
    jobs = int(sys.argv[2]) if len(sys.argv) > 2 else None
    make_mixture(RunConfig.load(run.config), run, Recipe(router="random"), run.model(MOE), jobs=jobs)
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
NAMES = [f"domain-{i}" for i in range(MODELS)]
_PIECE = 1 << 24  # elements
_TRAINS = {"averaged": "all", "shared": "mlp"}  # what the experts of a recipe trained


def measure_upcycling(
    work: Path, *, billions: float = 0.5359, vocabulary: int = VOCABULARY, rounds: int = 3
) -> dict[str, Any]:
    """Return the figures of experts that trained everything, whose rest is averaged, and their MLPs alone.

    Times include that until the output is on the disk. Both write as many bytes, so each round takes both and one copy,
    and the ratios are those of medians. The first round, in which the kernel finds memory for the files, is left out.
    """
    specs = llama_specs(billions * 1e9, vocabulary)
    work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"environment": describe()}
    with tempfile.TemporaryDirectory(dir=work, prefix="upcycle-") as folder:
        run = _run(Path(folder), specs)
        timed: dict[str, list[dict[str, float]]] = {"copy": [], **{recipe: [] for recipe in _TRAINS}}
        copy = [sys.executable, "-c", _COPY, str(run.model(MOE)), str(Path(folder) / "copy")]
        for _ in range(1 + rounds):
            for recipe in _TRAINS:
                timed[recipe].append(_upcycled(run, recipe))
            timed["copy"].append(_timed(copy, Path(folder) / "copy"))
        _remove(Path(folder) / "copy")
        seconds = {name: statistics.median(one["synced_seconds"] for one in runs[1:]) for name, runs in timed.items()}
        for recipe in _TRAINS:
            result[recipe] = {
                "seconds": seconds[recipe],
                "ratio": seconds[recipe] / seconds["copy"],
                "anonymous_bytes": max(one["anonymous_bytes"] for one in timed[recipe]),
                **_same_bytes(run, recipe),
                "runs": timed[recipe],
            }
    sizes = {"models": MODELS, "bytes_per_model": sum(spec.nbytes for spec in specs.values())}
    copies = {"copy_seconds": seconds["copy"], "copies": timed["copy"]}
    return result | copies | sizes | {"shape": {"hidden": HIDDEN, "ffn": FFN}}


def _upcycled(run: RunDir, recipe: str, *jobs: str) -> dict[str, float]:
    """Make the mixture of experts that trained what the recipe says, anew, and return its time and memory."""
    for name in NAMES:
        _write_card(run, name, _TRAINS[recipe])
    return _timed([sys.executable, "-c", _UPCYCLE, str(run.root), *jobs], run.model(MOE))


def _timed(command: list[str], output: Path) -> dict[str, float]:
    if output.exists():
        _remove(output)
    os.sync()
    figures: dict[str, float] = measured(command, output)
    return figures


def _same_bytes(run: RunDir, recipe: str) -> dict[str, Any]:
    """Return how much the recipe writes, and whether one process writes the same."""
    output = run.model(MOE)
    _upcycled(run, recipe)
    written = content_hash(output)
    _upcycled(run, recipe, "1")
    return {
        "bytes_written": sum(file.stat().st_size for file in output.iterdir()),
        "same_bytes_with_one_process": content_hash(output) == written,
    }


def _run(folder: Path, specs: Mapping[str, TensorSpec]) -> RunDir:
    """Write a run of a seed LM and experts, which have the seed LM's bits in all but their MLPs."""
    run = RunDir(folder / "run")
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
    RunConfig.model_validate({"domains": {name: {"text": f"{name}.jsonl"} for name in NAMES}}).save(run.config)
    return run


def _write_card(run: RunDir, name: str, trains: str = "all") -> None:
    is_seed = name == SEED
    Expert(
        name=name,
        domains={} if is_seed else {name: 1.0},
        parents=() if is_seed else (Parent(SEED, 1.0),),
        tokens=1,
        steps=1,
        layout={},
        data_fingerprint={},
        content_hash=f"{name} {trains}",
        trains=trains,  # type: ignore[arg-type]
    ).save(run.model(name) / CARD)
