"""Time and memory of reading a DeepSpeed checkpoint, beside DeepSpeed's own zero_to_fp32.

    python benchmarks/zero_to_fp32.py [--millions 120] [--rounds 3] [--out FILE]

One rank's engine saves a Llama-like model under ZeRO 2, in bf16 with float32 master weights. Fresh processes then write
those weights as safetensors: ours as a Hugging Face model, and `deepspeed.utils.zero_to_fp32 --safe_serialization`
under the engine's names. It supports one tensor rank only. Memory is the peak of anonymous memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from environment import describe
from merge import measured

from btm_scale.model.hf_config import config_json
from btm_scale.model.shape import ModelShape

VOCABULARY, HIDDEN, FFN = 16000, 768, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--millions", type=float, default=120, help="parameters")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "zero_to_fp32.json")
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    per_layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN
    shape = ModelShape(
        layers=max(1, round((options.millions * 1e6 - VOCABULARY * HIDDEN) / per_layer)),
        hidden=HIDDEN,
        heads=12,
        kv_heads=12,
        ffn=FFN,
        positions=1024,
        vocabulary=VOCABULARY,
    )
    if options.save:
        return save(options.save, shape)
    with tempfile.TemporaryDirectory(prefix="btm-zero-") as folder:
        work = Path(folder)
        checkpoint = work / "checkpoint"
        command = [sys.executable, __file__, "--millions", str(options.millions), "--save", str(checkpoint)]
        subprocess.run(command, check=True, env={**os.environ, "DS_ACCELERATOR": "cpu"}, capture_output=True)
        source, ours, theirs = str(checkpoint), work / "ours", work / "theirs"
        convert = [sys.executable, "-m", "btm_scale.cli", "convert", source, str(ours), "--to", "huggingface"]
        module = [sys.executable, "-m", "deepspeed.utils.zero_to_fp32", source, str(theirs)]
        commands = {"ours": (convert, ours), "zero_to_fp32": ([*module, "--safe_serialization"], theirs)}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, (command, output) in commands.items():
                shutil.rmtree(output, ignore_errors=True)
                runs[name].append(measured(command, output))
    medians = {
        name: {figure: statistics.median(run[figure] for run in of) for figure in of[0]} for name, of in runs.items()
    }
    result = {"environment": describe(), "parameters": shape.parameters, "medians": medians, "runs": runs}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(medians, indent=1))
    return None


def save(folder: Path, shape: ModelShape) -> None:
    """Save a checkpoint by the real engine, with the config.json that our reader needs."""
    import torch

    from btm_scale.config.layout import Layout
    from btm_scale.distributed.group import ExpertGroup
    from btm_scale.model.gpt import build_model

    group = ExpertGroup.join(Layout(precision="bf16"))
    import deepspeed

    model = build_model(shape, tensor=1, dtype=torch.bfloat16, on_cpu=True)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=config,
        mpu=group.mpu,
        dist_init_required=False,
    )
    engine.save_checkpoint(str(folder))
    described = config_json(shape, dtype="float32", end_of_text=None)
    (folder / "config.json").write_text(json.dumps(described))
    group.leave()


if __name__ == "__main__":
    main()
