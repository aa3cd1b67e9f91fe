"""What a training step does on a GPU, counted with `meta` tensors in the place of CUDA's: kernels and bytes.

    python benchmarks/gpu_counts.py
    python benchmarks/gpu_counts.py --older FOLDER

Writes results/gpu_counts.json: the loss of a micro-batch, one layer besides its matrix products and attention, sums of
gradients, the utilization that they give by the formula of gpu_counting/formula.py, what products in float8 save and
cost, what offloading the inputs of layers moves and frees, a step of decoding, and a prompt that stacked experts read.
Beside them are a layer that uses
the fused functions of Megatron-core only, the plain model under torch.compile, the fused losses of Liger-Kernel and of
PyTorch, and transformers' models one by one. With --older, it counts the loss of an older checkout of this repository
instead, into results/gpu_counts_older.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environment import describe
from gpu_counting.cases import CASES, float8_layer_counts, layer_counts, loss_counts, megatron_layer_counts
from gpu_counting.counter import Counts
from gpu_counting.decoding import DECODINGS, READINGS, Decoding, reading_counts, separate_counts, stacked_counts
from gpu_counting.formula import Bytes, described, float8_seconds, utilization
from gpu_counting.loss_peers import liger_count, pytorch_counts
from gpu_counting.offload import offload_counts
from gpu_counting.regions import Count

RESULTS = Path(__file__).parent / "results"
MODELS = ("paper-125m", "llama-1.3b")  # whose layers are counted


def main() -> None:
    """Count, and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--result", type=Path, help="the file to write. Default: in benchmarks/results")
    parser.add_argument("--older", type=Path, metavar="FOLDER", help="an older checkout, to count only its loss")
    options = parser.parse_args()
    if options.older:
        write(options.result or RESULTS / "gpu_counts_older.json", counted_older(options.older))
        return
    become_a_rank()
    layers = {name: megatron_layer_counts(CASES[name]) for name in MODELS}
    result = {
        "environment": describe(),
        "ours": counted_training(),
        "megatron": {"layer": {name: row(counts.total(products=False)) for name, counts in layers.items()}},
        "compiled": counted_peer(),
    }
    result["ours"]["float8"] = counted_float8()
    result["ours"]["offload"] = offload_counts()
    result["ours"]["decoding"] = counted_decoding(stacked_counts)
    result["ours"]["reading"] = counted_reading()
    result["transformers"] = {"decoding": counted_decoding(separate_counts)}
    result["pytorch"] = {"loss": {name: row(pytorch_counts(case).total()) for name, case in CASES.items()}}
    result["liger"] = {"loss": {name: row(liger_count(case)) for name, case in CASES.items()}}
    write(options.result or RESULTS / "gpu_counts.json", result)


def write(file: Path, result: dict[str, Any]) -> None:
    """Write the results."""
    file.write_text(json.dumps(result, indent=1) + "\n")


def counted_older(folder: Path) -> dict[str, Any]:
    """Return the counts of the loss of an older checkout, whose file needs nothing else of its package."""
    file = folder / "btm_scale" / "model" / "loss.py"
    spec = importlib.util.spec_from_file_location("older_loss", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise SystemExit(f"{file} does not exist. --older takes the folder of a checkout of this repository.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    commit = subprocess.run(
        ["git", "-C", str(folder), "log", "-1", "--format=%h %as"], capture_output=True, text=True, check=True
    ).stdout.split()
    counts = {name: row(loss_counts(case, module.head_loss).total()) for name, case in CASES.items()}
    return {"environment": describe(), "commit": commit[0], "date": commit[1], "loss": counts}


def become_a_rank() -> None:
    """Make this process the only rank of a group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()} | {"CUDA_VISIBLE_DEVICES": ""})
    from btm_scale.config.layout import Layout
    from btm_scale.distributed.group import ExpertGroup

    ExpertGroup.join(Layout(precision="bf16"))


def counted_training() -> dict[str, Any]:
    """Return the counts of this project's training."""
    from btm_scale.train.gradient_sums import bytes_per_micro_batch

    losses = {name: loss_counts(case) for name, case in CASES.items()}
    for name, counts in losses.items():
        print("loss", name, counts.total(), flush=True)
    rows: dict[str, Any] = {
        "loss": {name: row(counts.total()) | {"operators": operators(counts)} for name, counts in losses.items()},
        "layer": {},
        "training": {},
    }
    for name in MODELS:
        case, layer = CASES[name], layer_counts(CASES[name])
        print("layer", name, layer.total(products=False), flush=True)
        rows["layer"][name] = row(layer.total(products=False)) | {"operators": operators(layer)}
        loss = losses[name]
        moved = Bytes(
            loss=loss.total().bytes,
            loss_besides_products=loss.total(products=False).bytes,
            layers=case.shape.layers * layer.total(products=False).bytes,
            sums=bytes_per_micro_batch(case.shape),
        )
        rows["training"][name] = {"bytes": described(moved), **utilization(case, moved)}
    return rows


def counted_float8() -> dict[str, Any]:
    """Return the counts of a layer with and without float8 products, on one rank, and the seconds that these change."""
    rows = {}
    for name, case in CASES.items():
        plain, float8 = layer_counts(case).total(products=False), float8_layer_counts(case).total(products=False)
        print("float8", name, float8, flush=True)
        rows[name] = {
            "layer": row(float8),
            "without": row(plain),
            "seconds": float8_seconds(case, float8.bytes - plain.bytes),
        }
    return rows


def counted_decoding(counts_of: Callable[[Decoding], Counts]) -> dict[str, Any]:
    """Return the counts of one step of decoding from a mixture."""
    found = {name: counts_of(case) for name, case in DECODINGS.items()}
    for name, counts in found.items():
        print("decoding", name, counts.total(), flush=True)
    return {name: row(counts.total()) | {"operators": operators(counts)} for name, counts in found.items()}


def counted_reading() -> dict[str, Any]:
    """Return the counts of reading and scoring a prompt, from hidden states and from logits."""
    ways = {"states": False, "logits": True}
    return {
        name: {way: row(reading_counts(case, from_logits=logits).total()) for way, logits in ways.items()}
        for name, case in READINGS.items()
    }


def counted_peer() -> dict[str, Any]:
    """Return the same of the plain model, whose layer is Llama's."""
    from gpu_counting import plain

    rows: dict[str, Any] = {"layer": {}, "loss": {}, "training": {}}
    for name in MODELS:
        case = CASES[name]
        layer, loss = plain.layer_count(case), plain.loss_count(case)
        rows["layer"][name], rows["loss"][name] = row(layer), row(loss)
        parameters = case.shape.parameters
        moved = Bytes(
            loss=loss.bytes,
            loss_besides_products=loss.bytes,
            layers=case.shape.layers * layer.bytes,
            sums=6 * parameters,  # bfloat16 sums
        )
        rows["training"][name] = {"bytes": described(moved), **utilization(case, moved)}
    return rows


def row(count: Count) -> dict[str, Any]:
    """Return a count for the results."""
    return {"kernels": count.kernels, "bytes": count.bytes}


def operators(counts: Counts) -> dict[str, dict[str, int]]:
    """Return the operators that move most, first."""
    ordered = counts.bytes.most_common()
    return {name: {"kernels": counts.kernels[name], "bytes": moved} for name, moved in ordered if counts.kernels[name]}


if __name__ == "__main__":
    main()
