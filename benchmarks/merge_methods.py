"""Agreement of our merge methods with mergekit's on small random models.

    python benchmarks/merge_methods.py [--venv DIR] [--out FILE]

A base and three models that differ from it a little, in float32, are merged by both. `equal` is the fraction of
elements that agree to a millionth of the largest difference from the base, `largest_gap` the largest disagreement
in that unit. Where both draw at random, `mean` and `deviation` of what they add to the base are compared instead.
docs/merging.md explains every difference.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from environment import describe
from merge import MERGEKIT, mergekit_in

from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.formats.safetensors_writer import ShardedWriter
from btm_scale.checkpoint.formats.tensors import TensorSpec
from btm_scale.checkpoint.merge.merge import merge

MODELS, HIDDEN, FFN, VOCABULARY = 3, 64, 160, 512
WEIGHTS = [0.5, 1.0, 1.5]
# Ours, theirs, our parameters, theirs for every model, theirs for all.
CASES: dict[str, tuple[str, str, dict[str, float], dict[str, float], dict[str, Any]]] = {
    "ties": ("ties", "ties", {"density": 0.3}, {"density": 0.3}, {"normalize": True}),
    "sce": ("sce", "sce", {"density": 0.4}, {}, {"select_topk": 0.4}),
    "dare, all kept": ("dare", "dare_linear", {"density": 1.0}, {"density": 1.0}, {"normalize": False}),
    "dare, half kept": ("dare", "dare_linear", {"density": 0.5}, {"density": 0.5}, {"normalize": False}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--venv", type=Path, help="where mergekit is, or goes; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "merge_methods.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="btm-methods-") as folder:
        work = Path(folder)
        mergekit = mergekit_in(options.venv or work / "venv")
        base = make_model(work / "base", None)
        models = [make_model(work / f"model-{i}", i + 1) for i in range(MODELS)]
        cases = {}
        for number, (case, settings) in enumerate(CASES.items()):
            ours, theirs = work / f"ours-{number}", work / f"theirs-{number}"
            method, their_method, own, for_each, for_all = settings
            weights = WEIGHTS if method != "sce" else [1.0] * MODELS
            merge(ours, list(zip(models, weights, strict=True)), method=method, base=base, parameters=own)
            parts = [
                {
                    "model": str(model),
                    "parameters": for_each | ({"weight": weight} if method != "sce" else {}),
                }
                for model, weight in zip(models, weights, strict=True)
            ]
            recipe = {"merge_method": their_method, "dtype": "float32", "base_model": str(base)}
            file = work / "recipe.yaml"
            file.write_text(json.dumps(recipe | {"models": parts, "parameters": for_all}))
            subprocess.run([mergekit, file, theirs, "--no-copy-tokenizer"], check=True, capture_output=True)
            cases[case] = compared(base, ours, theirs)
    result = {"environment": describe() | {"mergekit": MERGEKIT}, "cases": cases}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(cases, indent=1))


def make_model(folder: Path, seed: int | None) -> Path:
    """The base; given a seed, a model that differs from it by normal noise of a hundredth of its size."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shapes |= {f"model.layers.0.self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
    shapes |= {f"model.layers.0.mlp.{part}_proj.weight": (FFN, HIDDEN) for part in ("gate", "up")}
    shapes["model.layers.0.mlp.down_proj.weight"] = (HIDDEN, FFN)
    norms = ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
    specs = {name: TensorSpec(torch.float32, shape) for name, shape in shapes.items()}
    specs |= {f"{norm}.weight": TensorSpec(torch.float32, (HIDDEN,)) for norm in norms}
    draw, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed or 0)
    with ShardedWriter(folder, specs) as writer:
        for name, spec in specs.items():
            values = torch.randn(spec.shape, generator=draw)
            if seed is not None:
                values += 0.01 * torch.randn(spec.shape, generator=own)
            writer.write(name, values)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": 1,
        "vocab_size": VOCABULARY,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def compared(base: Path, ours: Path, theirs: Path) -> Mapping[str, Any]:
    """The figures of one case, over all tensors."""
    origin, one, other = SafetensorsModel(base), SafetensorsModel(ours), SafetensorsModel(theirs)
    assert one.names == other.names
    moved = [
        torch.cat([(side.read(name) - origin.read(name)).double().reshape(-1) for name in one.names])
        for side in (one, other)
    ]
    unit = float(moved[1].abs().max())
    gap = (moved[0] - moved[1]).abs() / unit
    return {
        "equal": float((gap < 1e-6).double().mean()),
        "largest_gap": float(gap.max()),
        "mean": {"ours": float(moved[0].mean()), "mergekit": float(moved[1].mean())},
        "deviation": {"ours": float(moved[0].std()), "mergekit": float(moved[1].std())},
    }


if __name__ == "__main__":
    main()
