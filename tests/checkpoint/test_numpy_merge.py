"""Small merges do without torch, and give the bytes that they have with it."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cuts import cut
from helpers.small_models import Save, random_weights
from safetensors.torch import load_file

from btm_scale.checkpoint.merge import numpy_runner, workers
from btm_scale.checkpoint.merge.arrays import add_weighted
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.checkpoint.merge.numpy_runner import Arrays, NumpyRunner
from btm_scale.checkpoint.merge.registry import METHODS
from btm_scale.checkpoint.merge.runner import UnitRunner

ELEMENTWISE = sorted(name for name, method in METHODS.items() if method.elementwise and name != "moe")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
OUTPUTS = {**DTYPES, "F64": torch.float64}
WEIGHTS = [0.3, 1.0, -0.7]


def awkward(seed: int, dtype: torch.dtype, largest: float) -> dict[str, torch.Tensor]:
    """Return a model with zeros, subnormals, large numbers and those whose sums are ties beside normal numbers."""
    draw = torch.Generator().manual_seed(seed)
    tiny = torch.finfo(dtype).tiny
    special = [0.0, -0.0, tiny, -tiny / 4, tiny / 2, largest, 1.0, -1.5, 3.0]
    values = torch.randn(60, 50, generator=draw, dtype=torch.float64)
    values *= 10.0 ** torch.randint(-6, 3, (60, 50), generator=draw)
    at = torch.randint(0, 3000, (400,), generator=draw)
    values.view(-1)[at] = torch.tensor(special, dtype=torch.float64)[torch.randint(0, 9, (400,), generator=draw)]
    return random_weights(seed, dtype) | {"model.layers.1.mlp.up_proj.weight": values.to(dtype)}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Merge without torch, and count the units that NumPy merged in the list's only number."""
    number = [0]
    run = NumpyRunner._merge_into

    def merge_into(self: NumpyRunner, out: np.ndarray, part: workers.Unit) -> bool:
        is_merged = run(self, out, part)
        number[0] += is_merged
        return is_merged

    monkeypatch.setattr(NumpyRunner, "_merge_into", merge_into)
    monkeypatch.setattr(workers, "torch_is_loaded", lambda: False)
    return number


