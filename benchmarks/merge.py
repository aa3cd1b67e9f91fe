"""Merge speed, memory and accuracy, beside mergekit and a plain copy.

    python benchmarks/merge.py [--work DIR] [--billions 0.5359] [--rounds 3] [--memory 0.5 2 8] [--out FILE]

Speed: eight Llama-like bf16 models of independent random weights, merged with unequal weights by fresh
processes: a plain copy of the same bytes, ours and mergekit's in turn. mergekit leaves its output in the page
cache and ours calls fsync, so both are timed both ways: `seconds` until the process exits, without fsync for
`ours, unsynced`; `synced_seconds` until the output is on disk. Imports count.
`from_disk` runs start with no input in the page cache.
`cpu_seconds` depends little on other load. Memory: the sampled peak of the anonymous memory of a run's processes;
then for pairs of sparse models of growing size, the last of one tensor of 4 GB. Accuracy: the fraction of elements
that are the bf16 number nearest to the float64 mean.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from environment import describe, of_installed

from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.formats.safetensors_writer import ShardedWriter
from btm_scale.checkpoint.formats.tensors import TensorSpec

MODELS = 8
WEIGHTS = [round(0.5 + 0.15 * i, 2) for i in range(MODELS)]
MERGEKIT = "mergekit==0.1.5"
HIDDEN, FFN, VOCABULARY = 2048, 5504, 32000
_OURS = """
import os, sys, json
from pathlib import Path
from btm_scale.checkpoint.merge.merge import merge
if __name__ == "__main__":
    wait, output, weights, *inputs = sys.argv[1:]
    if wait == "unsynced":
        os.fsync = os.fdatasync = lambda descriptor: None
    merge(Path(output), list(zip(map(Path, inputs), json.loads(weights))))
"""
_COPY = """
import os, sys
size, output, *inputs = sys.argv[1:]
buffer = memoryview(bytearray(1 << 20))
for file in inputs:
    descriptor = os.open(file, os.O_RDONLY)
    while os.readv(descriptor, [buffer]): pass
descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
for start in range(0, int(size), len(buffer)):
    os.write(descriptor, buffer[: int(size) - start])
"""


def llama_specs(parameters: float, vocabulary: int = VOCABULARY) -> dict[str, TensorSpec]:
    """The tensors of a Llama-like model with about that many parameters, all of them in bf16."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (vocabulary, HIDDEN),
    }
    per_layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN
    for i in range(max(1, round((parameters - 2 * vocabulary * HIDDEN) / per_layer))):
        for name in "qkvo":
            shapes[f"model.layers.{i}.self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"model.layers.{i}.mlp.gate_proj.weight"] = (FFN, HIDDEN)
        shapes[f"model.layers.{i}.mlp.up_proj.weight"] = (FFN, HIDDEN)
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = (HIDDEN, FFN)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (HIDDEN,)
    return {name: TensorSpec(torch.bfloat16, shape) for name, shape in shapes.items()}


def make_model(folder: Path, specs: Mapping[str, TensorSpec], seed: int | None) -> None:
    """Random weights of standard deviation 0.02, or, without a seed, a sparse file of zeros."""
    draw = torch.Generator().manual_seed(seed or 0)
    with ShardedWriter(folder, specs) as writer:
        for name, spec in specs.items():
            if seed is None:
                writer.mark_written(name)
                continue
            for start in range(0, spec.elements, 1 << 24):
                count = min(1 << 24, spec.elements - start)
                writer.write_range(name, start, torch.randn(count, generator=draw).mul_(0.02).bfloat16())
    layers = sum(name.endswith("q_proj.weight") for name in specs)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "vocab_size": specs["model.embed_tokens.weight"].shape[0],
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))


def measured(command: list[str], output: Path) -> dict[str, float]:
    """Run a command: seconds until it ends and until its output is on the disk, CPU seconds, and the peak of its
    processes' anonymous memory in bytes."""
    peak = 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=of_installed())
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        if process.returncode:
            log.seek(0)
            raise SystemExit(log.read().decode()[-3000:])
        for file in output.rglob("*") if output.is_dir() else [output]:
            with file.open("rb") as written:
                os.fsync(written.fileno())
        synced = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"seconds": seconds, "synced_seconds": synced, "cpu_seconds": cpu, "anonymous_bytes": peak}


def _anonymous(pid: int) -> int:
    """Anonymous memory of a process and its descendants."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                total = int(line.split()[1]) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(map(_anonymous, map(int, (task / "children").read_text().split())))
    except (FileNotFoundError, ProcessLookupError):
        pass
    return total


def mergekit_in(folder: Path) -> Path:
    """mergekit's command, in a separate virtual environment."""
    command = folder / "bin" / "mergekit-yaml"
    if not command.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", MERGEKIT], check=True)
    return command


def correctly_rounded(output: Path, models: list[Path]) -> float:
    """The fraction of the output's elements that are the bf16 number nearest to the float64 mean."""
    merged, readers = SafetensorsModel(output), [SafetensorsModel(model) for model in models]
    right = total = 0
    for name in merged.names:
        elements = merged.spec(name).elements
        for start in range(0, elements, 1 << 22):
            stop = min(start + (1 << 22), elements)
            mean = torch.zeros(stop - start, dtype=torch.float64)
            for weight, reader in zip(WEIGHTS, readers, strict=True):
                mean.add_(reader.read_range(name, start, stop), alpha=weight)
            mean /= sum(WEIGHTS)
            got = merged.read_range(name, start, stop).double()
            # Half the distance to the neighbour: bf16 keeps 8 bits, and no value here is subnormal. The billionth
            # lets either neighbour of an exact tie pass, which float64 cannot tell from its own error.
            half = torch.ldexp(torch.ones_like(mean), torch.frexp(mean).exponent - 9)
            right += int(((got - mean).abs() <= half * (1 + 1e-9)).sum())
            total += stop - start
    return right / total


