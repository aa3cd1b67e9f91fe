"""Agreement of our merges by recipe with mergekit's, on 200 recipes that are drawn for small random models.

    python benchmarks/merge_recipes.py [--venv DIR] [--recipes 200] [--out FILE]

Each recipe is a method with drawn weights and parameters, as numbers, gradients over the layers or values with filters,
on full models or on slices of layers. `largest_gap` of a recipe is the largest disagreement of an element, in units of
the largest difference of an element from the first model; a method draws `random` numbers if its density is below 1,
and then only the means are compared. docs/merging.md explains every difference. `seconds` are of the two commands on
one recipe, imports included.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from environment import describe, of_installed
from merge import MERGEKIT, mergekit_in

from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.formats.safetensors_writer import ShardedWriter
from btm_scale.checkpoint.formats.tensors import TensorSpec
from btm_scale.checkpoint.merge.merge import merge_by_recipe

LAYERS, HIDDEN, FFN, VOCABULARY, HEADS = 4, 32, 48, 64, 4
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
TWO_MODELS = ("slerp", "arcee_fusion", "nearswap")
NO_WEIGHTS = ("karcher", "model_stock", "arcee_fusion", "sce", "nearswap", "ram", "ramplus_tl", "slerp")
METHODS = (
    *("linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_ties", "dare_linear"),
    *("breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "model_stock", "arcee_fusion", "sce", "nearswap"),
    *("ram", "ramplus_tl", "passthrough"),
)
_MERGEKIT = """
import sys, traceback, yaml
from pathlib import Path
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for file in sorted(Path(sys.argv[1]).glob("*.yaml")):
    try:
        config = MergeConfiguration.model_validate(yaml.safe_load(file.read_text()))
        options = MergeOptions(copy_tokenizer=False, random_seed=0, write_model_card=False, quiet=True)
        run_merge(config, str(Path(sys.argv[2]) / file.stem), options)
    except Exception as error:
        (Path(sys.argv[2]) / f"{file.stem}.error").write_text(traceback.format_exc())
