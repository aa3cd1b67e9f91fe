"""Each wrong path has its own message: what it is, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.small_models import Save, random_weights
from safetensors.torch import load_file, save_file

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.inspect import inspect
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.cli.merge_arguments import weighted_path
from btm_scale.errors import CheckpointError

WEIGHTS = {"a.weight": torch.ones(2, 2)}


def _file(name: str, content: bytes = b"x") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        return folder

    return make


def _pickle(name: str, content: object, marker: str = "") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, folder / name)
        if marker:
            (folder / "latest").write_text(marker)
        return folder

    return make


def _stray(folder: Path) -> Path:
    save_file(WEIGHTS, folder / "consolidated.safetensors")
    return folder


MISTAKES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a path that does not exist": (lambda folder: folder / "nope", "does not exist. Give the path of an existing"),
    "a name on the hub": (lambda _: Path("some-org/some-model"), "hf download some-org/some-model"),
    "an empty folder": (lambda folder: folder, "is empty."),
    "a GGUF folder": (_file("model.q4.gguf", b"GGUF"), "a GGUF file"),
    "a GGUF file": (lambda folder: _file("model", b"GGUF")(folder) / "model", "is a GGUF file"),
    "an ONNX folder": (_file("model.onnx"), "an ONNX graph"),
    "an archive": (lambda folder: _file("model.zip")(folder) / "model.zip", "Unpack it first"),
    "an adapter without a base": (_file("adapter_config.json", b"{}"), "adapter"),
    "an optimizer alone": (_file("optimizer.pt"), "state of an optimizer without the model's file"),
    "DeepSpeed without latest": (
        _pickle("global_step5/mp_rank_00_model_states.pt", {"module": WEIGHTS}),
        "has no file `latest`, but the checkpoints global_step5. Give one of them",
    ),
    "latest of a step that is gone": (
        _pickle("global_step5/mp_rank_00_model_states.pt", {"module": WEIGHTS}, "global_step9"),
        "a file `latest` that names global_step9, which has no checkpoint. It has global_step5.",
    ),
    "checkpoints of transformers' trainer": (_file("checkpoint-500/trainer_state.json"), "has no model, but the check"),
    "Megatron's older format without a marker": (
        _pickle("iter_0000100/mp_rank_00/model_optim_rng.pt", {}),
        "has no file `latest_checkpointed_iteration.txt`, but the checkpoints iter_0000100.",
    ),
    "Megatron's older format without config.json and arguments": (
        lambda folder: _file("latest_checkpointed_iteration.txt", b"100")(
            _pickle("iter_0000100/mp_rank_00/model_optim_rng.pt", {})(folder)
        ),
        ", a Megatron checkpoint of mp_rank_* folders, has no config.json",
    ),
    "layers of a pipeline": (
        lambda folder: _pickle("layer_00-model_00-model_states.pt", {})(
            _pickle("mp_rank_00_model_states.pt", {"module": None})(folder)
        ),
        "the layers of a pipeline-parallel model",
    ),
    "ZeRO 3 without the first rank": (
        lambda folder: _pickle("zero_pp_rank_1_mp_rank_00_optim_states.pt", {"optimizer_state_dict": {}})(
            _pickle("zero_pp_rank_1_mp_rank_00_model_states.pt", {"module": {}, "param_shapes": []})(folder)
        ),
        "lacks the model states of data rank 0. Copy the missing files here.",
    ),
    "a state dict in a dictionary": (_pickle("pytorch_model.bin", {"state_dict": WEIGHTS}), "has no named tensors"),
    "a Git LFS pointer": (_file("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "shards without an index": (
        _file("model-00001-of-00002.safetensors"),
        "but no model.safetensors.index.json, which lists them",
    ),
    "safetensors under another name": (_stray, "Give the file, "),
    "a shard of one FSDP rank": (_file("model_world_size_2_rank_0.pt"), "python -m verl.model_merger merge"),
    "a checkpoint of nanotron": (_file("checkpoint_metadata.json", b"{}"), "is a checkpoint of nanotron. Convert it"),
    "checkpoints of nanotron": (_file("10/checkpoint_metadata.json", b"{}"), "is a checkpoint of nanotron. Convert it"),
    "the full state that accelerate saves of FSDP": (
        _pickle("pytorch_model_fsdp.bin", WEIGHTS),
        "transformers reads it as pytorch_model.bin: rename it.",
    ),
    "the folder that zero_to_fp32 makes": (
        lambda folder: _pickle("pytorch_model.bin/pytorch_model.bin", WEIGHTS)(_file("config.json", b"{}")(folder)),
        "has no model itself, but these folders in it do: ",
    ),
    "a config alone": (_file("config.json", b"{}"), "has a config.json but no weights"),
    "a tokenizer alone": (_file("tokenizer.json", b"{}"), "has a tokenizer but no weights"),
    "the cache of a repository": (_file("snapshots/abc/README.md"), "Hugging Face cache of a repository"),
    "some other file": (lambda folder: _file("notes.md")(folder) / "notes.md", "is not a model file"),
}


FOLLOWED = {"fsdp": "pytorch_model_fsdp.bin", "zero": "pytorch_model.bin/pytorch_model.bin"}


@pytest.mark.parametrize(("make", "message"), MISTAKES.values(), ids=MISTAKES)
def test_inspect_merge_and_convert_name_what_a_path_is(
    make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    (tmp_path / "given").mkdir()
    path = make(tmp_path / "given")
    calls: list[Callable[[], object]] = [
        lambda: inspect(path),
        lambda: convert(path, tmp_path / "out", to="huggingface"),
        lambda: merge(tmp_path / "out", [(path, 1.0)]),
    ]
    for call in calls:
        with pytest.raises(CheckpointError) as raised:
            call()
        assert message in str(raised.value)
        assert not (tmp_path / "out").exists()


def test_the_remedies_for_other_programs_checkpoints_work(tmp_path: Path) -> None:
    full, inner = (_pickle(f"{name}/{file}", WEIGHTS)(tmp_path) / name for name, file in FOLLOWED.items())
    with pytest.raises(CheckpointError):
        inspect(full)
    (full / "pytorch_model_fsdp.bin").rename(full / "pytorch_model.bin")
    (inner / "config.json").write_text('{"model_type": "other"}')
    for i, path in enumerate((full, inner / "pytorch_model.bin")):
        convert(path, tmp_path / f"out{i}", to="huggingface")
        assert load_file(tmp_path / f"out{i}/model.safetensors")["a.weight"].equal(WEIGHTS["a.weight"])
    assert (tmp_path / "out1/config.json").is_file()


def test_a_folder_may_have_an_equals_sign_in_its_name(save: Save, tmp_path: Path) -> None:
    folder = save("lr=0.001", random_weights(0))
    assert weighted_path(str(folder)) == (folder, 1.0)
    assert weighted_path(f"{folder}=0.5") == (folder, 0.5)
