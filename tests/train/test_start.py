"""What an expert's training starts from: bitwise the mean of its parents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.complete_models import LLAMA, complete_weights, quantize, write_model
from helpers.tiny_run import save_card
from helpers.worlds import run_script
from safetensors.numpy import load_file

from btm_scale.model.hf_config import config_json, read_shape
from btm_scale.model.shape import ModelShape
from btm_scale.run_dir import SEED, RunDir

SHAPE = {
    "family": "llama",
    "layers": 2,
    "hidden": 32,
    "heads": 4,
    "kv_heads": 2,
    "ffn": 48,
    "positions": 16,
    "vocabulary": 61,
}
STEPS = {SEED: 3, "a": 4, "b": 6, "mlps": 5}
TRAINS = {"mlps": "mlp", "mlps-of-seed": "mlp", "mlps-of-mean": "mlp", "mlps-of-mlps": "mlp"}
MEAN = {"a": 0.25, "b": 0.75}
DECIMAL = {"a": 0.3, "b": 0.7}
BRANCHES: dict[str, dict[str, Any]] = {
    "alone": {"parents": {SEED: 1.0}, "optimizer": "carried"},
    "alone-fresh": {"parents": {SEED: 1.0}, "optimizer": "fresh"},
    "mean": {"parents": MEAN, "optimizer": "carried"},
    "mean-reversed": {"parents": dict(reversed(MEAN.items())), "optimizer": "carried"},
    "mean-fresh": {"parents": MEAN, "optimizer": "fresh"},
    "decimal": {"parents": DECIMAL, "optimizer": "carried"},
    "decimal-reversed": {"parents": dict(reversed(DECIMAL.items())), "optimizer": "carried"},
    "with-friend": {"parents": {"a": 0.25, "friend": 0.75}, "optimizer": "carried"},
    "friend-alone": {"parents": {"friend": 1.0}, "optimizer": "carried"},
    "wide-alone": {"parents": {"wide": 1.0}, "optimizer": "carried"},
    "all-of-mlps": {"parents": {"mlps": 1.0}, "optimizer": "carried"},
    "mlps-of-mlps": {"parents": {"mlps": 1.0}, "optimizer": "carried"},
    "mlps-of-seed": {"parents": {SEED: 1.0}, "optimizer": "carried"},
    "mlps-of-mean": {"parents": MEAN, "optimizer": "carried"},
    "gone": {"parents": {"a": 0.5, "gone": 0.5}, "optimizer": "carried"},
}

State = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A seed and two experts with training checkpoints, two models from elsewhere, and branches from all of them."""
    run = RunDir(tmp_path_factory.mktemp("run"))
    shape = ModelShape.model_validate(SHAPE)
    for name in STEPS:
        add_model(run, name, shape)
    friend, random = add_model(run, "friend", shape), torch.Generator().manual_seed(5)
    from safetensors.torch import save_file as save_torch

    from btm_scale.model.hf_weights import huggingface_shapes

    for name, sizes in (("friend", shape), ("wide", shape.model_copy(update={"hidden": 64}))):
        folder = friend if name == "friend" else add_model(run, name, sizes)
        tensors = {
            key: torch.randn(size, generator=random).bfloat16() for key, size in huggingface_shapes(sizes).items()
        }
        save_torch(tensors, folder / "model.safetensors")
    spec = {"root": str(run.root), "shape": SHAPE, "parents": STEPS, "branches": BRANCHES, "trains": TRAINS}
    run_script(Path(__file__).with_name("start_from_parents.py"), spec, run.root)
    return run


def add_model(run: RunDir, name: str, shape: ModelShape) -> Path:
    """A finished model, without its weights."""
    folder = run.model(name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json(shape, dtype="float32", end_of_text=0)))
    save_card(folder, name, content_hash=name)
    return folder


def checkpoint(run: RunDir, name: str) -> State:
    (folder,) = run.checkpoints(name).glob("step-*")
    return load_file(folder / "model.safetensors")


