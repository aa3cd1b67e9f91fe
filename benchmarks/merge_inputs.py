"""Merge speed and memory for plain models, a LoRA adapter among them, and different vocabularies.

    python benchmarks/merge_inputs.py [--work DIR] [--billions 0.5359] [--rounds 3] [--checkout DIR]

Eight Llama-like bf16 models of independent random weights are merged with unequal weights by fresh processes. `plain`
is their mean; `lora` has an adapter of the first model in place of the last; in `union` each model has 100 tokens that
the others lack. `--checkout` is another commit of this repository, whose mean is measured in turn with ours:
`speed_beside_checkout` is its median seconds divided by ours, imports included, and `cpu_beside_checkout` the same of
processor time. `anonymous_bytes` is the sampled peak of the anonymous memory of a run's processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from environment import describe
from merge import FFN, HIDDEN, MODELS, VOCABULARY, WEIGHTS, _remove, llama_specs, make_model, measured
from safetensors.torch import save_file

from btm_scale.checkpoint.formats.tensors import TensorSpec

RANK, OWN_TOKENS = 16, 100
_MERGE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
try:
    from btm_scale.checkpoint.merge.merge import merge
except ImportError:  # before merging had a folder
    from btm_scale.checkpoint.merge import merge
if __name__ == "__main__":
    _, output, weights, settings, *inputs = sys.argv[1:]
    merge(Path(output), list(zip(map(Path, inputs), json.loads(weights))), **json.loads(settings))
"""


def make_adapter(folder: Path, base: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Write a LoRA adapter of every linear layer of a model."""
    draw = torch.Generator().manual_seed(99)
    tensors = {}
    for name, spec in specs.items():
        if name.endswith("_proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            rows, columns = spec.shape
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=draw).mul_(0.02).bfloat16()
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, RANK, generator=draw).mul_(0.02).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def make_tokenizer(folder: Path, number: int, vocabulary: int) -> None:
    """Write a tokenizer with tokens that other models lack, in other rows than theirs."""
    common = [f"token{i}" for i in range(vocabulary - OWN_TOKENS)]
    own = [f"model{number}-{i}" for i in range(OWN_TOKENS)]
    place = 2 * OWN_TOKENS * (number + 1)
    tokens = [*common[:place], *own, *common[place:]]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


def command(code: Path, output: Path, models: Sequence[Path], **settings: str) -> list[str]:
    """Return the command that merges by the code of a checkout."""
    given = [json.dumps(WEIGHTS), json.dumps(settings), *map(str, models)]
    return [sys.executable, "-c", _MERGE, str(code), str(output), *given]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, help="where models go; default: a temporary folder")
    parser.add_argument("--billions", type=float, default=0.5359, help="parameters of each model")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkout", type=Path, help="another commit of this repository, to compare with")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "merge_inputs.json")
    options = parser.parse_args()
    specs = llama_specs(options.billions * 1e9, options.vocabulary)
    here = Path(__file__).resolve().parents[1]
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=options.work, prefix="btm-merge-") as folder:
        work = Path(folder)
        environment = describe()
        models = [work / f"model-{i}" for i in range(MODELS)]
        for i, model in enumerate(models):
            make_model(model, specs, seed=i + 1)
        make_adapter(work / "adapter", models[0], specs)
        adapted = [*models[:-1], work / "adapter"]
        output = work / "out"
        commands = {"plain": command(here, output, models)}
        if options.checkout:
            commands["checkout"] = command(options.checkout.resolve(), output, models)
        commands["lora"] = command(here, output, adapted)
        commands["union"] = command(here, output, models, tokenizer="union")
        for _ in range(options.rounds):
            for name, words in commands.items():
                for i, model in enumerate(models):
                    if name == "union":
                        make_tokenizer(model, i, options.vocabulary)
                    else:
                        (model / "tokenizer.json").unlink(missing_ok=True)
                _remove(output)
                os.sync()
                runs.setdefault(name, []).append(measured(words, output))
    result: dict[str, Any] = {
        "environment": environment,
        "models": MODELS,
        "bytes_per_model": sum(spec.nbytes for spec in specs.values()),
        "shape": {"hidden": HIDDEN, "ffn": FFN, "vocabulary": options.vocabulary, "lora_rank": RANK},
        "runs": runs,
        "anonymous_bytes": {name: max(run["anonymous_bytes"] for run in each) for name, each in runs.items()},
    }
    if options.checkout:
        for figure, name in (("seconds", "speed"), ("cpu_seconds", "cpu")):
            ours, theirs = (statistics.median(run[figure] for run in runs[code]) for code in ("plain", "checkout"))
            result[f"{name}_beside_checkout"] = theirs / ours
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
