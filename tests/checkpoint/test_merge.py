from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from helpers.small_models import WEIGHTS, Save, random_weights

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.hashing import content_hash
from btm_scale.checkpoint.merge import workers
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.errors import CheckpointError
from btm_scale.util.files import partial_path


def test_the_mean_is_exact_and_rounded_once(models: list[Path], tmp_path: Path) -> None:
    merge(tmp_path / "out", list(zip(models, WEIGHTS, strict=True)))
    name = "model.layers.0.mlp.up_proj.weight"
    parts = [random_weights(i)[name].double().reshape(-1).tolist() for i in range(4)]
    total = sum(map(Fraction, WEIGHTS))
    exact = [
        sum(Fraction(w) * Fraction(x) for w, x in zip(WEIGHTS, column, strict=True)) / total
        for column in zip(*parts, strict=True)
    ]
    merged = SafetensorsModel(tmp_path / "out").read(name).reshape(-1)
    nearest = torch.tensor([float(x) for x in exact], dtype=torch.float64).to(torch.bfloat16)
    assert merged.equal(nearest)


def test_input_order_chunk_size_processes_and_sharding_do_not_change_a_byte(
    models: list[Path], save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = list(zip(models, WEIGHTS, strict=True))
    first = merge(tmp_path / "a", pairs)
    assert first.content_hash == content_hash(tmp_path / "a")
    resharded = [(save(f"again{i}", random_weights(i), shard=900), WEIGHTS[i]) for i in (2, 0, 3, 1)]
    merge(tmp_path / "b", resharded, chunk_bytes=34)
    merge(tmp_path / "c", pairs[::-1], jobs=2)
    monkeypatch.setattr(workers, "MOST", 1)
    merge(tmp_path / "d", pairs)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abcd"]
    assert len(set(files)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merging_a_single_model_copies_it_bit_for_bit(save: Save, tmp_path: Path, dtype: torch.dtype) -> None:
    weights = random_weights(1, dtype)
    weights["model.norm.weight"][:3] = torch.tensor([float("nan"), -0.0, float("inf")]).to(dtype)
    model, other = save("m", weights), save("other", random_weights(2, dtype))
    assert merge(tmp_path / "a", [(model, 0.37)]).content_hash == content_hash(model)
    assert merge(tmp_path / "b", [(other, 0), (model, 5)]).content_hash == content_hash(model)


def test_float32_models_are_summed_in_float64(save: Save, tmp_path: Path) -> None:
    models = [save(f"m{i}", random_weights(i, torch.float32)) for i in range(3)]
    merge(tmp_path / "out", [(model, 1.0) for model in models])
    name = "model.embed_tokens.weight"
    exact = sum(random_weights(i, torch.float32)[name].double() for i in range(3)) / 3
    assert SafetensorsModel(tmp_path / "out").read(name).equal(exact.float())


def test_dtype_sets_the_dtype_of_the_weights_and_the_config(save: Save, tmp_path: Path) -> None:
    config = {"model_type": "llama", "torch_dtype": "bfloat16"}
    mixed = [
        save("a", random_weights(0), config=config),
        save("b", random_weights(1, torch.float32), config=config),
    ]
    with pytest.raises(CheckpointError, match=r"different dtypes: .* Give the output's dtype \(--dtype; `dtype` in"):
        merge(tmp_path / "out", [(model, 1.0) for model in mixed])
    merge(tmp_path / "out", [(model, 1.0) for model in mixed], dtype="float32")
    assert SafetensorsModel(tmp_path / "out").spec("model.norm.weight").dtype == torch.float32
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "load"])
def test_a_dtype_that_is_not_floating_point_is_rejected(models: list[Path], tmp_path: Path, dtype: str) -> None:
    with pytest.raises(CheckpointError, match=f"Unknown dtype '{dtype}'"):
        merge(tmp_path / "out", [(models[0], 1)], dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_all_problems_are_reported_together_and_nothing_is_written(save: Save, tmp_path: Path) -> None:
    weights = random_weights(0)
    odd = random_weights(1) | {"model.norm.weight": torch.zeros(15, dtype=torch.bfloat16)}
    odd["model.extra"] = odd.pop("model.embed_tokens.weight")
    good = save("good", weights, files={"tokenizer.json": '{"a": 1}'})
    bad = save("bad", odd, config={"model_type": "gpt2"}, files={"tokenizer.json": '{"a": 2}'})
    with pytest.raises(CheckpointError) as raised:
        merge(tmp_path / "out", [(good, 1), (bad, float("nan"))], parameters={"density": 1}, dtype="bf16")
    for part in (
        "different shapes: 'model.norm.weight' [16] and [15]. Merge",
        f"{bad} has no tensor 'model.embed_tokens.weight'",
        f"{good} has no tensor 'model.extra'",
        "model_type llama and gpt2",
        "tokenizer.json differs",
        "no parameter 'density'",
        "finite",
    ):
        assert part in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good"]


def test_only_the_ratio_of_the_weights_matters(save: Save, tmp_path: Path) -> None:
    models = [save(f"m{i}", random_weights(i)) for i in range(2)]
    same = [
        merge(tmp_path / f"out{power}", [(models[0], 2.0**power), (models[1], 3 * 2.0**power)]).content_hash
        for power in (0, 500, -500)
    ]
    assert len(set(same)) == 1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, -1], "sum to 0"),
        ([1e6, 1e-9 - 1e6], "sum to 0"),
        ([0, 0], r"No input has a nonzero weight\. Give at least one input a nonzero weight\."),
        ([], "No input has a nonzero weight"),
    ],
)
def test_weights_that_sum_to_zero_are_rejected(
    models: list[Path], tmp_path: Path, weights: list[float], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        merge(tmp_path / "out", list(zip(models, weights, strict=False)))


def test_weights_with_an_infinite_sum_are_rejected(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="their sum must be finite"):
        merge(tmp_path / "out", [(models[0], 1e308), (models[1], 1e308)])


def test_a_model_without_tensors_is_rejected(save: Save, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="empty has no named tensors"):
        merge(tmp_path / "out", [(save("empty", {}), 1)])


def test_a_truncated_shard_stops_the_merge_without_output(models: list[Path], tmp_path: Path) -> None:
    shard = next(iter(models[2].glob("model-00002*")))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=shard.name):
        merge(tmp_path / "out", [(model, 1) for model in models])
    assert not (tmp_path / "out").exists()
    assert not partial_path(tmp_path / "out").exists()


