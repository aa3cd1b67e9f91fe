"""The files that are mutated: one small valid file of every kind that btm-scale reads, by its writers or others."""

from __future__ import annotations

import argparse
import bz2
import gzip
import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard
from helpers import row_formats
from helpers.mixtures import chosen_mixture, measured_mixtures
from helpers.tiny_run import save_card, tiny_values, write_config
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.formats.safetensors_writer import ShardedWriter
from btm_scale.checkpoint.formats.tensors import TensorSpec
from btm_scale.data.clustering import Clustering
from btm_scale.data.train_tokenizer import train_tokenizer
from btm_scale.evaluate.ablate import Ablation, Measured
from btm_scale.evaluate.mixture_record import MixtureRecord
from btm_scale.evaluate.results import Results
from btm_scale.evaluate.soups import Soups
from btm_scale.forest.branch import Branch
from btm_scale.forest.expert import Parent
from btm_scale.forest.scores import Scores
from btm_scale.model.hf_config import config_json
from btm_scale.model.hf_weights import huggingface_shapes
from btm_scale.model.shape import ModelShape
from btm_scale.run_dir import SEED, RunDir
from fuzz.foreign_checkpoints import write_foreign

SHAPE = ModelShape(layers=2, hidden=8, heads=2, kv_heads=2, ffn=12, positions=16, vocabulary=17, tied=False)
FLAT_SHAPES = {"a.weight": (3, 5), "b.weight": (7,), "c.weight": (2, 2, 2)}
FLAT_CONFIG = json.dumps({"model_type": "flat", "hidden_size": 16})  # of FLAT_SHAPES; no family that is known
TEXTS = [f"Document {i} has words, and a number: {i * i}." for i in range(12)]


def make_corpus(root: Path) -> None:
    """Fill a folder with one folder per kind."""
    for make in (write_models, _archives, write_zero, _training_state, _text, _tokenizers, _run, _others):
        make(root)
    write_foreign(root, SHAPE, _weights(4), (root / "model" / "config.json").read_text())


def _weights(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = huggingface_shapes(SHAPE)
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


def _save(folder: Path, weights: dict[str, torch.Tensor], shard: float = 5e9) -> None:
    specs = {name: TensorSpec.of(tensor) for name, tensor in weights.items()}
    with ShardedWriter(folder, specs, max_shard_bytes=shard) as writer:
        for name, tensor in weights.items():
            writer.write(name, tensor)
    _save_config(folder)


def _save_config(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = config_json(SHAPE, dtype="bfloat16", end_of_text=0)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_models(root: Path) -> None:
    _save(root / "model", _weights(0))
    _save(root / "sharded", _weights(1), shard=1500)
    save_card(root / "model", "model", content_hash="0" * 64)
    convert(root / "model", root / "torch_dist", to="megatron", tensor=2)
    convert(root / "model", root / "deepspeed", to="deepspeed", tensor=2)


def _archives(root: Path) -> None:
    _save_config(root / "bin")
    weights = {name: tensor.float() for name, tensor in _weights(2).items()}
    transposed = {name: tensor.t().contiguous().t() for name, tensor in weights.items() if tensor.dim() == 2}
    torch.save(weights | transposed, root / "bin" / "pytorch_model.bin")
    _save_config(root / "bins")
    where = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(sorted(weights))}
    for file in set(where.values()):
        torch.save({name: weights[name] for name in where if where[name] == file}, root / "bins" / file)
    (root / "bins" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))


