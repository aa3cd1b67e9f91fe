"""Every layout trains the same model: a matrix of layouts, through the real launcher if they have four ranks, compared
with one rank.

`make test` runs layouts that cover every allowed pair of settings. `make test-full` runs the full matrix without
context ranks and the pairs with them; test_context_parallel.py has their matrix with tensor ranks, data ranks and ZeRO.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cuts import all_pairs, full
from helpers.launcher import TESTS, launched
from helpers.small_models import TINY_SHAPE
from helpers.worlds import run_script
from pydantic import ValidationError
from safetensors.torch import load_file

from btm_scale.config.layout import Layout
from btm_scale.distributed.precision import ask_device

pytestmark = pytest.mark.slow

LLAMA = {"family": "llama", **TINY_SHAPE}
GPT2 = {"family": "gpt2", **TINY_SHAPE, "kv_heads": 4}
STEPS = 20
AT_A_LAUNCH = 12  # layouts per launch: the threads of each layout's gloo groups live until the process ends
SETTINGS = {
    "tensor": [1, 2],
    "context": [1, 2],
    "data": [1, 2],
    "zero": [0, 1, 2, 3],
    "sequence_parallel": [False, True],
    "recompute": ["none", "selective", "full"],
    "offload": ["none", "optimizer", "all"],
}

Layouts = dict[str, dict[str, Any]]


def allowed_layouts() -> list[dict[str, Any]]:
    layouts = []
    for values in itertools.product(*SETTINGS.values()):
        layout = dict(zip(SETTINGS, values, strict=True))
        with contextlib.suppress(ValidationError):
            Layout.model_validate(layout)
            layouts.append(layout)
    return layouts


MATRIX = allowed_layouts()


def ranks_of(layout: Mapping[str, Any]) -> int:
    return Layout.model_validate(layout).ranks


def float32_layouts(matrix: Sequence[Mapping[str, Any]], ranks: int) -> Layouts:
    """Return the layouts of the matrix with this number of ranks."""
    return {
        "-".join(map(str, layout.values())): dict(layout) | {"precision": "fp32", "micro_batch": 2}
        for layout in matrix
        if ranks_of(layout) == ranks
    }


def launches() -> list[Any]:
    """Return layouts grouped by their number of ranks, at most AT_A_LAUNCH each."""
    pairs = all_pairs([layout for layout in MATRIX if ranks_of(layout) < 8])
    cases = [pytest.param(float32_layouts(pairs, ranks), id=f"pairs-{ranks}") for ranks in (1, 2, 4)]
    alone, sharing = ([layout for layout in MATRIX if layout["context"] == context] for context in (1, 2))
    every = [*alone, *all_pairs(sharing)]
    for ranks in (1, 2, 4, 8):
        layouts = float32_layouts(every, ranks)
        names = list(layouts)
        for start in range(0, len(names), AT_A_LAUNCH):
            part = {name: layouts[name] for name in names[start : start + AT_A_LAUNCH]}
            cases.append(full(part, id=f"{ranks}-from-{start}"))
    return cases


def half_precision_layouts(precision: str, tensor: int, data: int) -> Layouts:
    return {
        f"{precision}-{zero}": {
            "tensor": tensor,
            "data": data,
            "zero": zero,
            "precision": precision,
            "sequence_parallel": tensor > 1,
            "micro_batch": 2,
        }
        for zero in range(4)
    }


def trained(
    folder: Path,
    layouts: Layouts,
    shape: dict[str, Any] = LLAMA,
    *,
    optimizer: dict[str, Any] | None = None,
    launch: bool = False,
) -> dict[str, dict[str, torch.Tensor]]:
    """Train layouts of one number of ranks by the real launcher or a script; return their losses and weights."""
    folder.mkdir(exist_ok=True)
    first = next(iter(layouts.values()))
    # A loss scale at which tiny gradients do not overflow, so that no step is skipped.
    spec = {
        "folder": str(folder),
        "shape": shape,
        "steps": STEPS,
        "sequences": 8,
        "optimizer": optimizer or {},
        "deepspeed": {"fp16": {"initial_scale_power": 10}},
    }
    script = TESTS / "train" / "train_layouts.py"
    names = list(layouts)
    for start in range(0, len(names), AT_A_LAUNCH):
        part = spec | {"layouts": {name: layouts[name] for name in names[start : start + AT_A_LAUNCH]}}
        if launch:
            launched(script, ranks_of(first), part, folder)
        else:
            run_script(script, [part], folder)
    results = {name: load_file(folder / f"{name}.safetensors") for name in layouts}
    for tensors in results.values():
        del tensors["bytes"]
    return results


ONE_RANK = {"one": {"tensor": 1, "data": 1, "zero": 0, "precision": "fp32", "micro_batch": 2}}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return trained(tmp_path_factory.mktemp("one"), ONE_RANK)["one"]


def assert_same(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], losses: float, weights: float
) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).norm() / value.norm()
        if name == "losses":
            assert len(value) == STEPS
            assert value[-1] < value[0] - 0.3, "the reference must learn something"
            torch.testing.assert_close(actual[name], value, atol=losses, rtol=0)
        else:
            assert float(error) < weights, name


@pytest.mark.parametrize("layouts", launches())
def test_every_layout_matches_the_losses_and_weights_of_one_rank(
    layouts: Layouts, one_rank: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    launch = all(ranks_of(layout) == 4 for layout in layouts.values())
    for name, actual in trained(tmp_path, layouts, launch=launch).items():
        try:
            assert_same(actual, one_rank, losses=1e-5, weights=1e-4)
        except AssertionError as error:
            raise AssertionError(f"{'-'.join(SETTINGS)} {name}: {error}") from None


@pytest.mark.parametrize(("tensor", "data"), [full(1, 1), (2, 2)])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_float32_or_is_rejected(
    precision: str,
    tensor: int,
    data: int,
    one_rank: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as in `run_script`
    layouts = half_precision_layouts(precision, tensor, data)
    if precision not in ask_device().possible:
        with pytest.raises(AssertionError, match=f"LaunchError: Cannot train in {precision} on this CPU"):
            trained(tmp_path, layouts)
        return
    for actual in trained(tmp_path, layouts).values():
        assert_same(actual, one_rank, losses=2e-2, weights=2e-2)


def test_biases_and_learned_positions_train_the_same_with_sequence_parallelism(tmp_path: Path) -> None:
    # Softmax ignores a shift, so the gradient of the keys' biases is rounding error only. A larger eps keeps Adam from
    # amplifying it, so that every weight can be compared.
    optimizer = {"eps": 1e-5}
    expected = trained(tmp_path / "one", ONE_RANK, GPT2, optimizer=optimizer)["one"]
    layout = {
        "tensor": 2,
        "data": 1,
        "zero": 1,
        "sequence_parallel": True,
        "precision": "fp32",
        "micro_batch": 2,
    }
    actual = trained(tmp_path / "two", {"parts": layout}, GPT2, optimizer=optimizer)["parts"]
    assert_same(actual, expected, losses=1e-5, weights=1e-4)


@pytest.mark.parametrize("family", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_mlps_in_tiles_train_the_same_model(family: dict[str, Any], tmp_path: Path) -> None:
    optimizer = {"eps": 1e-5}  # as above
    expected = trained(tmp_path / "one", ONE_RANK, family, optimizer=optimizer)["one"]
    settings = {"recompute": "tiled", "precision": "fp32", "micro_batch": 8}
    layouts: list[dict[str, Any]] = [
        {"tensor": 2, "data": 1, "zero": 1, "sequence_parallel": True},
        {"tensor": 1, "data": 2, "zero": 2, "offload_activations": True},
        {"tensor": 1, "data": 2, "zero": 0},
    ]
    for actual in trained(
        tmp_path / "two",
        {str(number): layout | settings for number, layout in enumerate(layouts)},
        family,
        optimizer=optimizer,
    ).values():
        assert_same(actual, expected, losses=1e-5, weights=1e-4)


WIDE = LLAMA | {"hidden": 64, "ffn": 96}  # multiples of 16 on both tensor ranks


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return trained(tmp_path_factory.mktemp("wide"), ONE_RANK, WIDE)["one"]


def float8_layouts(ranks: int) -> Layouts:
    settings = {"precision": "bf16", "float8": True, "micro_batch": 2, "zero": 1}
    layouts: dict[int, list[dict[str, Any]]] = {
        1: [{"recompute": "full"}, {"zero": 0}],
        2: [
            {"tensor": 2},
            {"tensor": 2, "sequence_parallel": True, "recompute": "tiled"},
            {"context": 2, "zero": 2},
            {"data": 2, "zero": 3, "recompute": "selective"},
        ],
        4: [{"tensor": 2, "data": 2, "sequence_parallel": True, "zero": 3}],
    }
    return {f"float8-{number}": settings | layout for number, layout in enumerate(layouts[ranks])}


@pytest.mark.parametrize("ranks", [1, 2, full(4)])
def test_products_in_float8_follow_float32_in_every_layout(
    ranks: int, wide_model: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    for actual in trained(tmp_path, float8_layouts(ranks), WIDE).values():
        assert_same(actual, wide_model, losses=2e-2, weights=0.1)


@pytest.mark.parametrize("trains", ["all", "mlp"])
@pytest.mark.parametrize("family", ["gpt2", full("qwen2"), "qwen3"])
def test_but_for_their_rounding_products_in_float8_are_those_in_bfloat16(
    family: str, trains: str, tmp_path: Path
) -> None:
    """With biases, norms of heads and frozen weights, and gradients that are summed in the products."""
    sizes = WIDE | {"family": family} | ({"kv_heads": 4} if family == "gpt2" else {})
    layout = {"precision": "bf16", "micro_batch": 2}
    settings: dict[int, list[dict[str, Any]]] = {
        1: [{"zero": 1, "recompute": "selective"}, {"zero": 2, "recompute": "tiled"}],
        2: [{"tensor": 2, "zero": 1}, {"tensor": 2, "zero": 0, "sequence_parallel": True, "recompute": "full"}],
    }
    for ranks, some in settings.items():
        for number, setting in enumerate(some):
            spec = {
                "folder": str(tmp_path),
                "shape": sizes,
                "steps": 6,
                "sequences": 8,
                "trains": trains,
                "rounded_to_bfloat16": True,
                "layouts": {
                    f"{ranks}-{number}-{is_float8}": layout | setting | {"float8": is_float8}
                    for is_float8 in (True, False)
                },
            }
            run_script(TESTS / "train" / "train_layouts.py", [spec], tmp_path)
            ours, theirs = (load_file(tmp_path / f"{ranks}-{number}-{way}.safetensors") for way in (True, False))
            del ours["bytes"], theirs["bytes"]
            assert all(torch.equal(ours[name], value) for name, value in theirs.items()), setting


def test_a_run_in_float8_resumes_with_the_same_bits(tmp_path: Path) -> None:
    layout = {"precision": "bf16", "float8": True, "micro_batch": 2, "zero": 1}
    spec = {
        "folder": str(tmp_path),
        "shape": WIDE,
        "steps": STEPS,
        "sequences": 8,
        "layouts": {"all": layout, "first": layout, "rest": layout},
        "save": {"first": STEPS // 2},
        "begin": {"rest": "first"},
    }
    run_script(TESTS / "train" / "train_layouts.py", [spec], tmp_path)
    uninterrupted, resumed = (load_file(tmp_path / f"{name}.safetensors") for name in ("all", "rest"))
    for name, value in uninterrupted.items():
        if name not in ("losses", "bytes"):
            assert torch.equal(resumed[name], value), name
    assert torch.equal(resumed["losses"], uninterrupted["losses"][-len(resumed["losses"]) :])