@pytest.mark.parametrize(
    "case",
    cut(
        list(itertools.product([*ELEMENTWISE, "copy"], DTYPES, OUTPUTS)),
        lambda case: case[1:] in (("F32", "F64"), ("BF16", "BF16"), ("F16", "F16")),
        "-".join,
    ),
)
def test_numpy_gives_the_bytes_of_torch(
    case: tuple[str, str, str], save: Save, tmp_path: Path, counted: list[int]
) -> None:
    method, dtype, output = case
    how = METHODS["linear" if method == "copy" else method]
    count = 1 if method == "copy" else how.exactly or 3
    method = how.name
    largest = min(torch.finfo(DTYPES[dtype]).max, torch.finfo(OUTPUTS[output]).max) / 64
    models = [save(f"m{i}", awkward(i, DTYPES[dtype], largest)) for i in range(count)]
    base = save("base", awkward(9, DTYPES[dtype], largest)) if how.needs_base else None
    inputs = list(zip(models, WEIGHTS if how.weighted else [1.0] * 3, strict=False))
    wanted = str(OUTPUTS[output]).removeprefix("torch.")
    parameters = {"scale": 0.7} if method == "passthrough" else {}

    def merged(name: str) -> str:
        return merge(
            tmp_path / name, inputs, method=method, base=base, dtype=wanted, parameters=parameters
        ).content_hash

    by_numpy = merged("numpy")
    assert counted[0] == 6  # one unit per tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "torch_is_loaded", lambda: True)
        assert merged("torch") == by_numpy
    assert counted[0] == 6
    for file in ("model.safetensors", "config.json", "merge_recipe.yaml", "README.md"):
        assert (tmp_path / "numpy" / file).read_bytes() == (tmp_path / "torch" / file).read_bytes()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_numbers_that_are_not_finite_are_left_to_torch(
    value: float, save: Save, tmp_path: Path, counted: list[int]
) -> None:
    weights = [random_weights(i, torch.float32) for i in range(2)]
    weights[0]["model.norm.weight"][3] = value
    models = [(save(f"m{i}", each), 1.0) for i, each in enumerate(weights)]
    report = merge(tmp_path / "a", models, dtype="float16")
    assert counted[0] == len(weights[0]) - 1
    assert (report.nonfinite.nan, report.nonfinite.infinite) == (int(math.isnan(value)), int(not math.isnan(value)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "torch_is_loaded", lambda: True)
        assert merge(tmp_path / "b", models, dtype="float16").content_hash == report.content_hash


def test_units_that_are_left_to_torch_do_not_change_its_number_of_threads(
    save: Save, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {f"{i}.weight": torch.full((40, 50), math.nan) for i in range(40)}
    models = [(save(f"m{i}", weights), 1.0) for i in range(2)]
    run, delays = UnitRunner.__call__, itertools.cycle([0.03, 0.01, 0.02])

    def slowly(self: UnitRunner, unit: workers.Unit) -> object:
        time.sleep(next(delays))  # units overlap, and end in another order than they begin
        return run(self, unit)

    monkeypatch.setattr(UnitRunner, "__call__", slowly)
    monkeypatch.setattr(workers, "visible_cores", lambda: 8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        merge(tmp_path / "out", models, jobs=1)
        with ThreadPoolExecutor(1) as pool:  # a new thread takes the number of the process
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
    assert counted[0] == 0


@pytest.mark.parametrize(("models", "method"), [("float64", "linear"), ("float32", "slerp"), ("pickled", "linear")])
def test_other_merges_are_left_to_torch(
    models: str,
    method: str,
    save: Save,
    tmp_path: Path,
    counted: list[int],
) -> None:
    dtype = torch.float64 if models == "float64" else torch.float32
    folders = [save(f"m{i}", random_weights(i, dtype)) for i in range(2)]
    if models == "pickled":
        torch.save(load_file(folders[0] / "model.safetensors"), folders[0] / "pytorch_model.bin")
        (folders[0] / "model.safetensors").unlink()
    merge(tmp_path / "out", [(folder, 1.0) for folder in folders], method=method)
    assert counted[0] == 0


@pytest.mark.parametrize(
    ("weights", "normalize", "most", "more", "by_numpy"),
    [
        ((1.0, 1.0), 1, 6 << 30, {}, 6),
        ((1.0, 1.0), 0, 6 << 30, {}, 6),
        ((1.0, 1.0), 1, 1 << 10, {}, 1),  # a copy of the boolean mask
        ((0.5, 1.0), 1, 6 << 30, {}, 1),
        ((1.0, 1.0), 1, 6 << 30, {"wide.weight": torch.ones(9, dtype=torch.float64)}, 1),
    ],
)
def test_a_large_merge_adds_without_torch_if_it_only_adds_and_not_too_much(
    weights: Sequence[float],
    normalize: float,
    most: int,
    more: dict[str, torch.Tensor],
    by_numpy: int,
    save: Save,
    tmp_path: Path,
    counted: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(numpy_runner, "MOST_BYTES", 1 << 10)
    monkeypatch.setattr(numpy_runner, "MOST_SUMMED", most)
    folders = [save(f"m{i}", awkward(i, torch.bfloat16, 1e30) | more) for i in range(2)]
    inputs = [*zip(folders, weights, strict=True)]
    found = merge(tmp_path / "out", inputs, parameters={"normalize": normalize}).content_hash
    assert counted[0] == by_numpy
    monkeypatch.setattr(workers, "torch_is_loaded", lambda: True)
    assert merge(tmp_path / "by torch", inputs, parameters={"normalize": normalize}).content_hash == found
    assert counted[0] == by_numpy


def test_the_product_that_is_added_is_rounded_once() -> None:
    """Beside exact rational arithmetic, which Python rounds correctly."""
    from fractions import Fraction

    draw = np.random.default_rng(0)
    for _ in range(20):
        total, array = (draw.normal(size=200) * 10.0 ** draw.integers(-8, 8, 200) for _ in range(2))
        weight = float(draw.normal())
        array[::3] = -total[::3] / weight  # cancels almost completely
        expected = [
            float(Fraction(one) + Fraction(weight) * Fraction(other))
            for one, other in zip(total.tolist(), array.tolist(), strict=True)
        ]
        by_torch = torch.from_numpy(total.copy())
        add_weighted(by_torch, weight, torch.from_numpy(array.copy()))
        add_weighted(total, weight, array)
        assert total.tolist() == expected == by_torch.tolist()


def test_numbers_of_16_bits_are_widened_and_sums_are_rounded_as_torch_does() -> None:
    bits = np.arange(1 << 16, dtype="<u2")
    draw = torch.Generator().manual_seed(0)
    for code in ("BF16", "F16"):
        own = torch.from_numpy(bits.copy()).view(DTYPES[code]).double()
        with np.errstate(invalid="ignore"):
            assert np.array_equal(Arrays().widened("input", bits.data.cast("B"), code), own.numpy(), equal_nan=True)
    values = torch.randn(1 << 16, generator=draw, dtype=torch.float64)
    values *= 2.0 ** torch.randint(-40, 12, (1 << 16,), generator=draw)
    halves = values.bfloat16().double() * (1 + 2**-8)  # ties
    for each in (values, halves):
        for code, dtype in OUTPUTS.items():
            expected = each.to(dtype).view(torch.uint8)
            rounded = np.empty(expected.numel(), "u1")
            Arrays().narrow_into(rounded, each.numpy(), code)
            assert torch.from_numpy(rounded).equal(expected), code


def test_a_small_merge_of_the_command_imports_neither_torch_nor_other_large_libraries(
    save: Save, tmp_path: Path
) -> None:
    models = [save(f"m{i}", random_weights(i)) for i in range(2)]
    heavy = ("torch", "transformers", "tokenizers", "safetensors", "rich", "plotly", "scipy")
    arguments = ["merge", str(tmp_path / "out"), f"{models[0]}=0.3", str(models[1]), "--json"]
    code = (
        f"import sys\nfrom btm_scale.cli.app import main\nmain({arguments})\n"
        f"assert not (imported := [name for name in {heavy} if name in sys.modules]), imported"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    expected = merge(tmp_path / "again", [(models[0], 0.3), (models[1], 1.0)]).content_hash
    assert json.loads(done.stdout)["content_hash"] == expected
