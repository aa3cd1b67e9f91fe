"""Universal checkpoints: written from training checkpoints for DeepSpeed, and refused if they are not complete."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.worlds import run_script
from safetensors.torch import load_file, save_file

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.expected import expected_tensors
from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.inspect import inspect
from btm_scale.errors import CheckpointError

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,  # no size is divisible by both ranks and the embedding's rows
    "hidden_size": 24,
    "intermediate_size": 38,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}


@pytest.mark.slow
def test_deepspeed_resumes_from_a_training_checkpoint_at_zero_1_and_3(tmp_path: Path) -> None:
    spec = {"folder": str(tmp_path), "config": CONFIG, "steps": 4, "more": 3, "stages": [1, 3]}
    run_script(Path(__file__).with_name("resume_universal.py"), spec, tmp_path)
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert losses.keys() == {"uninterrupted", "zero 1", "zero 3"}
    for stage in ("zero 1", "zero 3"):
        assert losses[stage] == pytest.approx(losses["uninterrupted"], abs=1e-5)
    facts = inspect(tmp_path / "universal")
    assert (facts.format, facts.step, facts.problem) == ("deepspeed universal", 4, None)
    convert(tmp_path / "universal", tmp_path / "back", to="huggingface", verify=True)
    masters = load_file(tmp_path / "checkpoints/step-00000004/model.safetensors")
    back = load_file(tmp_path / "back/model.safetensors")
    assert {f"master/{name}" for name in back} == {name for name in masters if name.startswith("master/")}
    assert all(tensor.equal(masters[f"master/{name}"]) for name, tensor in back.items())


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A training checkpoint of random numbers."""
    expected = expected_tensors(CONFIG)
    assert expected is not None
    folder = tmp_path / "step-00000007"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "state.json").write_text(json.dumps({"step": 7, "adam_steps": 9}))
    tensors = {
        f"{kind}/{expected.prefix}{name}": torch.randn(shape)
        for kind in ("master", "exp_avg", "exp_avg_sq")
        for name, shape in expected.body.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_every_weight_moment_and_step_is_written_and_verified(state: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "universal" in inspect(state).converts_to
    convert(state, out, to="universal", verify=True)
    assert (out / "latest_universal").read_text() == "global_step7"
    assert (out / "config.json").is_file()
    tensors = load_file(state / "model.safetensors")
    zero = out / "global_step7/zero"
    for full, tensor in tensors.items():
        kind, name = full.split("/")
        file = zero / name / ("fp32.pt" if kind == "master" else f"{kind}.pt")
        assert torch.load(file)["param"].equal(tensor)
        assert float(torch.load(zero / name / "step.pt")) == 9
    assert torch.load(zero / "optimizer_state.pt")["optimizer_state_dict"]["state"][0]["step"] == 9
    assert convert(state, out, to="universal").already_complete


def changed(state: Path, **marker: Any) -> None:
    (state / "state.json").write_text(json.dumps({"step": 7, "adam_steps": 9, **marker}))


def without(state: Path, name: str) -> None:
    tensors = load_file(state / "model.safetensors")
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, state / "model.safetensors")


def with_tensor(state: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(load_file(state / "model.safetensors") | {name: tensor}, state / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: changed(state, adam_steps=None), "adam_steps None"),
        (lambda state: changed(state, adam_steps=-1), "adam_steps -1"),
        (lambda state: without(state, "exp_avg/model.norm.weight"), r"lacks 'exp_avg/model\.norm\.weight'"),
        (
            lambda state: with_tensor(state, "exp_avg_sq/model.norm.weight", torch.ones(5)),
            r"has 'exp_avg_sq/model\.norm\.weight' in another type or shape",
        ),
        (
            lambda state: with_tensor(state, "exp_avg/model.norm.weight", torch.ones(24).bfloat16()),
            "in another type or shape",
        ),
        (lambda state: with_tensor(state, "outer/model.norm.weight", torch.ones(24)), "the kind 'outer'"),
    ],
)
def test_an_incomplete_training_checkpoint_is_refused(state: Path, tmp_path: Path, damage: Any, message: str) -> None:
    damage(state)
    with pytest.raises(CheckpointError, match=message):
        convert(state, tmp_path / "out", to="universal")
    assert not (tmp_path / "out").exists()


def test_what_has_no_moments_or_is_sharded_is_refused(state: Path, tmp_path: Path) -> None:
    convert(state, tmp_path / "model", to="huggingface")
    with pytest.raises(CheckpointError, match="is not a training checkpoint of btm-scale"):
        convert(tmp_path / "model", tmp_path / "out", to="universal")
    for settings in ({"tensor": 2}, {"dtype": "bfloat16"}):
        with pytest.raises(CheckpointError, match="Leave --tensor and --dtype out"):
            convert(state, tmp_path / "out", to="universal", **settings)


def test_model_states_that_list_only_some_of_the_parameters_are_refused(state: Path, tmp_path: Path) -> None:
    convert(state, tmp_path / "out", to="universal")
    for file in (tmp_path / "out").glob("*/*_model_states.pt"):
        content = torch.load(file, weights_only=False)
        del content["param_shapes"][0]["model.norm.weight"]
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"does not list 'model\.norm\.weight'"):
        open_model(tmp_path / "out")


def test_a_difference_that_verification_finds_leaves_no_output(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from btm_scale.checkpoint.formats import universal_writer

    def damaged(content: Any, path: Path) -> None:
        if path.name == "exp_avg.pt":
            content["param"].view(-1)[0] = math.pi
        with path.open("wb") as file:
            torch.save(content, file)

    monkeypatch.setattr(universal_writer, "_save", damaged)
    with pytest.raises(CheckpointError, match=r"exp_avg\.pt differs from"):
        convert(state, tmp_path / "out", to="universal", verify=True)
    assert not (tmp_path / "out").exists()
