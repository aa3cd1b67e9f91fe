"""Every verb that writes files, as a command on a tiny run: the stage that it needs, and what it changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.text_samples import prose_texts, python_texts, write_jsonl
from helpers.tiny_run import tiny_values, write_config
from helpers.warm import Done, Warm

CONFIG = "tiny.yaml"
TOKENS_CONFIG = "tokens.yaml"  # whose text is token files
RECIPE = "recipe.yaml"
# What differs between two executions: times, and what a process logs.
_LOGS = ("log", "metrics.jsonl")


@dataclass(frozen=True)
class Verb:
    """A command: the stage of the run that it begins with, and its words, given the inputs and the run's folder.

    `quick`: whether `make test` has it. Others share what writes their files with one that is.
    """

    name: str
    stage: str
    words: Callable[[Path, Path], Sequence[object]]
    quick: bool = True


def _merge(inputs: Path, run: Path) -> Sequence[object]:
    return "merge", run / "merged", inputs / "python=0.25", inputs / "prose=0.75", "--max-shard-size", "100KB"


def _merge_moe(inputs: Path, run: Path) -> Sequence[object]:
    return "merge", run / "mixture", inputs / "python", inputs / "prose", "--method", "moe"


def _convert(kind: str, source: str = "python") -> Callable[[Path, Path], Sequence[object]]:
    return lambda inputs, run: ("convert", inputs / source, run / kind, "--to", kind)


def _train_expert(inputs: Path, run: Path) -> Sequence[object]:
    return "train", inputs / CONFIG, "--model", "python", "--out", run


def _discover(inputs: Path, run: Path) -> Sequence[object]:
    files = (inputs / "prose.jsonl", inputs / "python.jsonl")
    return "discover", *files, "--clusters", 2, "--dimensions", 8, "--out", run / "domains"


def _branch(inputs: Path, run: Path) -> Sequence[object]:
    return "branch", run, "--name", "notes", "--from", "python=0.5,prose=0.5", "--text", inputs / "notes.jsonl"


VERBS = {
    verb.name: verb
    for verb in (
        Verb("prepare", "empty", lambda inputs, run: ("prepare", inputs / CONFIG, "--out", run)),
        Verb("train", "prepared", lambda inputs, run: ("train", inputs / CONFIG, "--model", "seed", "--out", run)),
        Verb("evaluate", "trained", lambda inputs, run: ("evaluate", run)),
        Verb("report", "evaluated", lambda inputs, run: ("report", run)),
        Verb("ablate", "evaluated", lambda inputs, run: ("ablate", run, "--domain", "prose", "--domain", "python")),
        Verb("mixture", "evaluated", lambda inputs, run: ("mixture", run, "--target", "prose=1", "--runs", 4), False),
        Verb("branch", "trained", _branch),
        Verb("forest add", "trained", lambda inputs, run: ("forest", "add", run, inputs / "friend")),
        Verb("forest remove", "trained", lambda inputs, run: ("forest", "remove", run, "prose")),
        Verb("upcycle", "trained", lambda inputs, run: ("upcycle", run)),
        Verb("discover", "empty", _discover),
        Verb("merge", "empty", _merge),
        *(Verb(f"convert to {kind}", "empty", _convert(kind)) for kind in ("huggingface", "megatron", "deepspeed")),
        Verb(
            "prepare token files", "empty", lambda inputs, run: ("prepare", inputs / TOKENS_CONFIG, "--out", run), False
        ),
        Verb("train an expert", "seed", _train_expert, False),
        Verb(
            "merge by recipe",
            "empty",
            lambda inputs, run: ("merge", run / "merged", "--recipe", inputs / RECIPE),
            False,
        ),
        Verb("merge to a mixture", "empty", _merge_moe, False),
        Verb("convert an adapter", "empty", _convert("huggingface", "adapter"), False),
        Verb("convert a DCP checkpoint", "empty", _convert("huggingface", "dcp"), False),
    )
}


class Stages:
    """A tiny run at every stage, and the inputs of the verbs; tests copy a stage and change the copy."""

    def __init__(self, folder: Path, warm: Warm) -> None:
        self._folder = folder
        self.inputs = folder / "inputs"
        self.inputs.mkdir()
        write_jsonl(self.inputs / "python.jsonl", python_texts(60))
        write_jsonl(self.inputs / "prose.jsonl", prose_texts(160))
        write_jsonl(self.inputs / "notes.jsonl", prose_texts(240)[160:])
        write_config(self.inputs / CONFIG, self._values())
        (folder / "empty").mkdir()
        run = folder / "run"
        for stage, words in (
            ("prepared", ("prepare", self.inputs / CONFIG, "--out", run)),
            ("seed", ("train", self.inputs / CONFIG, "--out", run)),
            ("trained", ("train", self.inputs / CONFIG, "--out", run)),
            ("evaluated", ("evaluate", run)),
        ):
            warm.check(*words)
            shutil.copytree(run, folder / stage)
        for model in ("python", "prose"):
            shutil.copytree(run / "experts" / model, self.inputs / model)
        shutil.copytree(self.inputs / "python", self.inputs / "friend")
        (self.inputs / "friend" / "expert.json").unlink()
        self._write_token_files(run)
        _write_recipe(self.inputs)
        _write_adapter(self.inputs / "adapter", self.inputs / "python")
        _write_dcp(self.inputs / "dcp", self.inputs / "python")

    def begin(self, verb: Verb, place: Path) -> tuple[Path, list[object]]:
        """Return the folder in `place` that the verb changes, as it is before, and the words of the command."""
        run = place / "run"
        if run.exists():
            shutil.rmtree(run)
        shutil.copytree(self._folder / verb.stage, run)
        return run, list(verb.words(self.inputs, run))

    def _write_token_files(self, run: Path) -> None:
        """Write the training text of both domains as token files, and a config that reads them."""
        shutil.copytree(run / "tokenizer", self.inputs / "tokenizer")
        for domain in ("python", "prose"):
            for file in (run / "data" / domain).glob("train.*"):
                shutil.copy(file, self.inputs / f"{domain}{file.suffix}")
        values = self._values() | {"tokenizer": {"path": str(self.inputs / "tokenizer")}}
        values["domains"] = {domain: {"token_files": domain} for domain in ("python", "prose")}
        write_config(self.inputs / TOKENS_CONFIG, values)

    def _values(self) -> dict[str, Any]:
        return tiny_values(
            self.inputs,
            domains={"python": {"text": "python.jsonl"}, "prose": {"text": "prose.jsonl"}},
            novel_domains={},
            dev_loss={"every": 2, "tokens": 128, "best": True},
            model={"family": "llama", "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48},
            tokenizer={"vocab_size": 448, "sample_bytes": 40_000},
            data={"dev": 0.2, "test": 0.2, "workers": 1},
            budget={"tokens": 4096, "seed_share": 0.5, "sequence_length": 32, "batch_tokens": 256},
            layout={"micro_batch": 8, "precision": "fp32"},
            checkpoint={"every": 2},
            baselines={"random_split": False},
            evaluate={
                "tokens_per_domain": 600,
                "dev_blocks": 5,
                "averages": ["uniform", "argmax", "posterior", "greedy"],
            },
        )


def _write_recipe(inputs: Path) -> None:
    models = [{"model": str(inputs / name), "parameters": {"weight": 0.5}} for name in ("python", "prose")]
    (inputs / RECIPE).write_text(json.dumps({"merge_method": "linear", "models": models}))


def _write_adapter(folder: Path, base: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    matrices = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(32, 2)}
    save_file(matrices, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))


def _write_dcp(folder: Path, model: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file

    weights = load_file(model / "model.safetensors")
    dcp.save({"model": weights}, checkpoint_id=folder, no_dist=True)
    shutil.copy(model / "config.json", folder)


def files_of(folder: Path) -> dict[str, bytes | None]:
    """Return the content of every file, and None for every folder, by path, without logs and temporary names."""
    found: dict[str, bytes | None] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not is_temporary(name) and not is_log(name):
            found[str(name)] = path.read_bytes() if path.is_file() else None
    return found


def repeat_of(warm: Warm, words: Sequence[object]) -> Done:
    """Give a command again: it must succeed, also after it has finished."""
    return warm.check(*words)


def is_temporary(name: Path) -> bool:
    """Whether a path, or a folder that it is in, has a temporary name or is a cache."""
    return any(part.startswith(".") and part != ".metadata" for part in name.parts)


def is_log(name: Path) -> bool:
    """Whether a file grows line by line and has times in it."""
    return name.name in _LOGS or name.name == "lock" or name.name.startswith("log.")
