"""A run that takes seconds, and the command line as users call it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import dump_text
from btm_scale.distributed.precision import ask_device
from btm_scale.forest.expert import CARD, Expert
from btm_scale.run_dir import RunDir

TINY_MODEL = {"family": "llama", "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96}


def tiny_values(text: Path, **changes: Any) -> dict[str, Any]:
    """Return a config that trains in seconds: two experts, a novel domain, 12 steps for the seed and each expert."""
    values = {
        "name": "tiny",
        "random_seed": 3,
        "model": TINY_MODEL,
        "tokenizer": {"vocab_size": 512},
        "text_root": str(text),
        "domains": {"python": {"text": "python.jsonl"}, "licences": {"text": "licences.jsonl"}},
        "novel_domains": {"docs": {"text": "docs.jsonl"}},
        "data": {"dev": 0.1, "test": 0.1, "workers": 1},  # a worker process takes seconds to start
        "budget": {"tokens": 24 * 1024, "seed_share": 0.5, "sequence_length": 64, "batch_tokens": 1024},
        "optimizer": {"lr": 1e-2},
        "layout": {"micro_batch": 4},
        "checkpoint": {"every": 5},
        "baselines": {"random_split": True},
        "evaluate": {
            "tokens_per_domain": 3000,
            "dev_blocks": 20,
            "averages": ["uniform", "argmax", "posterior", "tempered", "greedy"],
        },
        **changes,
    }
    # What `auto` means on this machine, queried once rather than in each of hundreds of calls.
    if "precision" not in values["layout"]:
        values["layout"] = {"precision": ask_device().fast, **values["layout"]}
    return values


def write_config(path: Path, values: dict[str, Any]) -> RunConfig:
    """Write a YAML file and load it like a user's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_text(values))
    return RunConfig.load(path)


def share_text(run: RunDir, prepared: RunDir) -> None:
    """Link the tokenizer and token files of a prepared run into a new one, with the note that the tokenizer works."""
    run.root.mkdir(parents=True, exist_ok=True)
    for name in ("data", "tokenizer"):
        (run.root / name).symlink_to(prepared.root / name)
    for note in prepared.root.glob(".tokenizer-passed-*"):
        shutil.copy2(note, run.root)


def start_btm_scale(
    *arguments: object, environment: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[str]:
    """Start the command line as a user does, capturing stderr; `environment` is added to this process's."""
    command = [sys.executable, "-m", "btm_scale.cli", *map(str, arguments)]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, text=True, env=_as_no_rank() | dict(environment or {}), **options)


def btm_scale(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    command = [sys.executable, "-m", "btm_scale.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=_as_no_rank(), timeout=900)
    if check and done.returncode != 0:
        raise AssertionError(f"{command} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def _as_no_rank() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}


def save_card(directory: Path, name: str, **fields: Any) -> None:
    """Write an expert.json with only a name and `fields`."""
    empty: dict[str, Any] = {"domains": {}, "parents": (), "layout": {}, "data_fingerprint": {}, "content_hash": ""}
    directory.mkdir(parents=True, exist_ok=True)
    Expert(**({"name": name, "tokens": 1, "steps": 1} | empty | fields)).save(directory / CARD)