def compare(work: Path, specs: Mapping[str, TensorSpec], mergekit: Path, rounds: int) -> dict[str, Any]:
    """Ours, mergekit's and the plain copy's figures on models of these tensors."""
    models = [work / f"model-{i}" for i in range(MODELS)]
    for i, model in enumerate(models):
        make_model(model, specs, seed=i + 1)
    size = sum(spec.nbytes for spec in specs.values())
    recipe = work / "recipe.yaml"
    parts = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(models, WEIGHTS, strict=True)]
    recipe.write_text(json.dumps({"merge_method": "linear", "dtype": "bfloat16", "models": parts}))
    files = [str(file) for model in models for file in sorted(model.glob("*.safetensors"))]
    ours, theirs, copy = work / "ours", work / "theirs", work / "copy"
    merge = [sys.executable, "-c", _OURS]
    models_and_weights = [str(ours), json.dumps(WEIGHTS), *map(str, models)]
    commands: dict[str, tuple[list[str], Path]] = {
        "copy": ([sys.executable, "-c", _COPY, str(size), str(copy), *files], copy),
        "ours": ([*merge, "synced", *models_and_weights], ours),
        "ours, unsynced": ([*merge, "unsynced", *models_and_weights], ours),
        "mergekit": ([str(mergekit), str(recipe), str(theirs), "--no-copy-tokenizer"], theirs),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    from_disk: dict[str, list[dict[str, float]]] = {name: [] for name in commands if "unsynced" not in name}
    for _ in range(rounds):
        for cached, found in ((True, runs), (False, from_disk)):
            for name in found:
                command, output = commands[name]
                _remove(output)
                os.sync()
                if not cached:
                    _forget(files)
                found[name].append(measured(command, output))

    def middle(name: str, figure: str, of: Mapping[str, list[dict[str, float]]] = runs) -> float:
        return statistics.median(run[figure] for run in of[name])

    def from_disk_beside(name: str) -> float:
        return middle(name, "synced_seconds", from_disk) / middle("ours", "synced_seconds", from_disk)

    result = {
        "models": MODELS,
        "bytes_per_model": size,
        "runs": runs,
        "from_disk": from_disk,
        "times_as_fast_as_mergekit": {
            "page_cache": middle("mergekit", "seconds") / middle("ours, unsynced", "seconds"),
            "fsynced": middle("mergekit", "synced_seconds") / middle("ours", "synced_seconds"),
            "disk_to_disk": from_disk_beside("mergekit"),
            "cpu_time": middle("mergekit", "cpu_seconds") / middle("ours", "cpu_seconds"),
        },
        "times_as_fast_as_a_copy": {
            "page_cache": middle("copy", "seconds") / middle("ours, unsynced", "seconds"),
            "fsynced": middle("copy", "synced_seconds") / middle("ours", "synced_seconds"),
            "disk_to_disk": from_disk_beside("copy"),
        },
        "anonymous_bytes": {name: max(run["anonymous_bytes"] for run in of) for name, of in runs.items()},
        "correctly_rounded": {
            "ours": correctly_rounded(ours, models),
            "mergekit": correctly_rounded(theirs, models),
        },
    }
    for path in (*models, ours, theirs, copy):
        _remove(path)
    return result


def memory_of(work: Path, specs: Mapping[str, TensorSpec]) -> dict[str, float]:
    """Our anonymous memory for two sparse models of these tensors."""
    models = [work / f"sparse-{i}" for i in range(2)]
    for model in models:
        make_model(model, specs, seed=None)
    output = work / "ours"
    command = [sys.executable, "-c", _OURS, "synced", str(output), json.dumps([1, 2]), *map(str, models)]
    figures = measured(command, output)
    for path in (*models, output):
        _remove(path)
    largest = max(spec.nbytes for spec in specs.values())
    return {"bytes": sum(spec.nbytes for spec in specs.values()), "largest_tensor_bytes": largest, **figures}


def _forget(files: list[str]) -> None:
    """Drop files from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, help="where models go; default: a temporary folder")
    parser.add_argument("--billions", type=float, default=0.5359, help="parameters of each model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=float, nargs="*", default=[0.5, 2, 8], help="gigabytes, sparse")
    parser.add_argument("--venv", type=Path, help="where mergekit is, or goes; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "merge.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work, prefix="btm-merge-") as folder:
        work = Path(folder)
        surroundings = describe() | {"mergekit": MERGEKIT}
        mergekit = mergekit_in(options.venv or work / "venv")
        sizes = [llama_specs(gigabytes * 1e9 / 2) for gigabytes in options.memory]
        sizes.append({"model.embed_tokens.weight": TensorSpec(torch.bfloat16, (1_000_000, HIDDEN))})
        speed = compare(work, llama_specs(options.billions * 1e9), mergekit, options.rounds)
        result = {
            "environment": surroundings,
            "speed": speed,
            "memory": [memory_of(work, specs) for specs in sizes],
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
