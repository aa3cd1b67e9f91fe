"""What mergekit's YAML says of tokenizers, and the arguments of `merge` that recipes repeat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.small_models import Save
from helpers.small_tokenizers import as_text, bpe
from safetensors.torch import load_file

from btm_scale.checkpoint.merge.merge import merge, merge_by_recipe
from btm_scale.errors import CheckpointError

TOKENIZERS = {"a": bpe(["a", "b", "c"]), "b": bpe(["c", "b", "d", "e"])}
MODELS = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}]\n"


@pytest.fixture
def models(save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two models with different vocabularies in the working directory."""
    monkeypatch.chdir(tmp_path)
    for seed, (name, tokenizer) in enumerate(TOKENIZERS.items()):
        rows = len(tokenizer["model"]["vocab"])
        weights = {
            "model.embed_tokens.weight": torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)),
            "model.layers.0.mlp.up_proj.weight": torch.full((4, 4), float(seed)),
        }
        config = {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": rows, "rope_theta": 1e4 * (1 + seed)}
        save(name, weights, config=config, files={"tokenizer.json": as_text(tokenizer), "chat_template.jinja": name})


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def all_but_the_recipe(folder: str) -> dict[str, object]:
    """Return a folder's files without the recipe, which keeps the keys it was given, and its recorded size."""
    files: dict[str, object] = {**contents(folder)}
    record = json.loads(contents(folder)["provenance.json"])
    del files["merge_recipe.yaml"], record["files"]["merge_recipe.yaml"]
    return files | {"provenance.json": record}


@pytest.mark.parametrize("key", ["tokenizer_source: {}", "tokenizer: {{source: {}}}"])
@pytest.mark.parametrize("source", ["union", "b"])
def test_the_tokenizer_of_a_recipe_matches_rows_by_token(models: None, key: str, source: str) -> None:
    text = f"merge_method: linear\n{MODELS}{key.format(source)}\nbtm_scale: {{allow: [rope_theta]}}\n"
    Path("recipe.yaml").write_text(text)
    merge_by_recipe(Path("by-recipe"), Path("recipe.yaml"))
    inputs = [(Path("a"), 1.0), (Path("b"), 3.0)]
    merge(Path("by-arguments"), inputs, tokenizer=source, allow=["rope_theta"])
    ours, theirs = (all_but_the_recipe(name) for name in ("by-recipe", "by-arguments"))
    assert ours == theirs
    assert len(load_file("by-recipe/model.safetensors")["model.embed_tokens.weight"]) == {"union": 5, "b": 4}[source]


def test_the_written_recipe_repeats_vocabulary_settings_and_template(models: None) -> None:
    Path("chosen.jinja").write_text("a template")
    merge(
        Path("one"),
        [(Path("a"), 1.0), (Path("b"), 3.0)],
        tokenizer="union",
        new_rows="zero",
        allow=["rope_theta"],
        chat_template="chosen.jinja",
    )
    merge_by_recipe(Path("two"), Path("one/merge_recipe.yaml"))
    assert contents("one") == contents("two")
    assert Path("one/chat_template.jinja").read_text() == "a template"


def test_gradients_and_vocabularies_combine(models: None) -> None:
    gradient = MODELS.replace("weight: 1", "weight: [{filter: mlp, value: 0}, {value: 1}]")
    Path("recipe.yaml").write_text(
        f"merge_method: linear\n{gradient}tokenizer_source: b\nbtm_scale: {{allow: [rope_theta], new_rows: zero}}\n"
    )
    merge_by_recipe(Path("out"), Path("recipe.yaml"))
    a, b, out = (load_file(f"{name}/model.safetensors") for name in ("a", "b", "out"))
    name = "model.embed_tokens.weight"
    assert out["model.layers.0.mlp.up_proj.weight"].equal(b["model.layers.0.mlp.up_proj.weight"])
    torch.testing.assert_close(out[name][0], (a[name][2] + 3 * b[name][0]) / 4)  # the token c
    torch.testing.assert_close(out[name][3], 3 * b[name][3] / 4)  # e, which a lacks


def test_a_recipe_has_one_choice_of_a_tokenizer(models: None) -> None:
    for text, message in (
        ("tokenizer_source: union\ntokenizer: {source: union}\n", "both `tokenizer` and `tokenizer_source`"),
        ("tokenizer: {source: union, tokens: {}}\n", r"tokenizer\.tokens is unknown\..* source"),
        ("chat_template: auto\n", "chat_template is 'auto', and is not supported. Give `base` or the path"),
    ):
        Path("recipe.yaml").write_text(f"merge_method: linear\n{MODELS}{text}")
        with pytest.raises(CheckpointError, match=message):
            merge_by_recipe(Path("out"), Path("recipe.yaml"))


def test_tokens_with_one_id_here_and_two_there_are_refused(models: None) -> None:
    tokenizer = json.loads(Path("a/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["c"] = vocabulary["b"]
    Path("a/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="'b' and 'c' have one id in the output's tokenizer and two in that of b"):
        merge(Path("out"), [(Path("a"), 1.0), (Path("b"), 1.0)], tokenizer="a", allow=["rope_theta"])
