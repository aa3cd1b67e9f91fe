"""Hashes that are kept beside weights: when they count, and merges that take them over for what they copy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_models import HUGGINGFACE_SIZES
from safetensors.torch import load_file, save_file

from btm_scale.checkpoint import hashing
from btm_scale.checkpoint.formats.kept_hashes import NAME
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.formats.wrapped import RenamedModel
from btm_scale.checkpoint.hashing import content_hash, hash_and_keep
from btm_scale.checkpoint.merge import numpy_runner, plan, planning, runner, workers
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.checkpoint.merge.moe import Ingredients

WEIGHTS = "model.safetensors"
NAMES = ("a", "b", "c")
SIZES: dict[str, Any] = HUGGINGFACE_SIZES | {"model_type": "llama", "max_position_embeddings": 32}


@pytest.fixture
def models(tmp_path: Path) -> list[tuple[Path, float]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES), dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)
    return [(tmp_path / name, 1.0) for name in NAMES]


def kept(directory: Path) -> dict[str, Any]:
    with SafetensorsModel(directory) as model:
        return {name: hashes for name in model.names if (hashes := model.kept_hashes(name)) is not None}


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the small tensors have several blocks, the last of which is short."""
    for module in (hashing, plan, runner):
        monkeypatch.setattr(module, "BLOCK_BYTES", 96)


@pytest.mark.parametrize("max_shard_bytes", [float("inf"), 2e4])
def test_the_hashes_of_all_blocks_are_kept_with_any_sharding(
    models: list[tuple[Path, float]], max_shard_bytes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)
    merge(tmp_path / "model", models, max_shard_bytes=max_shard_bytes)
    assert kept(tmp_path / "model") == {}
    assert hash_and_keep(tmp_path / "model") == content_hash(tmp_path / "model")
    found = kept(tmp_path / "model")
    with SafetensorsModel(tmp_path / "model") as model:
        assert (len(model.files) > 1) == (max_shard_bytes < 1e9)
        assert hashing.combined_hash(model.specs(), found) == content_hash(tmp_path / "model")
        renamed = RenamedModel(model, {f"new.{name}": name for name in model.names})
        assert {name: renamed.kept_hashes(f"new.{name}") for name in model.names} == found
    assert max(map(len, found.values())) > 2


def copy_whole(model: Path) -> None:
    shutil.copytree(model, model.with_name("copy"))
    shutil.rmtree(model)
    model.with_name("copy").rename(model)


def restore_times(model: Path) -> None:
    """Change a bit, and give the file its size and its time of modification back."""
    file = model / WEIGHTS
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read()
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last[0] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def edit(model: Path) -> None:
    text = (model / NAME).read_text()
    first = next(iter(kept(model).values()))[0]
    (model / NAME).write_text(text.replace(first, "0" * 64))


def put_a_pipe(model: Path) -> None:
    (model / NAME).unlink()
    os.mkfifo(model / NAME)


CHANGES: dict[str, Callable[[Path], object]] = {
    "touched": lambda model: (model / WEIGHTS).touch(),
    "copied": copy_whole,
    "written to, with its former times": restore_times,
    "replaced": lambda model: save_file(load_file(model / WEIGHTS), model / WEIGHTS, {"format": "pt"}),
    "edited": edit,
    "truncated": lambda model: os.truncate(model / NAME, 100),
    "another schema": lambda model: (model / NAME).write_text(json.dumps({"schema": 9})),
    "no object": lambda model: (model / NAME).write_text("[]"),
    "a folder": lambda model: ((model / NAME).unlink(), (model / NAME).mkdir()),
    "a pipe": put_a_pipe,
}


@pytest.mark.parametrize("change", CHANGES)
def test_hashes_of_other_files_or_damaged_ones_do_not_count(models: list[tuple[Path, float]], change: str) -> None:
    directory = models[0][0]
    hash_and_keep(directory)
    assert kept(directory)
    CHANGES[change](directory)
    assert kept(directory) == {}


def test_the_hashes_of_a_directory_are_not_those_of_a_file_in_it(models: list[tuple[Path, float]]) -> None:
    hash_and_keep(models[0][0])
    with SafetensorsModel(models[0][0] / WEIGHTS) as model:
        assert model.kept_hashes(model.names[0]) is None


