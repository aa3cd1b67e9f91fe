"""A power cut drops everything that was not synced; whatever has its final name must be complete all the same."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.power_cut import Disk
from helpers.text_samples import PROSE, prose_texts, write_jsonl
from helpers.tiny_run import save_card

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.formats.safetensors_writer import ShardedWriter
from btm_scale.checkpoint.formats.tensors import TensorSpec
from btm_scale.checkpoint.merge import journal
from btm_scale.checkpoint.merge import merge as merging
from btm_scale.config.run import RunConfig
from btm_scale.data.dataset import TrainingSamples
from btm_scale.data.prepare import prepare
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.evaluate.ablate import Ablation, Measured
from btm_scale.evaluate.mixture_record import MeasuredMixture, MixtureRecord
from btm_scale.evaluate.results import EvaluatedDomain, MethodResult, Results
from btm_scale.evaluate.soups import save_soups
from btm_scale.forest.membership import add_expert
from btm_scale.forest.scores import Scores
from btm_scale.launch.slurm_queue import Submissions, Submitted
from btm_scale.launch.supervise import GroupCommand, Start, run_groups_in
from btm_scale.model.hf_config import config_json
from btm_scale.model.hf_weights import huggingface_shapes
from btm_scale.model.shape import ModelShape
from btm_scale.report.page import write_page
from btm_scale.run.slurm_jobs import write_scripts
from btm_scale.run_dir import RunDir
from btm_scale.train.bad_batches import SkippedBatches
from btm_scale.train.checkpoint import newest_state, write_state
from btm_scale.train.engine import KINDS
from btm_scale.train.pieces import Span
from btm_scale.train.position import Position
from btm_scale.util.files import make_directory, new_file, write_file
from btm_scale.util.rank_log import note_silent_failure

SHAPE = ModelShape(
    family="llama",
    layers=1,
    hidden=16,
    heads=2,
    kv_heads=2,
    head_size=8,
    ffn=24,
    positions=32,
    vocabulary=40,
    tied=False,
)
CONFIG = RunConfig.model_validate({"name": "a run", "domains": {"prose": {"text": "prose.jsonl"}}})
RESULTS = Results(
    name="a run",
    random_seed=0,
    domains={"prose": EvaluatedDomain(novel=False, tokens=1, bytes=1)},
    methods={"seed": MethodResult(perplexity={"prose": 2.0}, bits_per_byte={"prose": 0.1})},
)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """The disk that holds `tmp_path/run`; models to read are beside it, in `tmp_path/models`."""
    (tmp_path / "run").mkdir()
    for number in range(2):
        _model(tmp_path / "models" / f"m{number}", number)
    disk = Disk(tmp_path / "run", monkeypatch)
    yield disk
    disk.close()


def _model(directory: Path, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(size, generator=draw) for name, size in huggingface_shapes(SHAPE).items()}
    specs = {name: TensorSpec.of(tensor) for name, tensor in weights.items()}
    with ShardedWriter(directory, specs, max_shard_bytes=4000) as writer:
        for name, tensor in weights.items():
            writer.write(name, tensor)
    (directory / "config.json").write_text(json.dumps(config_json(SHAPE, dtype="float32", end_of_text=0)))
    (directory / "tokenizer.json").write_text("{}")


def _scores(run: RunDir, models: list[Path]) -> None:
    log_probs = np.zeros(4, dtype=np.float32)
    Scores(log_probs, np.arange(0, 4, 2), "a model", "a text").save(run.scores("math", "prose", "dev"))


def _soups(run: RunDir, models: list[Path]) -> None:
    make_directory(run.model("math"))
    save_card(run.model("math"), "math")
    save_soups(run, {"prose": ("math",)})


def _evaluation(run: RunDir, models: list[Path]) -> None:
    write_page(CONFIG, RESULTS, {}, run.report)
    _soups(run, models)
    RESULTS.save(run.results)
    measured = Measured(key="k", experts=("math",), mean=2.0, perplexity={"prose": 2.0})
    Ablation(measured=(measured,)).save(run.results.with_name("ablation.json"))
    mixture = MeasuredMixture(key="k", weights={"math": 1.0}, losses={"prose": 2.0})
    MixtureRecord(measured=(mixture,)).save(run.mixture)


def _state(run: RunDir, models: list[Path]) -> None:
    engine: Any = SimpleNamespace(model=SimpleNamespace(shape=SHAPE), job=SimpleNamespace(trains="all"))
    for step in (1, 1, 2):  # the second replaces the first
        pieces = [
            (name, Span(0, math.prod(size)), {kind: torch.full((math.prod(size),), float(step)) for kind in KINDS})
            for name, size in huggingface_shapes(SHAPE).items()
        ]
        write_state(engine, run.checkpoints("math"), Position(step, step, ""), pieces)
    assert newest_state(run.checkpoints("math")) is not None


def _training_notes(run: RunDir, models: list[Path]) -> None:
    write_file(run.root / "note", "a small file")
    SkippedBatches(batches={3: "the loss is nan"}).save(run.root / "skipped.json")
    note_silent_failure(run.root / "log", 2)


def _submissions(run: RunDir, models: list[Path]) -> None:
    write_scripts(CONFIG, run)
    Submissions(run.root / "slurm").note(Submitted("prepare", "12", {}, "a-run-prepare"))


def _added_expert(run: RunDir, models: list[Path]) -> None:
    for number in range(2):
        add_expert(CONFIG, run, models[number], f"friend{number}")


def _merged(run: RunDir, models: list[Path]) -> None:
    merging.merge(run.root / "new" / "merged", [(path, 1.0) for path in models], max_shard_bytes=4000)


def _converted(run: RunDir, models: list[Path]) -> None:
    for kind in ("huggingface", "megatron", "deepspeed"):
        convert(models[0], run.root / "converted" / kind, to=kind)


WRITERS: dict[str, Callable[[RunDir, list[Path]], None]] = {
    "run.yaml": lambda run, models: CONFIG.save(run.config),
    "scores": _scores,
    "soups, ablation, mixtures, results and page": _evaluation,
    "training checkpoints": _state,
    "skipped batches and a failure": _training_notes,
    "job scripts and submissions": _submissions,
    "an added expert": _added_expert,
    "a merged model": _merged,
    "converted models": _converted,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_files_with_their_final_names_survive_a_power_cut(
    write: Callable[[RunDir, list[Path]], None], disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btm_scale.forest.membership.same_ids", lambda one, other: True)
    monkeypatch.setattr("btm_scale.forest.membership.Tokenizer.load", lambda path: SimpleNamespace(vocab_size=40))
    write(RunDir(disk.root), sorted((tmp_path / "models").iterdir()))
    _require_durable(disk)


def test_the_tokenizer_the_token_files_and_the_training_index_survive_a_power_cut(disk: Disk, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "prose.jsonl", prose_texts(300))
    values = {
        "text_root": tmp_path,
        "domains": {"prose": PROSE},
        "tokenizer": {"vocab_size": 512, "sample_bytes": 200_000},
        "data": {"workers": 1, "dev": 0.1, "test": 0.1},
        "budget": {"sequence_length": 64, "batch_tokens": 1024, "tokens": 100_000},
    }
    run = RunDir(disk.root)
    prepare(RunConfig.model_validate(values), run)
    _require_durable(disk)
    written = disk.written()
    assert {"data/prose/train.bin", "data/prose/train.idx", "data/prose/fingerprint.json"} <= set(written)
    assert Tokenizer.load(run.tokenizer).vocab_size == 512
    TrainingSamples(run, {"prose": 1.0}, Tokenizer.load(run.tokenizer), sequence_length=64, samples=20, seed=0)
    assert not disk.torn


def _require_durable(disk: Disk) -> None:
    written, durable = disk.written(), disk.durable()
    assert written
    assert not disk.torn
    assert {name: len(content) for name, content in durable.items()} == {
        name: len(content) for name, content in written.items()
    }
    assert durable == written


def test_a_merge_that_is_resumed_after_a_power_cut_has_its_headers(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note that says "resume" must not outlive the headers, which are written only once."""
    begun: list[bool] = []

    def begin(partial: Path, fingerprint: str) -> None:
        begun.extend(disk.is_durable(file) for file in partial.iterdir())

    monkeypatch.setattr(journal, "begin", begin)
    monkeypatch.setattr(journal, "clear", lambda partial: None)
    _merged(RunDir(disk.root), sorted((tmp_path / "models").iterdir()))
    assert begun
    assert all(begun)


