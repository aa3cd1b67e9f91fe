"""A model whose LM head is tied to its embedding is merged with one whose head is not, if that is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.complete_models import LLAMA, complete_weights, write_model
from helpers.small_tokenizers import as_text, bpe
from safetensors.torch import load_file

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.merge.merge import merge, merge_by_recipe
from btm_scale.errors import CheckpointError

TIED = LLAMA | {"tie_word_embeddings": True}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A tied model, and one with an LM head."""
    tied = write_model(tmp_path / "tied", complete_weights(0, TIED), TIED)
    return tied, write_model(tmp_path / "untied", complete_weights(1))


def test_the_difference_is_one_problem_with_a_remedy_that_works(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for order in (pair, pair[::-1]):
        with pytest.raises(CheckpointError) as raised:
            merge(tmp_path / "out", [(path, 1) for path in order])
        _, *problems = str(raised.value).splitlines()
        assert len(problems) == 1
        assert (
            f"The LM head of {pair[0]} is the embedding (tie_word_embeddings in config.json), and that" in problems[0]
        )
        assert "Add --allow tie_word_embeddings" in problems[0]
    merge(tmp_path / "out", [(path, 1) for path in pair], allow=["tie_word_embeddings"])


def test_a_tied_model_contributes_its_embedding_to_the_head(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for name, order in (("ab", pair), ("ba", pair[::-1])):
        weights = {pair[0]: 0.25, pair[1]: 0.75}
        merge(
            tmp_path / name, [(path, weights[path]) for path in order], dtype="float32", allow=["tie_word_embeddings"]
        )
        assert json.loads((tmp_path / name / "config.json").read_text()).get("tie_word_embeddings", False) is False
    one, other = (load_file(path / "model.safetensors") for path in pair)
    merged = load_file(tmp_path / "ab/model.safetensors")
    assert merged.keys() == other.keys()
    for name, tensor in merged.items():
        mine = one.get(name, one[EMBEDDING])
        assert tensor.equal((0.25 * mine.double() + 0.75 * other[name].double()).float()), name
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("ab", "ba")]
    assert files[0] == files[1]


def test_the_recipe_of_such_a_merge_repeats_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    merge(tmp_path / "out", [(path, 1) for path in pair], allow=["tie_word_embeddings"])
    merge_by_recipe(tmp_path / "again", tmp_path / "out/merge_recipe.yaml")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_head_that_a_tied_config_hides_is_merged_with_an_embedding(pair: tuple[Path, Path], tmp_path: Path) -> None:
    hidden = write_model(tmp_path / "hidden", complete_weights(2), TIED)
    models = [(pair[0], 1.0), (hidden, 1.0)]
    with pytest.raises(CheckpointError, match=f"that of {hidden} is a separate weight"):
        merge(tmp_path / "out", models)
    merge(tmp_path / "out", models, allow=["tie_word_embeddings"], dtype="float32")
    merged = load_file(tmp_path / "out/model.safetensors")
    one, other = (load_file(path / "model.safetensors") for path, _ in models)
    assert merged[HEAD].equal((one[EMBEDDING].float() + other[HEAD].float()) / 2)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    convert(tmp_path / "out", tmp_path / "megatron", to="megatron")


@pytest.mark.parametrize("head", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_copy_of_the_embedding_is_no_head_of_a_vision_language_model_either(head: str, tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "vision_config": {}, "text_config": {"model_type": "gemma3_text"}}
    weights = {
        "language_model.model.embed_tokens.weight": torch.rand(5, 4),
        "language_model.model.norm.weight": torch.rand(4),
    }
    plain = write_model(tmp_path / "plain", weights, config)
    fused = write_model(
        tmp_path / "fused", weights | {head: weights["language_model.model.embed_tokens.weight"].clone()}, config
    )
    merge(tmp_path / "out", [(fused, 1), (plain, 1)])
    assert load_file(tmp_path / "out/model.safetensors").keys() == weights.keys()
    other = write_model(tmp_path / "other", weights | {head: torch.rand(5, 4)}, config)
    convert(other, tmp_path / "kept", to="huggingface", verify=True)
    assert head in load_file(tmp_path / "kept/model.safetensors")
    written = json.loads((tmp_path / "kept/config.json").read_text())
    assert written["tie_word_embeddings"] is written["text_config"]["tie_word_embeddings"] is False


def test_rows_of_a_tied_model_are_matched_by_token_in_the_head_too(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tokens = [chr(33 + i) for i in range(65)]
    (pair[0] / "tokenizer.json").write_text(as_text(bpe(tokens)))
    (pair[1] / "tokenizer.json").write_text(as_text(bpe([tokens[1], tokens[0], *tokens[2:64], "new"])))
    merge(
        tmp_path / "out",
        [(path, 1) for path in pair],
        tokenizer="union",
        allow=["tie_word_embeddings"],
        dtype="float32",
    )
    merged = load_file(tmp_path / "out/model.safetensors")
    one, other = (load_file(path / "model.safetensors") for path in pair)
    ids = json.loads((tmp_path / "out/tokenizer.json").read_text())["model"]["vocab"]
    assert merged[HEAD].shape == merged[EMBEDDING].shape == (66, 32)
    swapped = (one[EMBEDDING][ids[tokens[0]]].float() + other[HEAD][1].float()) / 2
    assert merged[HEAD][ids[tokens[0]]].equal(swapped)
    # A token of one model only has its row there, in the other too.
    assert merged[HEAD][ids["new"]].equal(other[HEAD][64].float())
    assert merged[HEAD][ids[tokens[64]]].equal(one[EMBEDDING][64].float())
    assert torch.isfinite(merged[HEAD]).all()
