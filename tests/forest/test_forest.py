from __future__ import annotations

import errno
import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from helpers.complete_models import complete_weights, quantize, write_model
from helpers.tiny_run import save_card
from safetensors.torch import load_file, save_file

from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.hashing import combined_hash, hash_and_keep
from btm_scale.config.run import RunConfig
from btm_scale.errors import CheckpointError, ForestError, UserError
from btm_scale.forest.expert import Parent, read_expert
from btm_scale.forest.forest import ancestors, experts, lineage
from btm_scale.forest.membership import Added, add_expert, adding, remove_expert
from btm_scale.run_dir import SEED, RunDir

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def model(folder: Path, *, vocabulary: int = 300, tokenizer: bytes = b"{}", weight: float = 1.0) -> Path:
    """Write a complete Hugging Face model whose weights are all the same."""
    config = LLAMA | {"vocab_size": vocabulary}
    weights = {name: torch.full_like(tensor, weight) for name, tensor in complete_weights(0, config).items()}
    write_model(folder, weights, config)
    (folder / "vocab.json").write_bytes(tokenizer)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run with a tokenizer of 300 ids and no expert."""
    run = RunDir(tmp_path / "run")
    model(run.tokenizer)

    class Ids:
        vocab_size = 300

    monkeypatch.setattr("btm_scale.forest.membership.Tokenizer.load", lambda directory: Ids())
    return run


@pytest.fixture
def config() -> RunConfig:
    return RunConfig.model_validate({"domains": {"math": {"text": "math"}}})


def test_an_added_model_is_an_expert_with_its_own_card(run: RunDir, config: RunConfig, tmp_path: Path) -> None:
    source = model(tmp_path / "friend")
    save_card(source, "theirs", domains={"law": 1.0}, parents=(Parent("seed", 1.0),), tokens=5)
    card = add_expert(config, run, source, "friend")
    assert experts(run) == {"friend": card}
    # Its parents were another run's.
    assert (card.name, card.domains, card.parents, card.tokens) == ("friend", {"law": 1.0}, (), 5)
    assert len(card.content_hash) == 64


@pytest.mark.parametrize("source_has_hashes", [False, True])
def test_an_added_model_keeps_the_hashes_of_its_own_files(
    source_has_hashes: bool, run: RunDir, config: RunConfig, tmp_path: Path
) -> None:
    source = model(tmp_path / "friend")
    if source_has_hashes:
        hash_and_keep(source)
    card = add_expert(config, run, source, "friend")
    with SafetensorsModel(run.model("friend")) as added:
        hashes = {name: added.kept_hashes(name) or [] for name in added.names}
        assert combined_hash(added.specs(), hashes) == card.content_hash


def test_an_adapter_is_added_as_a_complete_model(run: RunDir, config: RunConfig, tmp_path: Path) -> None:
    base, adapter = model(tmp_path / "base"), tmp_path / "adapter"
    name = "model.layers.0.self_attn.q_proj"
    weights = load_file(base / "model.safetensors")
    save_file(weights | {f"{name}.weight": torch.ones(16, 16)}, base / "model.safetensors")
    adapter.mkdir()
    matrices = {"lora_A": torch.full((1, 16), 2.0), "lora_B": torch.full((16, 1), 3.0)}
    save_file(
        {f"base_model.model.{name}.{part}.weight": matrix for part, matrix in matrices.items()},
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    card = add_expert(config, run, adapter, "friend")
    assert load_file(run.model("friend") / "model.safetensors")[f"{name}.weight"].unique().tolist() == [13.0]
    assert not (run.model("friend") / "adapter_config.json").exists()
    # The same adapter again changes nothing, and nothing is left beside the experts.
    with adding(config, run, adapter, "friend") as added:
        assert (added.card, added.is_complete) == (card, True)
    assert not list(run.root.glob(".adapter*"))
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "a/model"}))
    with pytest.raises(ForestError, match=r"adapter of 'a/model'.*btm-scale convert .* --base DIR"):
        add_expert(config, run, adapter, "other")
    assert set(experts(run)) == {"friend"}


def test_an_expert_that_cannot_be_mixed_is_rejected_with_the_reason(
    run: RunDir, config: RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(ForestError, match="different tokenizer"):
        add_expert(config, run, model(tmp_path / "a", tokenizer=b"{ }"), "a")
    with pytest.raises(ForestError, match="vocabulary of 200, but the run's tokenizer needs 300"):
        add_expert(config, run, model(tmp_path / "b", vocabulary=200), "b")
    with pytest.raises(ForestError, match=r"has no config\.json"):
        add_expert(config, run, tmp_path, "c")
    (tmp_path / "b" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        add_expert(config, run, tmp_path / "b", "b")
    assert experts(run) == {}
    assert not run.experts.is_dir() or not list(run.experts.iterdir())


def test_a_model_that_lacks_weights_or_is_quantized_is_not_added(
    run: RunDir, config: RunConfig, tmp_path: Path
) -> None:
    settings = LLAMA | {"vocab_size": 300}
    weights = complete_weights(0, settings)
    stored, _ = quantize(weights, None)
    del weights["model.layers.0.mlp.up_proj.weight"]
    for name, tensors, message in (
        ("incomplete", weights, r"lacks the tensor 'model\.layers\.0\.mlp\.up_proj\.weight'"),
        ("quantized", stored, r"is quantized\. .*btm-scale convert .*quantized DST --to huggingface"),
    ):
        source = write_model(tmp_path / name, tensors, settings)
        (source / "vocab.json").write_bytes(b"{}")
        with pytest.raises(UserError, match=message):
            add_expert(config, run, source, name)
    assert not run.experts.is_dir() or not list(run.experts.iterdir())


def test_a_model_of_several_modalities_is_not_added(run: RunDir, config: RunConfig, tmp_path: Path) -> None:
    source = model(tmp_path / "friend")
    (source / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": LLAMA | {"vocab_size": 300}}))
    with pytest.raises(ForestError, match=r"is of type 'llava', for which transformers has no causal LM\."):
        add_expert(config, run, source, "friend")
    assert not run.experts.is_dir() or not list(run.experts.iterdir())


def test_a_model_is_scored_before_it_is_an_expert_and_an_error_leaves_the_forest_as_it_was(
    run: RunDir, config: RunConfig, tmp_path: Path
) -> None:
    source = model(tmp_path / "friend")
    before = add_expert(config, run, model(tmp_path / "first", weight=2.0), "first")

    def score(aside: str) -> None:
        assert experts(run) == {"first": before}
        assert read_expert(run.model(aside)).name == "friend"
        run.scores(aside, "math", "dev").parent.mkdir(parents=True)
        run.scores(aside, "math", "dev").write_text("scores")

    def fail(aside: str) -> None:
        score(aside)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), adding(config, run, source, "friend", fail):
        pass
    assert [path.name for path in run.experts.iterdir()] == ["first"]
    assert not list(run.model_scores("x").parent.iterdir())

    with adding(config, run, source, "friend", score) as added:
        assert added.card.name == "friend"
    assert [path.name for path in sorted(run.experts.iterdir())] == ["first", "friend"]
    assert run.scores("friend", "math", "dev").read_text() == "scores"
    assert [path.name for path in run.model_scores("x").parent.iterdir()] == ["friend"]


def test_a_path_that_does_not_exist_or_a_run_folder_is_not_added(
    run: RunDir, config: RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(ForestError, match="friend does not exist"):
        add_expert(config, run, tmp_path / "friend", "friend")
    other = RunDir(tmp_path / "other")
    model(other.model("law"))
    other.config.write_text("{}")
    with pytest.raises(
        ForestError, match=f"is a run folder, not a model. Give the folder of a model: {other.experts}/law"
    ):
        add_expert(config, run, other.root, "friend")


def test_a_name_in_use_is_rejected(run: RunDir, config: RunConfig, tmp_path: Path) -> None:
    add_expert(config, run, model(tmp_path / "friend"), "friend")
    with pytest.raises(ForestError, match=r"already has an expert 'friend' with other weights or a different config"):
        add_expert(config, run, model(tmp_path / "other", weight=2.0), "friend")
    with pytest.raises(ForestError, match=r"'math' is already an expert that .* trains"):
        add_expert(config, run, model(tmp_path / "third"), "math")


def test_the_same_model_under_the_same_name_is_already_complete(run: RunDir, config: RunConfig, tmp_path: Path) -> None:
    source = model(tmp_path / "friend")
    card = add_expert(config, run, source, "friend")
    before = {path: path.stat().st_mtime_ns for path in run.model("friend").iterdir()}
    with adding(config, run, source, "friend") as added:
        assert added == Added(card, is_complete=True)
    assert {path: path.stat().st_mtime_ns for path in run.model("friend").iterdir()} == before


def test_an_expert_that_cannot_be_removed_stays_complete(run: RunDir, config: RunConfig, tmp_path: Path) -> None:
    add_expert(config, run, model(tmp_path / "friend"), "friend")
    for folder in (run.train("friend"), run.model_scores("friend")):
        folder.mkdir(parents=True)
    before = sorted(run.root.rglob("*"))
    renamed, rename = [], Path.rename

    def fails_at_the_last(self: Path, target: Path) -> Path:
        renamed.append(self)
        if self == run.train("friend"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", fails_at_the_last)
        with pytest.raises(ForestError, match=r"Cannot remove .*train/friend: Permission denied\. Nothing was removed"):
            remove_expert(run, "friend")
    assert len(renamed) > 2
    assert sorted(run.root.rglob("*")) == before


def test_a_file_that_cannot_be_deleted_is_reported_and_deleted_by_the_next_removal(
    run: RunDir, config: RunConfig, tmp_path: Path
) -> None:
    for name in ("friend", "other"):
        add_expert(config, run, model(tmp_path / name), name)

    def fails(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path / "model.safetensors"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", fails)
        with pytest.raises(
            ForestError, match=r"Cannot delete .*model\.safetensors: Input/output error\. It is no longer"
        ):
            remove_expert(run, "friend")
    assert list(experts(run)) == ["other"]
    remove_expert(run, "other")
    assert list(run.experts.iterdir()) == []


@pytest.mark.parametrize("name", [".hidden", "a/b", "..", "my model", "dense-2x", "average", "random", "score"])
def test_an_invalid_or_reserved_name_is_rejected(run: RunDir, config: RunConfig, tmp_path: Path, name: str) -> None:
    with pytest.raises(ForestError, match=rf"'{name}' .* \(--name\)"):
        add_expert(config, run, model(tmp_path / "friend"), name)
    assert not run.experts.exists()


def _add_many(run: RunDir, prefix: str, source: Path, errors: multiprocessing.Queue[str]) -> None:
    config = RunConfig.model_validate({"domains": {"math": {"text": "math"}}})
    for number in range(20):
        add_expert(config, run, source, f"{prefix}{number}")
        try:
            add_expert(config, run, source, f"both{number}")
        except ForestError as error:
            errors.put(str(error))


def test_two_processes_can_add_experts_concurrently(run: RunDir, tmp_path: Path) -> None:
    sources = {"a": model(tmp_path / "friend"), "b": model(tmp_path / "other", weight=2.0)}
    context = multiprocessing.get_context("fork")
    errors: multiprocessing.Queue[str] = context.Queue()
    jobs = [context.Process(target=_add_many, args=(run, *one, errors)) for one in sources.items()]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    expected = {f"{prefix}{number}" for prefix in ("a", "b", "both") for number in range(20)}
    assert set(experts(run)) == expected
    # Exactly one process got each name that both wanted.
    assert len([errors.get(timeout=5) for _ in range(20)]) == 20
    assert {path.name for path in run.experts.iterdir()} == expected


def test_removing_an_expert_deletes_only_its_own_scores_and_checkpoints(
    run: RunDir, config: RunConfig, tmp_path: Path
) -> None:
    source = model(tmp_path / "friend")
    for name in ("one", "other"):
        add_expert(config, run, source, name)
        run.checkpoints(name).mkdir(parents=True)
        run.model_scores(name).mkdir(parents=True)
    remove_expert(run, "one")
    assert list(experts(run)) == ["other"]
    assert not run.train("one").exists()
    assert not run.model_scores("one").exists()
    assert run.train("other").exists()
    with pytest.raises(ForestError, match=r"Unknown expert 'one'\. Choose one of other\."):
        remove_expert(run, "one")


def test_lineage_reaches_the_seed_and_includes_removed_parents(run: RunDir) -> None:
    for name, parents in {SEED: (), "a": ((SEED, 1.0),), "b": (("a", 0.5), ("gone", 0.5))}.items():
        save_card(run.model(name), name, parents=tuple(Parent(*parent) for parent in parents))
    family = lineage(run)
    assert list(family) == [SEED, "a", "gone", "b"]
    assert family["b"] == {"a": 0.5, "gone": 0.5}
    assert ancestors(run, "b") == {SEED, "a", "b"}


def test_a_card_that_is_not_an_object_is_an_error(run: RunDir) -> None:
    run.model("a").mkdir(parents=True)
    (run.model("a") / "expert.json").write_text("[]")
    with pytest.raises(ForestError, match=r"expert\.json is a JSON list, and must be an object"):
        experts(run)


def test_removing_a_linked_expert_removes_the_link_and_not_what_it_leads_to(
    run: RunDir, config: RunConfig, tmp_path: Path
) -> None:
    add_expert(config, run, model(tmp_path / "friend"), "friend")
    elsewhere = tmp_path / "elsewhere"
    run.model("friend").rename(elsewhere)
    run.model("friend").symlink_to(elsewhere)
    files = sorted(elsewhere.iterdir())
    remove_expert(run, "friend")
    assert not run.model("friend").is_symlink()
    assert sorted(elsewhere.iterdir()) == files


def test_a_model_with_a_link_to_another_users_file_is_not_added(run: RunDir, config: RunConfig, tmp_path: Path) -> None:
    source = model(tmp_path / "friend")
    (tmp_path / "secret").write_text("of another")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside of the model directory"):
        add_expert(config, run, source, "friend")
    assert experts(run) == {}