def test_hashes_of_files_that_change_while_they_are_hashed_do_not_count(
    models: list[tuple[Path, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = models[0][0]
    compute = hashing._blocks

    def changed_after(model: SafetensorsModel) -> dict[str, list[str]]:
        blocks = compute(model)
        restore_times(directory)
        return blocks

    monkeypatch.setattr(hashing, "_blocks", changed_after)
    hash_and_keep(directory)
    assert kept(directory) == {}


def test_shards_of_one_name_in_different_folders_are_different_files(models: list[tuple[Path, float]]) -> None:
    directory = models[0][0]
    weights = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    places = {}
    for number, name in enumerate(weights):
        places[name] = f"{'ab'[number % 2]}/shard.safetensors"
    for folder in "ab":
        (directory / folder).mkdir()
        own = {name: tensor for name, tensor in weights.items() if places[name].startswith(folder)}
        save_file(own, directory / folder / "shard.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    hash_and_keep(directory)
    assert kept(directory).keys() == weights.keys()
    (directory / "a" / "shard.safetensors").touch()
    assert kept(directory) == {}


def test_kept_hashes_may_be_removed_while_a_merge_reads_and_before_it_resumes(
    models: list[tuple[Path, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory, _ in models:
        hash_and_keep(directory)
    before = planning._files_hash(models[0][0])
    merge_all = workers.merge_in_processes

    def removed_meanwhile(*arguments: Any, **options: Any) -> None:
        (models[0][0] / NAME).unlink()
        merge_all(*arguments, **options)

    monkeypatch.setattr("btm_scale.checkpoint.merge.merge.merge_in_processes", removed_meanwhile)
    report = merge(tmp_path / "out", models, method="moe", ingredients=Ingredients(NAMES))
    assert report.content_hash == content_hash(tmp_path / "out")
    assert planning._files_hash(models[0][0]) == before


@pytest.mark.parametrize("by", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_mixture_takes_over_the_hashes_of_what_it_copies(
    models: list[tuple[Path, float]], dtype: str | None, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)
    monkeypatch.setattr(workers, "torch_is_loaded", lambda: by == "torch")
    hashed: list[int] = []

    class Counted(hashing.BlockHashes):
        def update(self, piece: torch.Tensor | memoryview) -> None:
            hashed.append(len(hashing.as_bytes(piece)))
            super().update(piece)

    for module in (runner, numpy_runner):
        monkeypatch.setattr(module, "BlockHashes", Counted)

    def made(output: str) -> tuple[str, int]:
        hashed.clear()
        options: dict[str, Any] = {"method": "moe", "dtype": dtype, "ingredients": Ingredients(NAMES)}
        return merge(tmp_path / output, models, **options).content_hash, sum(hashed)

    expected, everything = made("without")
    for directory, _ in models:
        hash_and_keep(directory)
    found, rest = made("with")
    assert (tmp_path / "with" / WEIGHTS).read_bytes() == (tmp_path / "without" / WEIGHTS).read_bytes()
    assert found == expected == content_hash(tmp_path / "with")
    with SafetensorsModel(tmp_path / "with") as mixture:
        specs = mixture.specs()
    copied = sum(spec.nbytes for name, spec in specs.items() if ".experts." in name)
    assert everything == sum(spec.nbytes for spec in specs.values())
    assert everything - rest == (0 if dtype else copied), "numbers in another dtype are other bytes"


def test_the_hash_of_a_part_of_a_block_is_not_that_of_the_block(
    models: list[tuple[Path, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)
    hash_and_keep(models[0][0])
    with SafetensorsModel(models[0][0]) as model:
        name = max(model.names, key=lambda name: model.spec(name).elements)
        planned = plan.MergePlan(
            (plan.Source(models[0][0], 1.0, "", ""),), None, "linear", {"normalize": 1.0}, model.specs(), 1e9, 0, 0
        )
        target = runner.Target(planned, [model], None, None)  # type: ignore[arg-type]
        block = 96 // model.spec(name).itemsize
        hashes = model.kept_hashes(name)
        assert hashes is not None
        units = [(0, block), (block, 2 * block), (0, 2 * block), (1, block + 1), (block, 2 * block - 1)]
        found = [runner.kept_hash(target, plan.Unit(name, *unit)) for unit in units]
        assert found == [hashes[0], hashes[1], None, None, None]
