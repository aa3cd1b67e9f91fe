"""Partly frozen and tied models that the DeepSpeed engine saved, also as universal checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.worlds import run_script
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.inspect import inspect
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.errors import CheckpointError

SAVER = Path(__file__).with_name("save_frozen_with_engine.py")
CONFIG = LlamaConfig(
    vocab_size=61,  # no size is divisible by the three ranks
    hidden_size=32,
    intermediate_size=50,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
    tie_word_embeddings=True,
)
CHECKPOINTS = {"zero1": (1, False), "zero2": (2, False), "zero3": (3, False)}
EXCLUDED = {"zero2-excluded": (2, True), "zero3-excluded": (3, True)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).save_pretrained(folder / "base")
    CONFIG.save_pretrained(folder)
    spec = {"base": str(folder / "base"), "folder": str(folder), "checkpoints": CHECKPOINTS | EXCLUDED}
    run_script(SAVER, spec, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("form", ["partitioned", "universal"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_trained_frozen_and_tied_parameters_are_read(saved: Path, tmp_path: Path, kind: str, form: str) -> None:
    expected = load_file(saved / f"{kind}.safetensors")
    folder = saved / kind if form == "partitioned" else saved / kind / "universal"
    with open_model(folder) as model:
        assert set(model.names) == {*expected, "lm_head.weight"}
        for name, tensor in expected.items():
            read = model.read(name)
            assert read.shape == tensor.shape
            assert read.float().equal(tensor.float()), name
        assert model.read("lm_head.weight").float().equal(expected["model.embed_tokens.weight"].float())
    facts = inspect(folder)
    assert facts.format == ("deepspeed" if form == "partitioned" else "deepspeed universal")
    assert (facts.family, facts.step, facts.problem) == ("llama", 1, None)
    convert(folder, tmp_path / "out", to="huggingface", dtype="float32", verify=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert all(loaded.state_dict()[name].equal(tensor.float()) for name, tensor in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXCLUDED)
def test_excluded_frozen_parameters_come_from_the_base(saved: Path, tmp_path: Path, kind: str) -> None:
    expected, base = load_file(saved / f"{kind}.safetensors"), load_file(saved / "base/model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 'model\.layers\.0.*without its frozen parameters.*--base"):
        convert(saved / kind, tmp_path / "out", to="huggingface")
    assert not (tmp_path / "out").exists()
    convert(saved / kind, tmp_path / "out", to="huggingface", base=saved / "base", verify=True)
    written = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in written.items():
        assert tensor.equal(base[name] if "layers.0" in name else expected[name]), name
    assert set(written) == set(base)
    report = merge(tmp_path / "merged", [(saved / kind, 1.0), (saved / "base", 1.0)], base=saved / "base")
    assert report.tensors == len(base)


@pytest.mark.slow
def test_a_base_of_another_shape_is_refused(saved: Path, tmp_path: Path) -> None:
    other = LlamaConfig(**json.loads((saved / "config.json").read_text()) | {"hidden_size": 16})
    AutoModelForCausalLM.from_config(other).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="lacks or has in another shape"):
        convert(saved / "zero2-excluded", tmp_path / "out", to="huggingface", base=tmp_path / "other")


@pytest.mark.slow
def test_a_missing_part_of_a_frozen_parameter_is_refused(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved / "zero3/global_step1", copy)
    (copy / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="model states only of data ranks"):
        open_model(copy)
    last = tmp_path / "last"
    shutil.copytree(saved / "zero3/global_step1", last)
    (last / "zero_pp_rank_2_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="one of 2 parts of a tensor of shape"):
        open_model(last)


@pytest.mark.slow
def test_a_universal_checkpoint_that_lacks_a_parameter_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "zero3/universal/step_1", tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/zero/model.norm.weight")
    with pytest.raises(CheckpointError, match=r"lacks 'model\.norm\.weight'"):
        open_model(tmp_path / "copy")


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "experts of a DeepSpeed mixture"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "experts of a DeepSpeed mixture"),
        ("layer_03-model_00-model_states.pt", "layers of a DeepSpeed pipeline"),
    ],
)
@pytest.mark.parametrize("beside", ["alone", "beside model states"])
def test_files_with_weights_that_no_reader_looks_at_are_an_error(
    tmp_path: Path, file: str, reason: str, beside: str
) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / file)
    if beside != "alone":
        torch.save({"module": {"a.weight": torch.zeros(2)}}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=reason):
        open_model(tmp_path)
    with pytest.raises(CheckpointError, match=reason):
        inspect(tmp_path)