def numpy_mean(states: dict[str, State], weights: dict[str, float], key: str) -> np.ndarray:
    """The mean in float64, rounded to float32 once: a reference that shares no code with the merger."""
    total = sum(weight * states[name][key].astype(np.float64) for name, weight in weights.items())
    return np.asarray(total / sum(weights.values())).astype(np.float32)


def begun(run: RunDir, name: str) -> State:
    return load_file(run.root / f"{name}.safetensors")


def assert_same_bits(state_at_start: np.ndarray, expected: np.ndarray, key: str) -> None:
    assert state_at_start.dtype == expected.dtype == np.float32
    assert state_at_start.tobytes() == expected.tobytes(), key


def test_a_branch_of_the_seed_starts_bitwise_from_the_seeds_checkpoint(run: RunDir) -> None:
    state_at_start, seed = begun(run, "alone"), checkpoint(run, SEED)
    assert state_at_start.pop("adam_steps") == STEPS[SEED]
    assert state_at_start.keys() == seed.keys()
    for key, expected in seed.items():
        assert_same_bits(state_at_start[key], expected, key)


def test_a_fresh_optimizer_starts_from_the_parents_weights_with_zero_moments(run: RunDir) -> None:
    state_at_start, seed = begun(run, "alone-fresh"), checkpoint(run, SEED)
    assert state_at_start.pop("adam_steps") == 0
    for key, value in state_at_start.items():
        assert_same_bits(value, seed[key] if key.startswith("master/") else np.zeros_like(value), key)


@pytest.mark.parametrize(("name", "parent"), [("mlps-of-seed", SEED), ("mlps-of-mlps", "mlps")])
def test_an_expert_that_trains_its_mlps_carries_their_moments(run: RunDir, name: str, parent: str) -> None:
    state_at_start, source = begun(run, name), checkpoint(run, parent)
    assert state_at_start.pop("adam_steps") == STEPS[parent]
    for key, value in state_at_start.items():
        is_carried = key.startswith("master/") or ".mlp." in key
        assert_same_bits(value, source[key] if is_carried else np.zeros_like(value), key)


def test_the_mean_of_two_parents_for_mlps_alone_reads_no_other_moment(run: RunDir) -> None:
    state_at_start, states = begun(run, "mlps-of-mean"), {parent: checkpoint(run, parent) for parent in MEAN}
    for key, value in state_at_start.items():
        if key.startswith("master/") or ".mlp." in key:
            assert_same_bits(value, numpy_mean(states, MEAN, key), key)


def test_a_parent_that_trained_its_mlps_alone_has_no_moments_for_a_child_that_trains_everything(run: RunDir) -> None:
    state_at_start, parent = begun(run, "all-of-mlps"), checkpoint(run, "mlps")
    assert not any(key.startswith("exp_avg") and ".mlp." not in key for key in parent)
    assert state_at_start.pop("adam_steps") == 0
    for key, value in state_at_start.items():
        assert_same_bits(value, parent[key] if key.startswith("master/") else np.zeros_like(value), key)


@pytest.mark.parametrize("name", ["mean", "mean-reversed"])
def test_the_mean_of_two_parents_and_their_moments_equals_numpys_bitwise(run: RunDir, name: str) -> None:
    state_at_start, states = begun(run, name), {parent: checkpoint(run, parent) for parent in MEAN}
    assert state_at_start.pop("adam_steps") == max(STEPS[parent] for parent in MEAN)
    assert state_at_start.keys() == states["a"].keys()
    for key, value in state_at_start.items():
        assert_same_bits(value, numpy_mean(states, MEAN, key), key)
    assert any(np.any(value) for key, value in state_at_start.items() if key.startswith("exp_avg_sq/"))


