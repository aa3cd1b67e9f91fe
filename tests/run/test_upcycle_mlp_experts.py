"""`btm-scale upcycle` of experts that trained their MLPs alone, and have their parent's bits in everything else."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.upcycling import WEIGHTS, Run, change, files_of, unscored
from safetensors.torch import load_file

from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.hashing import hash_and_keep
from btm_scale.errors import ForestError
from btm_scale.forest import shared_tensors
from btm_scale.forest.expert import CARD, read_expert
from btm_scale.run.mixture_recipe import Recipe
from btm_scale.run.upcycle import upcycle
from btm_scale.run_dir import MOE, RunDir


@pytest.fixture
def run(handmade: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return unscored(handmade, tmp_path, monkeypatch)


EXPERTS = ("cpp", "docs", "licences", "python")


def as_mlp_experts(run: RunDir, *, parent: str = "seed", recorded: bool = False) -> dict[str, torch.Tensor]:
    """Give the experts all but their MLPs of their parent, as if only these had been trained; return the parent's.

    `recorded`: their cards have the parent's hash, as those of this version do.
    """
    hashes = {parent: read_expert(run.model(parent)).content_hash} if recorded else {}
    shared = load_file(run.model(parent) / WEIGHTS)
    for name in EXPERTS:
        directory = run.model(name)
        own = {key: tensor for key, tensor in load_file(directory / WEIGHTS).items() if ".mlp." in key}
        change(directory, shared | own)
        read_expert(directory).model_copy(update={"trains": "mlp", "parent_hashes": hashes}).save(directory / CARD)
    return shared


def test_experts_that_trained_their_mlps_share_the_parents_bits_and_can_be_left_out_exactly(run: Run) -> None:
    parent = as_mlp_experts(run[1])
    directory = run[1].model(MOE)
    upcycle(*run, Recipe())
    complete = load_file(directory / WEIGHTS)
    for name, tensor in parent.items():
        assert ".mlp." in name or torch.equal(complete[name], tensor), name
    upcycle(*run, Recipe(without=("cpp",)))
    without = load_file(directory / WEIGHTS)
    for name, tensor in without.items():
        place = re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", name)
        before = name if place is None else f"{place[1]}{int(place[2]) + 1}{place[3]}"  # cpp was the first
        assert ".gate." in name or torch.equal(tensor, complete[before]), name


def with_other_norm(run: RunDir, name: str, more: float = 1) -> None:
    """Change a tensor of a model that is not of an MLP."""
    weights = load_file(run.model(name) / WEIGHTS)
    change(run.model(name), weights | {"model.norm.weight": weights["model.norm.weight"] + more})


@pytest.mark.parametrize("others", ["have kept hashes", "are read"])
def test_experts_with_kept_hashes_are_compared_by_them(run: Run, others: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_mlp_experts(run[1], recorded=True)
    names = ("seed", "cpp", "docs") if others == "are read" else ("seed", *EXPERTS)
    for name in names:
        hash_and_keep(run[1].model(name))
    read: set[str] = set()
    read_into = SafetensorsModel.read_bytes_into

    def recorded(model: SafetensorsModel, *arguments: Any) -> None:
        read.add(model.path.name)
        read_into(model, *arguments)

    monkeypatch.setattr(SafetensorsModel, "read_bytes_into", recorded)

    def compare() -> bool:
        return shared_tensors.share_the_rest(run[1], {name: read_expert(run[1].model(name)) for name in EXPERTS})

    assert compare()
    assert read == ({"seed", "licences", "python"} if others == "are read" else set())

    with_other_norm(run[1], "docs")
    hash_and_keep(run[1].model("docs"))
    read.clear()
    with pytest.raises(ForestError, match=r"'docs' was trained with train: mlp, but 'model\.norm\.weight' differs"):
        compare()
    assert "docs" not in read


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("parent_is_there", [True, False])
def test_an_expert_that_does_not_share_what_its_card_claims_is_refused(
    run: Run, parent_is_there: bool, recorded: bool
) -> None:
    as_mlp_experts(run[1], recorded=recorded)
    with_other_norm(run[1], "docs")
    if not parent_is_there:
        shutil.rmtree(run[1].model("seed"))
    before = files_of(run[1].root)
    other = "its parent 'seed'" if parent_is_there else "an expert of the same parents, 'cpp'"
    message = f"'docs' was trained with train: mlp, but 'model.norm.weight' differs from that of {other}"
    with pytest.raises(ForestError, match=message):
        upcycle(*run, Recipe())
    assert files_of(run[1].root) == before
    assert not upcycle(*run, Recipe(without=("docs",))).is_complete


def test_an_expert_of_another_run_whose_parents_are_unknown_is_averaged(run: Run) -> None:
    as_mlp_experts(run[1])
    directory = run[1].model("cpp")
    read_expert(directory).model_copy(update={"parents": ()}).save(directory / CARD)
    assert not upcycle(*run, Recipe(router="random")).is_complete
    assert not upcycle(*run, Recipe(router="random", without=("docs", "licences"))).is_complete


@pytest.mark.parametrize("recorded", [True, False])
def test_experts_whose_parent_was_trained_further_share_its_former_bits(run: Run, recorded: bool) -> None:
    shared = as_mlp_experts(run[1], recorded=recorded)
    with_other_norm(run[1], "seed")
    upcycle(*run, Recipe(router="random"))
    assert torch.equal(load_file(run[1].model(MOE) / WEIGHTS)["model.norm.weight"], shared["model.norm.weight"])
    with_other_norm(run[1], "docs", more=2)
    with pytest.raises(ForestError, match=r"'docs' .* differs from that of an expert of the same parents, 'cpp'"):
        upcycle(*run, Recipe(router="random"))


def test_all_experts_that_differ_from_the_parent_that_they_record_are_refused(run: Run) -> None:
    as_mlp_experts(run[1], recorded=True)
    for name in EXPERTS:
        with_other_norm(run[1], name)
    with pytest.raises(ForestError, match=r"differs from that of its parent 'seed'"):
        upcycle(*run, Recipe(router="random"))


def test_experts_of_a_parent_before_and_after_it_was_trained_further_are_averaged(run: Run) -> None:
    as_mlp_experts(run[1], recorded=True)
    directory = run[1].model("docs")
    former = read_expert(directory).model_copy(update={"parent_hashes": {"seed": "former"}})
    with_other_norm(run[1], "docs")
    former.model_copy(update={"content_hash": read_expert(directory).content_hash}).save(directory / CARD)
    assert not upcycle(*run, Recipe(router="random")).is_complete


def test_what_an_expert_shares_does_not_matter_beside_one_that_was_trained_completely(run: Run) -> None:
    as_mlp_experts(run[1], recorded=True)
    with_other_norm(run[1], "docs")
    directory = run[1].model("cpp")
    read_expert(directory).model_copy(update={"trains": "all"}).save(directory / CARD)
    assert not upcycle(*run, Recipe(router="random")).is_complete
