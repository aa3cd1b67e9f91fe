"""A run with untrained models of a few thousand weights, for tests with many commands at once."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from btm_scale.config.run import RunConfig
from btm_scale.data.prepare import prepare
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.model.hf_config import config_json
from btm_scale.run_dir import SEED, RunDir
from helpers.handmade_run import publish
from helpers.text_samples import prose_texts, python_texts, write_jsonl
from helpers.tiny_run import tiny_values, write_config

EXPERTS = ("code", "prose")
NEW_TEXTS = ("one", "two", "three")  # of domains that may be added
FRIENDS = ("friend", "stranger")  # models that may be added


def crowded_run(folder: Path) -> RunDir:
    """Return a run of a seed and two experts; beside it are models to add and text to branch on."""
    texts = prose_texts(900)
    write_jsonl(folder / "code.jsonl", python_texts(150, longest=600))
    write_jsonl(folder / "prose.jsonl", texts[:150])
    for number, name in enumerate(NEW_TEXTS, start=1):
        write_jsonl(folder / f"{name}.jsonl", texts[number * 200 : number * 200 + 150])
    values = tiny_values(
        folder,
        model={"family": "llama", "layers": 1, "hidden": 16, "heads": 2, "kv_heads": 1, "ffn": 24},
        tokenizer={"vocab_size": 400},
        domains={name: {"text": f"{name}.jsonl"} for name in EXPERTS},
        novel_domains={},
        data={"dev": 0.2, "test": 0.2, "workers": 1},
        baselines={"dense": False},
        evaluate={"tokens_per_domain": 500, "dev_blocks": 5, "averages": ["uniform", "argmax", "posterior"]},
        layout={"precision": "fp32", "micro_batch": 4},
    )
    config = write_config(folder / "crowd.yaml", values)
    run = RunDir(folder / "run")
    run.root.mkdir()
    config.save(run.config)
    prepare(config, run)
    for number, name in enumerate((SEED, *EXPERTS)):
        publish(run, name, EXPERTS if name == SEED else (name,), None if name == SEED else SEED, network(run, number))
    for number, name in enumerate(FRIENDS, start=10):
        publish(RunDir(folder), name, EXPERTS[:1], None, network(run, number), tokenizer=run.tokenizer)
    return run


def network(run: RunDir, random_seed: int) -> LlamaForCausalLM:
    """Return a model with random weights of the run's shape."""
    config, tokenizer = RunConfig.load(run.config), Tokenizer.load(run.tokenizer)
    shape = config.model.shape(tokenizer.vocab_size, config.budget.sequence_length)
    torch.manual_seed(random_seed)
    settings = config_json(shape, dtype="float32", end_of_text=tokenizer.eos)
    return LlamaForCausalLM(LlamaConfig(**settings, initializer_range=0.3))