def write_zero(root: Path) -> None:
    """Save what DeepSpeed's engine saves, of a model that is not Megatron-core's."""
    flat = torch.randn(sum(torch.Size(shape).numel() for shape in FLAT_SHAPES.values()) + 2)
    shapes = {name: torch.Size(shape) for name, shape in FLAT_SHAPES.items()}
    for stage in (2, 3):
        folder = root / f"zero{stage}" / "global_step3"
        folder.mkdir(parents=True)
        (folder.parent / "latest").write_text("global_step3")
        (folder.parent / "config.json").write_text(FLAT_CONFIG)
        state: dict[str, Any] = {"module": {"scale": torch.ones(2)}, "buffer_names": ["scale"], "global_steps": 3}
        state |= {"param_shapes": [shapes], "shared_params": {"d.weight": "a.weight"}, "args": argparse.Namespace(lr=1)}
        for rank in range(2):
            prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
            if stage == 3 or rank == 0:
                torch.save(state, folder / f"{prefix}mp_rank_00_model_states.pt")
            own: dict[str, Any] = {"partition_count": [2], "zero_stage": stage, "ds_version": "0.19.8"}
            key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
            own[key] = [flat.chunk(2)[rank].clone()]
            torch.save({"optimizer_state_dict": own}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    for name, shape in FLAT_SHAPES.items():
        folder = root / "universal" / "zero" / name
        folder.mkdir(parents=True)
        torch.save({"param": torch.randn(shape), "step": 3}, folder / "fp32.pt")
    (root / "universal" / "config.json").write_text(FLAT_CONFIG)


def _training_state(root: Path) -> None:
    folder = root / "state"
    _save(folder, {f"master/{name}": tensor for name, tensor in _weights(3, torch.float32).items()})
    record = {"schema": 1, "step": 5, "adam_steps": 5, "random_state": "AAAA", "loss_scale": {}, "sha256": "0" * 64}
    (folder / "state.json").write_text(json.dumps(record))


def _text(root: Path) -> None:
    folder = root / "text"
    folder.mkdir()
    rows = [{"text": text, "file": f"f{i // 3}", "id": i} for i, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (folder / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet", row_group_size=5)
    (folder / "f.csv").write_bytes(row_formats.table(rows))
    (folder / "g.json").write_bytes(row_formats.json_array(rows))
    (folder / "h.tar").write_bytes(row_formats.tar(rows))
    (folder / "i.arrow").write_bytes(row_formats.arrow_stream(rows))
    (folder / "j.jsonl.xz").write_bytes(lzma.compress(lines))
    (folder / "k.jsonl.bz2").write_bytes(bz2.compress(lines))
    (folder / "e.txt").write_text("\n".join(TEXTS) + "\ncafé 😀\n")


def _tokenizers(root: Path) -> None:
    (root / "sentencepiece").mkdir()
    train_tokenizer(root / "sentencepiece", TEXTS * 50, vocab_size=300)
    core = FastTokenizer(models.BPE({letter: i for i, letter in enumerate(_letters())}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(str(root / "fast"))


def _letters() -> list[str]:
    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"]


def _run(root: Path) -> None:
    """Write the records of a finished run, with untrained models."""
    texts = root / "run-text"
    texts.mkdir()
    run = RunDir(root / "run")
    run.root.mkdir()
    config = write_config(root / "config" / "tiny.yaml", tiny_values(texts, baselines={}, novel_domains={}))
    config.save(run.config)
    names = list(config.domains)
    for i, name in enumerate((SEED, *names)):
        _save(run.model(name), _weights(i))
        parents = () if name == SEED else (Parent(SEED, 1.0),)
        save_card(run.model(name), name, parents=parents, domains=dict.fromkeys(names, 0.5), content_hash="f" * 64)
        run.train(name).mkdir(parents=True)
        rows = [{"step": step, "loss": 5.0 / step, "tokens_per_second": 1e4, "seconds": 0.1} for step in range(1, 13)]
        run.metrics(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        Branch(parents=parents, domains=dict.fromkeys(names, 0.5)).save(run.branch(name))
        for domain in names:
            run.scores(name, domain, "dev").parent.mkdir(parents=True, exist_ok=True)
            log_probs = -np.arange(1, 41, dtype=np.float32)
            Scores(log_probs, np.arange(0, 40, 10, dtype=np.int64), "f" * 64, "e" * 64).save(
                run.scores(name, domain, "dev")
            )
    run.results.parent.mkdir(parents=True)
    _results(names).save(run.results)
    Soups(forest=dict.fromkeys(names, "f" * 64), members={name: (name,) for name in names}).save(run.soups)
    measured = Measured(key="k", experts=tuple(names), mean=3.0, perplexity=dict.fromkeys(names, 3.0))
    Ablation(measured=(measured,)).save(run.results.with_name("ablation.json"))
    mixtures = tuple(measured_mixtures([*names, SEED], names, 6))
    MixtureRecord(measured=mixtures, chosen=chosen_mixture([*names, SEED], runs=6)).save(run.mixture)


def _results(names: list[str]) -> Results:
    methods = {
        method: {"perplexity": dict.fromkeys(names, 9.5), "bits_per_byte": dict.fromkeys(names, 1.5)}
        for method in ("seed", "ensemble", *(f"expert:{name}" for name in names))
    }
    values = {
        "name": "tiny",
        "random_seed": 3,
        "domains": {name: {"novel": False, "tokens": 4096, "bytes": 16000} for name in names},
        "methods": methods,
        "compute": {"seed": {"tokens": 500, "flops": 3e12}, "ensemble": {"tokens": 1000, "flops": 6e12}},
        "priors": {name: {each: 1 / len(names) for each in names} for name in names},
        "lineage": {name: {SEED: 1.0} for name in names},
    }
    return Results.model_validate(values)


def _others(root: Path) -> None:
    (root / "hostfile").mkdir()
    (root / "hostfile" / "hostfile").write_text("# two hosts\nworker-1 slots=8\nworker-2  slots = 4\n")
    journal = root / "journal"
    journal.mkdir()
    rows = [[f"tensor-{i}", i, i + 10, "f" * 64] for i in range(6)]
    (journal / "done-00000.jsonl").write_text("".join(f"\n{json.dumps(row)}\n" for row in rows))
    words = [f"{text} {'apple pear' if i % 2 else 'metal wood'}" for i, text in enumerate(TEXTS * 3)]
    (root / "clustering").mkdir()
    Clustering.fit(words, 2, dimensions=3).save(root / "clustering")


def copy_of(corpus: Path, kind: str, to: Path) -> Path:
    """Return a fresh copy of one kind's folder."""
    shutil.copytree(corpus / kind, to)
    return to