def test_tied_heads_and_rotary_buffers_are_left_out(save: Save, tmp_path: Path) -> None:
    weights = random_weights(0)
    extra = {
        "lm_head.weight": weights["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    tied = {"model_type": "llama", "tie_word_embeddings": True}
    merge(
        tmp_path / "out",
        [(save("a", weights, config=tied), 1), (save("b", weights | extra, config=tied), 1)],
    )
    assert SafetensorsModel(tmp_path / "out").names == tuple(sorted(weights))


def test_config_and_tokenizer_come_from_the_first_model_of_nonzero_weight(save: Save, tmp_path: Path) -> None:
    left_out = save("gpt2", random_weights(0), config={"model_type": "gpt2"}, files={"tokenizer.json": "[]"})
    model = save("llama", random_weights(1), files={"tokenizer.json": "{}"})
    merge(tmp_path / "out", [(left_out, 0), (tmp_path / "nowhere", 0), (model, 1)])
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "llama"
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"


def test_the_model_card_names_experts_and_base_first_and_then_their_hashes(models: list[Path], tmp_path: Path) -> None:
    recorded = content_hash(models[0])
    expert = {"name": "law", "domains": {"contracts": 1.0}, "content_hash": recorded}
    (models[0] / "expert.json").write_text(json.dumps(expert))
    snapshot = tmp_path / "models--org--base" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    models[2].rename(snapshot)
    inputs = [(models[0], 0.25), (models[1], 0.75)]
    report = merge(tmp_path / "out", inputs, method="task_arithmetic", base=snapshot)
    card = (tmp_path / "out/README.md").read_text()
    assert f"| `law` | `{recorded}` | 0.25 | contracts |" in card
    [other] = [line for line in card.splitlines() if line.startswith("| `m1` | `")]
    assert other.endswith("`* | 0.75 |  |")
    [base] = [line for line in card.splitlines() if line.startswith("| `org/base` | `")]
    assert base.endswith("`* | base |  |")
    assert "`*`: of the first elements" in card
    for part in (f"SHA-256 of the merged weights: `{report.content_hash}`", "`task_arithmetic`"):
        assert part in card
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "merge_recipe.yaml",
        "model.safetensors",
        "provenance.json",
    ]


def test_an_existing_output_is_kept(models: list[Path], tmp_path: Path) -> None:
    before = content_hash(models[1])
    with pytest.raises(CheckpointError, match="already exists"):
        merge(models[1], [(models[0], 1)])
    assert content_hash(models[1]) == before


def test_an_output_in_an_unwritable_location_raises(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Cannot write to .*config.json: .* Choose another output"):
        merge(models[0] / "config.json/out", [(models[0], 1)])


@pytest.mark.parametrize("leads_to", ["nowhere", "empty"])
def test_an_output_that_is_a_symlink_raises_before_any_work(models: list[Path], tmp_path: Path, leads_to: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(leads_to)
    with pytest.raises(CheckpointError, match="already exists"):
        merge(tmp_path / "out", [(models[0], 1)])
    with pytest.raises(CheckpointError, match="already exists"):
        convert(models[0], tmp_path / "out", to="huggingface")
