"""Checkpoints saved by the real DeepSpeed engine, read without it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.cuts import all_pairs, cut
from helpers.worlds import run_script
from safetensors.torch import load_file

from btm_scale.checkpoint.formats.deepspeed import open_deepspeed, training_step
from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.errors import CheckpointError
from btm_scale.model.hf_config import config_json
from btm_scale.model.hf_names import join, table, to_huggingface
from btm_scale.model.shape import ModelShape

SAVER = Path(__file__).with_name("save_with_engine.py")
SIZES = {"layers": 2, "hidden": 32, "heads": 4, "ffn": 40, "positions": 16}
AXES: dict[str, tuple[Any, ...]] = {
    "tensor": (1, 2),
    "data": (1, 2),
    "stage": (1, 2, 3),
    "head": ("tied", "untied"),
    "attention": ("grouped", "plain"),
    "vocabulary": ("even", "odd"),
}
SHAPES: dict[str, dict[str, Any]] = {
    f"{head}-{attention}-{vocabulary}": SIZES
    | {
        "tied": head == "tied",
        "kv_heads": 2 if attention == "grouped" else 4,
        "vocabulary": 64 if vocabulary == "even" else 65,
    }
    for head, attention, vocabulary in itertools.product(AXES["head"], AXES["attention"], AXES["vocabulary"])
}
FAMILIES = {"gpt2": "gpt2", "biases": "qwen2", "head-norms": "qwen3"}
SHAPES |= {name: SIZES | {"family": family, "kv_heads": 4, "vocabulary": 65} for name, family in FAMILIES.items()}


class Case(NamedTuple):
    """A checkpoint: the layout and ZeRO stage of the engine that saved it, and the name of its model shape."""

    tensor: int
    data: int
    shape: str
    stage: int

    @classmethod
    def of(cls, tensor: int, data: int, stage: int, head: str, attention: str, vocabulary: str) -> Case:
        return cls(tensor, data, f"{head}-{attention}-{vocabulary}", stage)


GRID = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]
OTHERS = [("tied-grouped-odd", 0), ("gpt2", 1), ("biases", 2), ("head-norms", 3)]
EVERY = [
    *(Case.of(**values) for values in GRID),
    *(Case(tensor, data, *other) for tensor in (1, 2) for data in (1, 2) for other in OTHERS),
]
# The checkpoints of single tests, every pair of settings, and one layout of the other families.
QUICK = {
    *(Case.of(**values) for values in all_pairs(GRID)),
    *(Case(2, 2, *other) for other in OTHERS),
    *(Case(1, data, "untied-plain-odd", stage) for data in (1, 2) for stage in (2, 3)),
    Case(1, 1, "tied-grouped-odd", 1),
    Case(2, 2, "tied-grouped-odd", 2),
    Case(2, 2, "tied-grouped-odd", 3),
}
CASES = cut(EVERY, QUICK.__contains__, name=lambda case: "-".join(map(str, case)))
Saved = Callable[[Case], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Return the folder of a case. One script, which imports the engine once, saves all cases of a cut."""
    folders: dict[Case, Path] = {}

    def folder_of(case: Case) -> Path:
        if case not in folders:
            same_cut = [other for other in EVERY if (other in QUICK) == (case in QUICK)]
            folders.update(saved_by_the_engine(same_cut, tmp_path_factory.mktemp("engine")))
        return folders[case]

    return folder_of


def saved_by_the_engine(cases: Sequence[Case], root: Path) -> dict[Case, Path]:
    folders = {case: root / "-".join(map(str, case)) for case in cases}
    worlds: dict[tuple[int, int], dict[str, Any]] = {}
    for case, folder in folders.items():
        shape = SHAPES[case.shape]
        folder.mkdir()
        config = config_json(ModelShape(**shape), dtype="float32", end_of_text=None)
        (folder / "config.json").write_text(json.dumps(config))
        world = worlds.setdefault((case.tensor, case.data), {"tensor": case.tensor, "data": case.data, "variants": []})
        world["variants"].append({"folder": str(folder), "shape": shape, "stage": case.stage})
    run_script(SAVER, list(worlds.values()), root)
    return folders


