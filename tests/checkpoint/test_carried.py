"""What a merged or converted folder holds beside its weights, and what is not finite in it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.complete_models import LLAMA, complete_weights, write_model
from safetensors.torch import load_file

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.merge.merge import merge, merge_many
from btm_scale.errors import CheckpointError

CARRIED = {
    "configuration_own.py": "raise SystemExit('never run')",
    "modeling_own.py": "raise SystemExit('never run')",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "tekken.json": "{}",
    "own.tiktoken": "x",
    "sentencepiece.bpe.model": "x",
    "LICENSE": "free",
    "NOTICE.txt": "n",
    "generation_config.json": "{}",
    "additional_chat_templates/tool.jinja": "t",
    "1_Pooling/config.json": "{}",
    "2_Dense/config.json": "{}",
    "2_Dense/model.safetensors": "listed in modules.json",
    "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]),
}
LEFT = {
    "README.md": "an old card",
    "optimizer.pt": "x",
    "scheduler.pt": "x",
    "rng_state_0.pth": "x",
    "trainer_state.json": "{}",
    "training_args.bin": "x",
    "consolidated.safetensors": "x",
    "model.gguf": "x",
    "tf_model.h5": "x",
    "checkpoint-10/config.json": "{}",
    "other/pytorch_model.bin": "another model",
    "other/config.json": "{}",
    ".git/config": "x",
    "expert.json": "{}",
}


def add(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_everything_of_a_model_is_carried_but_weights_optimizer_and_old_cards(tmp_path: Path) -> None:
    own = LLAMA | {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
    model = add(write_model(tmp_path / "model", complete_weights(0), own), CARRIED | LEFT)
    (model / "modeling_own.py").chmod(0o755)
    merge(tmp_path / "merged", [(model, 1.0), (model, 1.0)])
    convert(model, tmp_path / "converted", to="huggingface")
    for out in (tmp_path / "merged", tmp_path / "converted"):
        for name, text in CARRIED.items():
            assert (out / name).read_text() == text
        assert not [name for name in LEFT if (out / name).exists() and name != "README.md"]
        assert not (out / "README.md").read_text().startswith("an old card")
        assert not (out / "modeling_own.py").stat().st_mode & 0o111


def test_files_come_from_the_first_input_that_has_them_and_a_tokenizer_from_one(tmp_path: Path) -> None:
    first = add(write_model(tmp_path / "a", complete_weights(0)), {"tokenizer.json": "{}", "LICENSE": "a"})
    second = add(
        write_model(tmp_path / "b", complete_weights(1)),
        {"tokenizer.json": "{}", "tokenizer.model": "b", "LICENSE": "b", "processor_config.json": "{}", "own.py": ""},
    )
    merge(tmp_path / "out", [(first, 1.0), (second, 1.0)])
    assert (tmp_path / "out/LICENSE").read_text() == "a"
    assert (tmp_path / "out/processor_config.json").exists()
    assert not (tmp_path / "out/tokenizer.model").exists()
    assert not (tmp_path / "out/own.py").exists()  # the code of another config.json


def test_from_the_folder_around_a_training_checkpoint_only_files_that_describe_a_model_are_carried(
    tmp_path: Path,
) -> None:
    convert(write_model(tmp_path / "model", complete_weights(0)), tmp_path / "there", to="deepspeed")
    add(tmp_path / "there", {"notes.txt": "x", "train.py": "x", "data/a.json": "{}", "LICENSE": "x", "vocab.json": "x"})
    convert(tmp_path / "there", tmp_path / "out", to="huggingface")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "vocab.json", "config.json"} < names
    assert not {"notes.txt", "train.py", "data", "latest"} & names


def template(folder: Path) -> tuple[str, Any]:
    return (folder / "chat_template.jinja").read_text(), json.loads((folder / "tokenizer_config.json").read_text())


def test_a_chat_template_is_the_first_inputs_that_has_one_or_the_one_asked_for(tmp_path: Path) -> None:
    base = add(
        write_model(tmp_path / "base", complete_weights(0)),
        {"tokenizer.json": "{}", "tokenizer_config.json": json.dumps({"eos_token": "x"})},
    )
    chat = add(
        write_model(tmp_path / "chat", complete_weights(1)),
        {"tokenizer.json": "{}", "tokenizer_config.json": json.dumps({"chat_template": "chat's"})},
    )
    merge(tmp_path / "first", [(base, 1.0), (chat, 1.0)])
    assert template(tmp_path / "first") == ("chat's", {"eos_token": "x"})
    (tmp_path / "own.jinja").write_text("own")
    merge(tmp_path / "given", [(chat, 1.0), (base, 1.0)], chat_template=tmp_path / "own.jinja")
    assert template(tmp_path / "given") == ("own", {"chat_template": "own"})
    merge(tmp_path / "based", [(base, 1.0)], method="ties", base=chat, chat_template="base")
    assert template(tmp_path / "based")[0] == "chat's"
    for given, message in ((base, "has no chat template"), (tmp_path / "none", "none does not exist")):
        with pytest.raises(CheckpointError, match=message):
            merge(tmp_path / "not", [(chat, 1.0)], chat_template=given)
    assert not (tmp_path / "not").exists()


def test_of_a_vision_language_model_the_language_model_is_merged_and_the_rest_copied(tmp_path: Path) -> None:
    config = {"model_type": "llava", "text_config": LLAMA, "vision_config": {"model_type": "clip_vision_model"}}

    def weights(seed: int) -> dict[str, torch.Tensor]:
        language = {f"language_model.{name}": weight for name, weight in complete_weights(seed).items()}
        others = {
            "vision_tower.layers.0.weight": torch.full((4,), float(seed)),
            "multi_modal_projector.bias": torch.full((3,), float(seed)),
        }
        return language | others

    pairs = [(write_model(tmp_path / f"m{seed}", weights(seed), config), 1.0) for seed in (5, 2)]
    for order in (pairs, pairs[::-1]):
        out = tmp_path / f"from-{order[0][0].name}"
        merge(out, order)
        merge_many({tmp_path / "a": order, tmp_path / "b": order})
        first = load_file(order[0][0] / "model.safetensors")
        mean = (weights(5)["language_model.lm_head.weight"].double() + weights(2)["language_model.lm_head.weight"]) / 2
        for folder in (out, tmp_path / "a"):
            merged = load_file(folder / "model.safetensors")
            assert merged["language_model.lm_head.weight"].equal(mean.bfloat16())
            for name in ("vision_tower.layers.0.weight", "multi_modal_projector.bias"):
                assert merged[name].equal(first[name])
        for folder in (tmp_path / "a", tmp_path / "b"):
            shutil.rmtree(folder)
    lacking = {name: one for name, one in weights(1).items() if "layers.1.mlp" not in name}
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'language_model\.model\.layers\.1\.mlp"):
        merge(tmp_path / "not", [(write_model(tmp_path / "lacking", lacking, config), 1.0)])


def test_dtypes_are_changed_wherever_config_json_names_one(tmp_path: Path) -> None:
    config = LLAMA | {"dtype": "bfloat16", "vision_config": {"torch_dtype": "bfloat16", "depth": 2}}
    model = write_model(tmp_path / "model", complete_weights(0), config)
    convert(model, tmp_path / "out", to="huggingface", dtype="float32")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == written["vision_config"]["torch_dtype"] == "float32"


@pytest.mark.parametrize("to", ["huggingface", "megatron", "deepspeed"])
def test_infinities_made_by_rounding_and_nan_are_counted_and_logged(
    to: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = complete_weights(0, dtype=torch.float32)
    weights["model.norm.weight"][:3] = torch.tensor([1e6, -1e6, float("nan")])
    weights["model.embed_tokens.weight"][0, 0] = float("inf")
    model = write_model(tmp_path / "model", weights)
    with caplog.at_level(logging.WARNING):
        done = convert(model, tmp_path / "out", to=to, dtype="float16", verify=True)
    assert (done.nonfinite.nan, done.nonfinite.infinite, done.nonfinite.overflowed) == (1, 3, 2)
    assert done.nonfinite.tensors == ("model.embed_tokens.weight", "model.norm.weight")
    (message,) = [record.getMessage() for record in caplog.records]
    assert "1 NaN, from an input and 1 infinities, from an input and 2 infinities, made by rounding to flo" in message


def test_what_is_not_finite_in_a_mean_is_counted_in_every_process_and_kept_in_the_record(tmp_path: Path) -> None:
    weights = complete_weights(0)
    weights["model.norm.weight"][5] = float("nan")
    pairs = [
        (write_model(tmp_path / "a", weights), 1.0),
        (write_model(tmp_path / "b", complete_weights(1)), 1.0),
    ]
    first = merge(tmp_path / "out", pairs, jobs=2, chunk_bytes=64)
    assert (first.nonfinite.nan, first.nonfinite.infinite) == (1, 0)
    again = merge(tmp_path / "out", pairs)
    assert again.already_complete
    assert again.nonfinite.nan == 1
    reports = merge_many({tmp_path / "x": pairs, tmp_path / "y": pairs[1:]})
    assert [report.nonfinite.nan for report in reports] == [1, 0]
    assert load_file(tmp_path / "out/model.safetensors")["model.norm.weight"].isnan().sum() == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "merge_recipe.yaml",
        "model.safetensors",
        "provenance.json",
    ]
