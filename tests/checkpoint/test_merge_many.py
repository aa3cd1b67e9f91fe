"""Many means of the same models in one pass: the same bytes as separate merges, and resumable."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers.small_models import WEIGHTS, Save

from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.merge import journal, mean_runner, workers
from btm_scale.checkpoint.merge import output as output_files
from btm_scale.checkpoint.merge.merge import merge, merge_many, merge_tensors
from btm_scale.checkpoint.merge.planning import plan_means
from btm_scale.errors import CheckpointError
from btm_scale.util.files import partial_path


def test_merge_many_writes_the_same_bytes_as_separate_merges(models: list[Path], tmp_path: Path) -> None:
    outputs = {
        "all": list(zip(models, WEIGHTS, strict=True)),
        "others": [(models[2], 0.5), (models[0], 0.25)],
        "one": [(models[1], 3.0)],
    }
    reports = merge_many({tmp_path / "many" / name: inputs for name, inputs in outputs.items()})
    for report, (name, inputs) in zip(reports, outputs.items(), strict=True):
        alone = merge(tmp_path / "alone" / name, inputs)
        assert report.content_hash == alone.content_hash
        for record in ("merge_recipe.yaml", "provenance.json"):  # of the verb; a run records an average's parents
            (tmp_path / "alone" / name / record).unlink()
        for file in (tmp_path / "alone" / name).iterdir():
            assert (report.output / file.name).read_bytes() == file.read_bytes()
    assert not list((tmp_path / "many").glob(".*"))


def test_merge_many_reads_every_model_once_for_any_number_of_outputs(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, bytes_read = SafetensorsModel.read_into, []

    def counted(self: SafetensorsModel, name: str, start: int, out: torch.Tensor) -> None:
        bytes_read.append(out.nbytes)
        read(self, name, start, out)

    monkeypatch.setattr(SafetensorsModel, "read_into", counted)

    def bytes_for(outputs: int) -> int:
        bytes_read.clear()
        merge_many(
            {tmp_path / f"{outputs}-{i}": [(model, 1.0 + i) for model in models[i % 2 :]] for i in range(outputs)}
        )
        return sum(bytes_read)

    assert bytes_for(6) == bytes_for(2)


def test_merge_many_gives_the_same_result_in_several_passes(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = [[(model, float(i + k)) for i, model in enumerate(models, start=1)] for k in range(4)]
    one_pass = merge_many({tmp_path / f"one-{k}": inputs for k, inputs in enumerate(outputs)})
    monkeypatch.setattr(output_files, "_SHARDS_AT_ONCE", 2)
    passes = merge_many({tmp_path / f"pass-{k}": inputs for k, inputs in enumerate(outputs)})
    assert [report.content_hash for report in passes] == [report.content_hash for report in one_pass]


def test_merge_many_rejects_incompatible_models_before_writing(models: list[Path], save: Save, tmp_path: Path) -> None:
    unlike = save("unlike", {"other": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="has no tensor 'other'"):
        merge_many({tmp_path / "a": [(models[0], 1.0)], tmp_path / "b": [(models[1], 1.0), (unlike, 1.0)]})
    assert not list(tmp_path.glob("[ab]"))
    assert not list(tmp_path.glob(".*"))


def test_merge_many_checks_the_free_space_for_all_outputs(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = merge(tmp_path / "one", [(model, 1.0) for model in models]).bytes_written
    usage = shutil.disk_usage(tmp_path)._replace(free=3 * size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    outputs = {tmp_path / f"out-{k}": [(model, 1.0 + k) for model in models] for k in range(4)}
    with pytest.raises(CheckpointError, match="GB free"):
        merge_many(outputs)
    assert not list(tmp_path.glob(".out*"))
    assert merge_many({}) == []


def test_an_interrupted_merge_many_resumes_with_the_remaining_units(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = {tmp_path / f"out-{k}": [(model, 1.0 + k) for model in models] for k in range(3)}
    expected = [merge(tmp_path / f"alone-{k}", inputs).content_hash for k, inputs in enumerate(outputs.values())]
    monkeypatch.setattr(workers, "_NOTE_EVERY", 1)
    monkeypatch.setattr(workers, "MOST", 1)
    run, ran = mean_runner.MeansRunner.__call__, []

    def stops_after(most: int) -> None:
        def limited(self: mean_runner.MeansRunner, unit: object) -> object:
            if len(ran) == most:
                raise KeyboardInterrupt
            ran.append(unit)
            return run(self, unit)  # type: ignore[arg-type]

        monkeypatch.setattr(mean_runner.MeansRunner, "__call__", limited)

    stops_after(2)
    with pytest.raises(KeyboardInterrupt):
        merge_many(outputs)
    noted = [set(journal.finished(partial_path(output))) for output in outputs]
    assert noted[0]
    assert noted[0] == noted[1] == noted[2]
    ran.clear()
    stops_after(100)
    assert [report.content_hash for report in merge_many(outputs)] == expected
    assert len(noted[0]) + len(ran) == 5
    assert not noted[0] & set(ran)


def test_a_plan_is_pickled_without_its_cached_units(models: list[Path]) -> None:
    """Otherwise a pool's thread would pickle a dictionary while it changes."""
    (plan,) = plan_means([[(model, 1.0) for model in models]], max_shard_bytes=5e9)
    before = pickle.dumps(plan)
    assert plan.units
    assert pickle.dumps(plan) == before
    assert pickle.loads(before).units == plan.units


def test_merge_tensors_writes_only_the_given_tensors_with_the_same_values(models: list[Path], tmp_path: Path) -> None:
    inputs = list(zip(models, WEIGHTS, strict=True))
    (models[1] / "tokenizer.json").write_text("{}")
    (models[2] / "tokenizer.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json differs"):
        merge(tmp_path / "all", inputs, dtype="float32")
    subset = ["model.embed_tokens.weight", "model.norm.weight"]
    merge_tensors(tmp_path / "subset", inputs, subset, dtype="float32")
    assert [path.name for path in (tmp_path / "subset").iterdir()] == ["model.safetensors"]
    (models[2] / "tokenizer.json").unlink()
    merge(tmp_path / "all", inputs, dtype="float32")
    with SafetensorsModel(tmp_path / "subset") as actual, SafetensorsModel(tmp_path / "all") as expected:
        assert actual.names == tuple(subset)
        for name in subset:
            assert torch.equal(actual.read(name), expected.read(name))
    with pytest.raises(CheckpointError, match=r"has no tensor 'model\.head'"):
        merge_tensors(tmp_path / "none", inputs, [*subset, "model.head"])
    assert not list(tmp_path.glob(".*"))
