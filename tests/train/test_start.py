"""What an expert's training starts from: the mean of its parents, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_run import save_card
from helpers.worlds import run_script
from safetensors.numpy import load_file

from btm_scale.model.hf_config import config_json
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
STEPS = {SEED: 3, "a": 4, "b": 6}
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
    spec = {"root": str(run.root), "shape": SHAPE, "parents": STEPS, "branches": BRANCHES}
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
    """The mean in float64, rounded to float32 once: an oracle that shares no code with the merger."""
    total = sum(weight * states[name][key].astype(np.float64) for name, weight in weights.items())
    return np.asarray(total / sum(weights.values())).astype(np.float32)


def begun(run: RunDir, name: str) -> State:
    return load_file(run.root / f"{name}.safetensors")


def assert_same_bits(found: np.ndarray, expected: np.ndarray, key: str) -> None:
    assert found.dtype == expected.dtype == np.float32
    assert found.tobytes() == expected.tobytes(), key


def test_a_branch_of_the_seed_begins_with_the_seeds_checkpoint_to_the_bit(run: RunDir) -> None:
    found, seed = begun(run, "alone"), checkpoint(run, SEED)
    assert found.pop("adam_steps") == STEPS[SEED]
    assert found.keys() == seed.keys()
    for key, expected in seed.items():
        assert_same_bits(found[key], expected, key)


def test_a_fresh_optimizer_takes_the_parents_weights_and_no_moments(run: RunDir) -> None:
    found, seed = begun(run, "alone-fresh"), checkpoint(run, SEED)
    assert found.pop("adam_steps") == 0
    for key, value in found.items():
        assert_same_bits(value, seed[key] if key.startswith("master/") else np.zeros_like(value), key)


@pytest.mark.parametrize("name", ["mean", "mean-reversed"])
def test_a_mean_of_two_parents_is_numpys_to_the_bit_moments_included(run: RunDir, name: str) -> None:
    found, states = begun(run, name), {parent: checkpoint(run, parent) for parent in MEAN}
    assert found.pop("adam_steps") == max(STEPS[parent] for parent in MEAN)
    assert found.keys() == states["a"].keys()
    for key, value in found.items():
        assert_same_bits(value, numpy_mean(states, MEAN, key), key)
    assert any(np.any(value) for key, value in found.items() if key.startswith("exp_avg_sq/"))


def test_the_order_of_the_parents_changes_no_bit_of_their_mean(run: RunDir) -> None:
    """Tenths of float32 numbers are often halfway between two, where the last bit of the float64 sum decides.

    So there the order of the addends shows: parents are added in the order of their content, each by one fused
    multiply-add, however they are listed.
    """
    found, other = begun(run, "decimal"), begun(run, "decimal-reversed")
    states = {parent: checkpoint(run, parent) for parent in DECIMAL}
    in_order, differing = {}, 0
    for order in (("a", "b"), ("b", "a")):
        sums = {key: fused_sum(states, order, key) for key in states["a"]}
        in_order[order] = all(sums[key].tobytes() == found[key].tobytes() for key in sums)
        differing += sum(int(np.sum(sums[key] != found[key])) for key in sums)
    assert sorted(in_order.values()) == [False, True]
    assert differing > 0
    for key, state in states["a"].items():
        assert_same_bits(found[key], other[key], key)
        numpys = numpy_mean(states, DECIMAL, key)
        np.testing.assert_array_max_ulp(found[key], numpys, maxulp=1)
        assert found[key].shape == state.shape


def fused_sum(states: dict[str, State], order: tuple[str, ...], key: str) -> np.ndarray:
    """A mean as torch accumulates it in float64, a parent after the other."""
    total = torch.zeros(states["a"][key].shape, dtype=torch.float64)
    for name in order:
        total.add_(torch.from_numpy(states[name][key].astype(np.float64)), alpha=DECIMAL[name])
    return total.float().numpy()


def test_a_mean_with_a_fresh_optimizer_has_the_mean_weights_and_no_moments(run: RunDir) -> None:
    found, states = begun(run, "mean-fresh"), {parent: checkpoint(run, parent) for parent in MEAN}
    assert found.pop("adam_steps") == 0
    for key, value in found.items():
        expected = numpy_mean(states, MEAN, key) if key.startswith("master/") else np.zeros_like(value)
        assert_same_bits(value, expected, key)


def test_moments_are_left_out_unless_every_parent_has_them(run: RunDir) -> None:
    """The friend is a model in bfloat16 without a checkpoint."""
    friend = torch_file(run.model("friend") / "model.safetensors")
    states = {"a": checkpoint(run, "a"), "friend": {f"master/{name}": value for name, value in friend.items()}}
    weights = BRANCHES["with-friend"]["parents"]
    for branch in ("with-friend", "friend-alone"):
        found = begun(run, branch)
        assert found.pop("adam_steps") == 0
        for key, value in found.items():
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


def test_a_parent_that_is_gone_or_of_another_shape_is_named(run: RunDir) -> None:
    told = (run.root / "gone.txt").read_text()
    assert "gone branches from 'gone', which has neither a training checkpoint nor a finished model" in told
    told = (run.root / "wide-alone.txt").read_text()
    assert "Only models of one shape can be branched from" in told
    assert "(61, 64) there and (61, 32) in this model" in told