def engine_weights(case: Case, folder: Path, shape: ModelShape) -> dict[str, torch.Tensor]:
    """Return the engine's full weights under Hugging Face names."""
    parts = [load_file(folder / f"engine-{rank}.safetensors") for rank in range(case.tensor)]
    weights: dict[str, torch.Tensor] = {}
    for entry in table(shape):
        weights |= to_huggingface(entry, join(entry, [part[entry.megatron] for part in parts]), shape)
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_weights_read_are_the_engines_weights(saved: Saved, case: Case) -> None:
    folder, shape = saved(case), ModelShape(**SHAPES[case.shape])
    expected = engine_weights(case, folder, shape)
    with open_deepspeed(folder) as model:
        assert set(model.names) == set(expected)
        for tensor in model.names:
            assert model.read(tensor).dtype == (torch.float32 if case.stage else torch.bfloat16)
            assert model.read(tensor).equal(expected[tensor]), tensor
            middle = max(5, expected[tensor].numel() // 2)
            assert model.read_range(tensor, 5, middle).equal(expected[tensor].reshape(-1)[5:middle])
    assert training_step(folder) == 2


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_weights_read_give_megatrons_logits_in_transformers(saved: Saved, case: Case) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = saved(case)
    settings = json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    with open_deepspeed(folder) as reader:
        unmatched = model.load_state_dict({key: reader.read(key) for key in reader.names}, strict=False)
    assert unmatched.unexpected_keys == []
    assert unmatched.missing_keys == (["lm_head.weight"] if settings["tie_word_embeddings"] else [])
    expected = load_file(folder / "logits.safetensors")
    with torch.no_grad():
        logits = model(expected["tokens"]).logits
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=1e-4)
    assert float(logits.abs().max()) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("data", [1, 2])
@pytest.mark.parametrize("stage", [2, 3])
def test_the_weights_read_equal_those_of_deepspeeds_own_converter(saved: Saved, stage: int, data: int) -> None:
    """DeepSpeed's converter does not support tensor parallel checkpoints."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    case = Case(1, data, "untied-plain-odd", stage)
    folder = saved(case)
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    shape = ModelShape(**SHAPES[case.shape])
    with open_deepspeed(folder) as ours:
        for entry in table(shape):
            for tensor, value in to_huggingface(entry, theirs[entry.megatron], shape).items():
                assert ours.read(tensor).equal(value)


@pytest.mark.slow
def test_16_bit_weights_are_read_if_saved_and_raise_otherwise(saved: Saved) -> None:
    masters = open_deepspeed(saved(Case(2, 2, "tied-grouped-odd", 2)))
    halves = open_deepspeed(saved(Case(2, 2, "tied-grouped-odd", 2)), master=False)
    for name in masters.names:
        assert halves.read(name).equal(masters.read(name).bfloat16())
    with pytest.raises(CheckpointError, match="ZeRO 3, which leaves out"):
        open_deepspeed(saved(Case(2, 2, "tied-grouped-odd", 3)), master=False)


@pytest.mark.slow
def test_models_of_different_formats_merge(saved: Saved, tmp_path: Path) -> None:
    first, second = saved(Case(1, 1, "tied-grouped-odd", 1)), saved(Case(2, 2, "tied-grouped-odd", 3))
    merge(tmp_path / "converted", [(second, 1.0)])
    mixed = merge(tmp_path / "mixed", [(first, 1.0), (tmp_path / "converted", 2.0)])
    same = merge(tmp_path / "same", [(first, 1.0), (second, 2.0)])
    assert mixed.content_hash == same.content_hash


@pytest.mark.slow
def test_damaged_files_and_wrong_or_missing_configs_raise(saved: Saved, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(saved(Case(2, 2, "tied-grouped-odd", 2)), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="lacks the tensor"):
        open_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"Put the config\.json"):
        open_model(folder)
    optimizer = next(folder.glob("*/*_optim_states.pt"))
    optimizer.write_bytes(optimizer.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="Copy it again"):
        open_model(folder)


def universal(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    for name, tensor in weights.items():
        (folder / "zero" / name).mkdir(parents=True)
        torch.save({"param": tensor}, folder / "zero" / name / "fp32.pt")


def test_a_universal_checkpoint_is_read(tmp_path: Path) -> None:
    weights = {"layer.weight": torch.randn(3, 5), "norm.weight": torch.randn(5)}
    universal(tmp_path, weights)
    model = open_model(tmp_path)
    assert model.names == ("layer.weight", "norm.weight")
    assert all(model.read(name).equal(tensor) for name, tensor in weights.items())
    merge(tmp_path / "out", [(tmp_path, 1.0)])
    assert SafetensorsModel(tmp_path / "out").read("layer.weight").equal(weights["layer.weight"])
