"""A run with real text and files, whose models are trained by a short loop without engine or launcher."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from btm_scale.checkpoint.hashing import content_hash
from btm_scale.config.run import RunConfig
from btm_scale.data.prepare import prepare
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.evaluate.hf_score import block_log_probs
from btm_scale.forest.expert import CARD, Expert, Parent, read_expert
from btm_scale.forest.scores import Scores, evaluation_text
from btm_scale.model.hf_config import config_json
from btm_scale.model.hf_decoder import Decoder
from btm_scale.run_dir import SEED, RunDir
from helpers.tiny_run import tiny_values, write_config

DOMAINS = ("python", "cpp", "licences", "docs")
_BATCH = 8


def handmade_run(text: Path, folder: Path) -> tuple[RunConfig, RunDir]:
    """Return a run of a seed and four experts branched from it, scored on the dev text of every domain."""
    values = tiny_values(
        text,
        domains={name: {"text": f"{name}.jsonl"} for name in DOMAINS},
        novel_domains={},
        data={"dev": 0.2, "test": 0.1, "workers": 1},
        baselines={"dense": True},
    )
    config = write_config(folder / "tiny.yaml", values)
    run = RunDir(folder / "run")
    run.root.mkdir()
    config.save(run.config)
    prepare(config, run)
    train(config, run, SEED, DOMAINS, parent=None, steps=120)
    for name in DOMAINS:
        train(config, run, name, (name,), steps=50)
        score_dev(config, run, name)
    return config, run


def score_dev(config: RunConfig, run: RunDir, name: str) -> None:
    """Score a model of the run on the dev text of every domain."""
    decoder, model_hash = Decoder.load(run.model(name)), read_expert(run.model(name)).scored_hash
    for domain in DOMAINS:
        dev = evaluation_text(config, run, domain, "dev")
        log_probs = block_log_probs(decoder, dev.tokens, dev.block_starts)
        Scores(log_probs, dev.block_starts, model_hash, dev.fingerprint).save(run.scores(name, domain, "dev"))


def train(
    config: RunConfig,
    run: RunDir,
    name: str,
    domains: Sequence[str],
    *,
    parent: str | None = SEED,
    steps: int,
    random_seed: int = 0,
) -> None:
    """Train a model of the run on an even mixture of domains, and publish it as an expert."""
    torch.manual_seed(random_seed)
    model = _network(config, run, parent)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if parent is None else 2e-3)
    windows = _windows(config, run, domains, random_seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] *= 1.0 if parent is None or step == 0 else (steps - step) / (steps - step + 1)
        ids = next(windows)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    publish(run, name, domains, parent, model)


def _network(config: RunConfig, run: RunDir, parent: str | None) -> Any:
    if parent is not None:
        return AutoModelForCausalLM.from_pretrained(run.model(parent)).train()
    tokenizer = Tokenizer.load(run.tokenizer)
    shape = config.model.shape(tokenizer.vocab_size, config.budget.sequence_length)
    return LlamaForCausalLM(LlamaConfig(**config_json(shape, dtype="float32", end_of_text=tokenizer.eos))).train()


def _windows(config: RunConfig, run: RunDir, domains: Sequence[str], random_seed: int) -> Any:
    random = np.random.default_rng(random_seed)
    texts = []
    for domain in domains:
        documents = IndexedDataset(str(run.tokens(domain, "train")))
        texts.append(np.concatenate([documents[i] for i in range(len(documents))]).astype(np.int64))
    length = config.budget.sequence_length
    while True:
        sampled = [texts[random.integers(len(texts))] for _ in range(_BATCH)]
        starts = [random.integers(len(text) - length) for text in sampled]
        yield torch.tensor(
            np.stack([text[start : start + length] for text, start in zip(sampled, starts, strict=True)])
        )


def publish(
    run: RunDir,
    name: str,
    domains: Sequence[str],
    parent: str | None,
    model: Any,
    *,
    tokenizer: Path | None = None,
) -> None:
    """Write a model as a finished one of the run, with the tokenizer of the run by default."""
    directory = run.model(name)
    model.save_pretrained(directory)
    for file in (tokenizer or run.tokenizer).iterdir():
        shutil.copyfile(file, directory / file.name)
    Expert(
        name=name,
        domains=dict.fromkeys(domains, 1 / len(domains)),
        parents=() if parent is None else (Parent(parent, 1.0),),
        tokens=1,
        steps=1,
        layout={},
        data_fingerprint={},
        content_hash=content_hash(directory),
    ).save(directory / CARD)