def test_the_mean_does_not_depend_on_the_order_of_the_parents(run: RunDir) -> None:
    """Weighted sums are often halfway between two float32 numbers, where the last bit of the float64 sum decides.

    There, the order of summation shows: parents are added in the order of their content, each by one fused
    multiply-add, however they are listed.
    """
    state_at_start, other = begun(run, "decimal"), begun(run, "decimal-reversed")
    states = {parent: checkpoint(run, parent) for parent in DECIMAL}
    in_order, differing = {}, 0
    for order in (("a", "b"), ("b", "a")):
        sums = {key: fused_sum(states, order, key) for key in states["a"]}
        in_order[order] = all(sums[key].tobytes() == state_at_start[key].tobytes() for key in sums)
        differing += sum(int(np.sum(sums[key] != state_at_start[key])) for key in sums)
    assert sorted(in_order.values()) == [False, True]
    assert differing > 0
    for key, state in states["a"].items():
        assert_same_bits(state_at_start[key], other[key], key)
        numpys = numpy_mean(states, DECIMAL, key)
        np.testing.assert_array_max_ulp(state_at_start[key], numpys, maxulp=1)
        assert state_at_start[key].shape == state.shape


def fused_sum(states: dict[str, State], order: tuple[str, ...], key: str) -> np.ndarray:
    """The mean as torch accumulates it in float64, parent by parent."""
    total = torch.zeros(states["a"][key].shape, dtype=torch.float64)
    for name in order:
        total.add_(torch.from_numpy(states[name][key].astype(np.float64)), alpha=DECIMAL[name])
    return total.float().numpy()


def test_a_mean_with_a_fresh_optimizer_has_zero_moments(run: RunDir) -> None:
    state_at_start, states = begun(run, "mean-fresh"), {parent: checkpoint(run, parent) for parent in MEAN}
    assert state_at_start.pop("adam_steps") == 0
    for key, value in state_at_start.items():
        expected = numpy_mean(states, MEAN, key) if key.startswith("master/") else np.zeros_like(value)
        assert_same_bits(value, expected, key)


def test_moments_are_zero_unless_every_parent_has_them(run: RunDir) -> None:
    """`friend` is a bfloat16 model without a checkpoint."""
    friend = torch_file(run.model("friend") / "model.safetensors")
    states = {"a": checkpoint(run, "a"), "friend": {f"master/{name}": value for name, value in friend.items()}}
    weights = BRANCHES["with-friend"]["parents"]
    for branch in ("with-friend", "friend-alone"):
        state_at_start = begun(run, branch)
        assert state_at_start.pop("adam_steps") == 0
        for key, value in state_at_start.items():
            own = weights if branch == "with-friend" else {"friend": 1.0}
            expected = numpy_mean(states, own, key) if key.startswith("master/") else np.zeros_like(value)
            assert_same_bits(value, expected, key)


def torch_file(path: Path) -> State:
    from safetensors.torch import load_file as load_torch

    return {name: tensor.float().numpy() for name, tensor in load_torch(path).items()}


def test_the_mean_is_deleted_once_it_is_loaded(run: RunDir) -> None:
    left = [path.name for name in BRANCHES for path in run.train(name).glob("*")]
    assert left == []
    assert not (run.root / "branches").exists()


def test_a_missing_parent_and_one_of_another_shape_are_errors(run: RunDir) -> None:
    message = (run.root / "gone.txt").read_text()
    assert "gone branches from 'gone', which has neither a training checkpoint nor a finished model" in message
    message = (run.root / "wide-alone.txt").read_text()
    assert "Only models of one shape can be branched from" in message
    assert "(61, 64) there and (61, 32) in this model" in message


def test_a_pretrained_model_in_fp8_starts_from_what_its_scales_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from btm_scale.train import start  # imports the engines

    stored, meant = quantize(complete_weights(0))
    section = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    folder = write_model(tmp_path / "model", stored, LLAMA | section)
    read: dict[str, torch.Tensor] = {}

    def keep(model: object, reader: Callable[[str], torch.Tensor], rank: int, tensor: int) -> None:
        read.update({name: reader(name) for name in meant})

    monkeypatch.setattr(start, "load_weights", keep)
    group: Any = SimpleNamespace(tensor_rank=0, layout=SimpleNamespace(tensor=1))
    model: Any = SimpleNamespace(shape=read_shape(folder))
    start.load_pretrained(group, model, folder)
    assert all(tensor.equal(meant[name].bfloat16()) for name, tensor in read.items())