def test_a_directory_is_synced_once(disk: Disk) -> None:
    """Every sync is a wait for the disk."""
    run = RunDir(disk.root)
    _state(run, [])
    tensors, marker, itself, parent, new_folders = 1, 1, 1, 1, 3
    assert disk.syncs == 3 * (tensors + marker + itself + parent) + new_folders


def test_a_file_of_a_rank_in_the_folder_of_its_launcher_survives_a_power_cut(disk: Disk) -> None:
    class Room:
        def take(self, command: GroupCommand) -> Start:
            return Start(((sys.executable, "-c", ""),))

        def give_back(self, name: str) -> None:
            pass

    log = disk.root / "train" / "law" / "log"
    run_groups_in(Room(), [GroupCommand("law", 1, ("train",), log)])
    make_directory(log.parent / "checkpoints")
    write_file(log.parent / "checkpoints" / "state.json", "{}")
    assert disk.durable()["train/law/checkpoints/state.json"] == b"{}"


def test_a_file_that_fails_half_way_leaves_the_old_one_and_nothing_else(disk: Disk) -> None:
    write_file(disk.root / "note", "old")

    def half(path: Path) -> None:
        with new_file(path) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half(disk.root / "note")
    assert disk.durable() == {"note": b"old"}
    assert [path.name for path in disk.root.iterdir()] == ["note"]


def test_the_disk_loses_what_was_not_synced(disk: Disk) -> None:
    (disk.root / ".a.partial").write_text("text")
    (disk.root / ".a.partial").replace(disk.root / "a")
    assert disk.written() == {"a": b"text"}
    assert disk.durable() == {}
    assert disk.torn == [str(disk.root / ".a.partial")]


def test_a_new_file_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_file(tmp_path / "note", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "note").stat().st_mode & 0o777 == 0o644