"""


def make_model(folder: Path, seed: int) -> Path:
    """A Llama-like model in float32: the base for seed 0, otherwise the base with noise added."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, FFN)
        shapes |= {f"{layer}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    with ShardedWriter(folder, {name: TensorSpec(torch.float32, shape) for name, shape in shapes.items()}) as writer:
        for name, shape in shapes.items():
            weights = torch.randn(shape, generator=shared)
            writer.write(name, weights + 0.3 * torch.randn(shape, generator=own) if seed else weights)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Drawn:
    """Draws recipes; the same seed gives the same ones."""

    def __init__(self, seed: int, base: str, models: list[str]) -> None:
        self._draw, self._base, self._models = random.Random(seed), base, models

    def recipe(self, method: str) -> dict[str, Any]:
        """A recipe of a method, of full models or of two slices."""
        shared = self._shared(method)
        recipe: dict[str, Any] = {"merge_method": method, "dtype": "float32"}
        if method not in ("linear", "karcher", "passthrough") and (
            method not in ("nuslerp", "multislerp") or self._draw.random() < 0.5
        ):
            recipe["base_model"] = self._base
        if shared:
            recipe["parameters"] = shared
        used = self._used(method)
        if method == "passthrough" or self._draw.random() < 0.3:
            # As many models in both: mergekit loses some of the last slice's if the first has fewer.
            slices = [self._slice(method, used, recipe, length) for length in (2, LAYERS - 1)]
            return recipe | {"slices": slices}
        models = [{"model": model, **self._own(method)} for model in used]
        return recipe | {"models": models}

    def _slice(self, method: str, used: list[str], recipe: dict[str, Any], length: int) -> dict[str, Any]:
        sources = []
        for model in self._draw.sample(used, len(used)) if len(used) > 1 else self._used(method)[:1]:
            first = self._draw.randint(0, LAYERS - length)
            sources.append({"model": model, "layer_range": [first, first + length], **self._own(method)})
        if "base_model" in recipe:
            first = self._draw.randint(0, LAYERS - length)
            sources.append({"model": self._base, "layer_range": [first, first + length]})
        return {"sources": sources}

    def _used(self, method: str) -> list[str]:
        if method == "passthrough" or method in TWO_MODELS:
            return [self._draw.choice(self._models)]
        return self._draw.sample(self._models, 2 if method == "nuslerp" else self._draw.choice((2, 3)))

    def _own(self, method: str) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        if method == "passthrough":
            settings["scale"] = self._setting(0.5, 1.5)
        elif method not in NO_WEIGHTS:
            settings["weight"] = self._setting(0.2, 1.0)
        if method in (*RANDOM, "ties", "breadcrumbs", "breadcrumbs_ties"):
            whole = method in RANDOM and self._draw.random() < 0.5
            settings["density"] = 1.0 if whole else self._setting(0.4, 0.8)
        if method.startswith("breadcrumbs"):
            settings["gamma"] = self._setting(0.01, 0.1)
        return {"parameters": settings} if settings else {}

    def _shared(self, method: str) -> dict[str, Any]:
        yes = self._draw.random() < 0.5
        choices: dict[str, dict[str, Any]] = {
            "linear": {"normalize": yes},
            "slerp": {"t": self._setting(0.1, 0.9)},
            "nuslerp": {"nuslerp_flatten": yes, "nuslerp_row_wise": self._draw.random() < 0.5},
            "multislerp": {"normalize_weights": yes},
            "model_stock": {"filter_wise": yes},
            "sce": {"select_topk": self._setting(0.3, 0.9)},
            "nearswap": {"t": self._setting(0.01, 0.2)},
            "karcher": {},
            "arcee_fusion": {},
            "passthrough": {},
            "ram": {},
            "ramplus_tl": {"r": 0.3},
        }
        task = {"normalize": yes, "lambda": self._setting(0.5, 1.2)}
        if method in ("ties", "breadcrumbs", "breadcrumbs_ties"):
            task["rescale"] = self._draw.random() < 0.3
        return choices.get(method, task)

    def _setting(self, low: float, high: float) -> Any:
        def number() -> float:
            return round(self._draw.uniform(low, high), 3)

        form = self._draw.choice(("number", "gradient", "filters"))
        if form == "number":
            return number()
        gradient = [number() for _ in range(self._draw.choice((2, 3, 5)))]
        if form == "gradient":
            return gradient
        return [
            {"filter": self._draw.choice(("mlp", "self_attn", "q_proj", "layernorm")), "value": gradient},
            {"value": number()},
        ]


def _keeps_all(values: Any) -> bool:
    """Whether every density in a recipe is 1."""
    if isinstance(values, dict):
        return values.get("density", 1.0) == 1.0 and all(map(_keeps_all, values.values()))
    return all(map(_keeps_all, values)) if isinstance(values, list) else True


def compared(first: Path, ours: Path, theirs: Path) -> dict[str, float]:
    """The largest gap and the means of the differences from the first model where it has the tensor."""
    gap = move = 0.0
    sums, count = [0.0, 0.0], 0
    with open_model(ours) as one, open_model(theirs) as other, open_model(first) as origin:
        if one.names != other.names:
            raise SystemExit(f"{ours} and {theirs} have different tensors")
        for name in one.names:
            mine, its = one.read(name).double(), other.read(name).double()
            gap = max(gap, float((mine - its).abs().max()))
            start = origin.read(name).double() if name in origin.names else torch.zeros_like(mine)
            move = max(move, float((mine - start).abs().max()))
            sums = [sums[0] + float((mine - start).abs().sum()), sums[1] + float((its - start).abs().sum())]
            count += mine.numel()
    return {"largest_gap": gap / move, "mean_ours": sums[0] / count, "mean_mergekit": sums[1] / count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--venv", type=Path, help="where mergekit is, or goes; default: a temporary folder")
    parser.add_argument("--recipes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3, help="of the timed commands")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "merge_recipes.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="btm-recipes-") as folder:
        work = Path(folder)
        mergekit = mergekit_in(options.venv or work / "venv")
        base, *models = (make_model(work / name, seed) for seed, name in enumerate(("base", "a", "b", "c")))
        drawn = Drawn(0, str(base), [str(model) for model in models])
        recipes, ours, theirs = work / "recipes", work / "ours", work / "theirs"
        for path in (recipes, ours, theirs):
            path.mkdir()
        written = {}
        for i in range(options.recipes):
            recipe = drawn.recipe(METHODS[i % len(METHODS)])
            written[f"{i:03d}"] = recipe
            (recipes / f"{i:03d}.yaml").write_text(json.dumps(recipe))
        script = work / "mergekit_all.py"
        script.write_text(_MERGEKIT)
        subprocess.run([mergekit.parent / "python", script, recipes, theirs], check=True, capture_output=True)
        results = {}
        for name, recipe in written.items():
            error = theirs / f"{name}.error"
            text = json.dumps(recipe)
            facts: dict[str, Any] = {
                "method": recipe["merge_method"],
                "slices": "slices" in recipe,
                "filters": "filter" in text,
                "random": recipe["merge_method"] in RANDOM and not _keeps_all(recipe),
            }
            if error.exists():
                facts["mergekit_failed"] = error.read_text().strip().splitlines()[-1][:200].replace(str(work), "")
            else:
                merge_by_recipe(ours / name, recipes / f"{name}.yaml")
                facts |= compared(base, ours / name, theirs / name)
            results[name] = facts
        plain = recipes / "timed.yaml"
        parts = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models]
        plain.write_text(json.dumps({"merge_method": "linear", "dtype": "float32", "models": parts}))
        command = [sys.executable, "-m", "btm_scale.cli"]
        seconds: dict[str, list[float]] = {"ours": [], "mergekit": [], "import_torch": []}
        for i in range(options.rounds):
            commands = {
                "ours": [*command, "merge", work / f"timed-ours-{i}", "--recipe", plain],
                "mergekit": [mergekit, plain, work / f"timed-theirs-{i}", "--no-copy-tokenizer"],
                "import_torch": [sys.executable, "-c", "import torch"],
            }
            for name, words in commands.items():
                started = time.perf_counter()
                subprocess.run(words, check=True, capture_output=True, env=of_installed())
                seconds[name].append(time.perf_counter() - started)
    exact = [one for one in results.values() if "largest_gap" in one and not one["random"]]
    by_method = {
        method: max((one["largest_gap"] for one in exact if one["method"] == method), default=None)
        for method in METHODS
    }
    result = {
        "environment": describe() | {"mergekit": MERGEKIT},
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "largest_gap_by_method": by_method,
        "recipes": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "recipes"}, indent=1))


if __name__ == "__main__":
    main()
