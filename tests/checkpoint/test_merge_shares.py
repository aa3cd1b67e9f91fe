"""Large merges that mostly copy: which process merges what, and which of them import torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_models import HUGGINGFACE_SIZES

from btm_scale.checkpoint.formats.tensors import as_bytes, dtype_of
from btm_scale.checkpoint.hashing import hash_and_keep
from btm_scale.checkpoint.merge import numpy_runner, workers
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.checkpoint.merge.moe import ComputedRouter, Ingredients
from btm_scale.checkpoint.merge.numpy_runner import _is_finite
from btm_scale.checkpoint.merge.plan import MergePlan
from btm_scale.checkpoint.merge.planning import make_plan
from btm_scale.checkpoint.merge.shares import Shares

NAMES = ("a", "b", "c")
SIZES: dict[str, Any] = HUGGINGFACE_SIZES | {"model_type": "llama", "max_position_embeddings": 32}

# A merge of several processes that believes its models to be large, in a process that has not imported torch.
LARGE = """
import os, sys
from pathlib import Path
from btm_scale.checkpoint.formats import safetensors_writer
from btm_scale.checkpoint.merge import numpy_runner, workers
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.checkpoint.merge.moe import Ingredients
from btm_scale.checkpoint.merge.plan import MergePlan
from btm_scale.util import direct_io
from btm_scale.util.direct_io import BLOCK

folder, shared, jobs = Path(sys.argv[1]), sys.argv[2] == "shared", int(sys.argv[3])
numpy_runner.MOST_BYTES = 0
MergePlan.is_large = property(lambda plan: True)
direct = sys.argv[4] == "direct"
workers.is_worthwhile = lambda nbytes: direct
numpy_runner._WRITTEN_BYTES = 2 * BLOCK  # several pieces in a unit, and blocks that are not complete
open_direct, write_at = safetensors_writer.open_direct, direct_io.write_at
opened, written = [], []

def opened_anyway(path):  # where the file system has no direct I/O, what would be written directly is written anyhow
    descriptor = open_direct(path)
    opened.append(os.open(path, os.O_WRONLY) if descriptor is None else descriptor)
    return opened[-1]

def counted(descriptor, data, offset):
    written.append(len(data) if descriptor in opened else 0)
    write_at(descriptor, data, offset)

safetensors_writer.open_direct, direct_io.write_at = opened_anyway, counted

class Refused:
    def find_spec(self, name, *_):
        assert name != "torch"

if shared:  # none of the processes imports torch
    sys.meta_path.insert(0, Refused())
inputs = [(folder / name, 1.0) for name in "abc"]
report = merge(folder / f"{sys.argv[2]}-{jobs}-{sys.argv[4]}", inputs, method="moe", jobs=jobs,
               ingredients=Ingredients(tuple("abc"), shared=shared))
if jobs == 1:
    assert bool(sum(written)) == direct
print(report.content_hash)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("experts")
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES), dtype=torch.bfloat16).save_pretrained(
            root / name
        )
    return root


def plan_of(folder: Path, *, shared: bool, router: ComputedRouter | None = None) -> MergePlan:
    return make_plan(
        [(folder / name, 1.0) for name in NAMES],
        method="moe",
        parameters=None,
        base=None,
        dtype=None,
        max_shard_bytes=float("inf"),
        seed=0,
        ingredients=Ingredients(NAMES, router, shared=shared),
    )


def added(plan: MergePlan) -> set[str]:
    """Return the tensors that are neither copied nor drawn."""
    return {name for name in plan.specs if plan.how(name).models and not plan.copies(name)}


@pytest.mark.parametrize("torch_starts", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize("shared", [False, True])
def test_every_unit_is_in_one_share_and_no_share_is_much_larger_than_another(
    folder: Path, shared: bool, size: int, torch_starts: bool
) -> None:
    plan = plan_of(folder, shared=shared)
    assert bool(added(plan)) != shared
    shares = Shares(plan, added(plan) if torch_starts else set(), set(plan.units[::2]))
    given = shares.of(plan.units, size)
    assert sorted((unit for own in given for unit in own), key=plan.units.index) == plan.units
    assert all(own == sorted(own, key=plan.units.index) for own in given)
    if not torch_starts:
        load = [sum(map(shares.cost, own)) for own in given]
        assert max(load) - min(load) <= max(map(shares.cost, plan.units))


@pytest.mark.parametrize(("start", "expected"), [(0.0, [1, 1, 2, 4]), (0.3, [1, 1, 2, 5]), (2.0, [1, 1, 2, 2])])
def test_only_as_many_processes_import_torch_as_are_needed(
    start: float, expected: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(folder, shared=False)
    shares = Shares(plan, added(plan))
    total = sum(map(shares.cost, plan.units))
    monkeypatch.setattr("btm_scale.checkpoint.merge.shares._START_BYTES", int(start * total))
    found = []
    for size in (1, 2, 3, 8):
        given = shares.of(plan.units, size)
        found.append(sum(any(unit.name in added(plan) for unit in own) for own in given))
    assert found == expected


@pytest.mark.parametrize("size", [2, 3])
def test_every_process_that_writes_directly_has_some_of_all_that_is_copied_and_computed(
    folder: Path, size: int
) -> None:
    plan = plan_of(folder, shared=False)
    assert len(added(plan)) >= size
    given = Shares(plan, direct=True).of(plan.units, size)
    assert sorted((unit for own in given for unit in own), key=plan.units.index) == plan.units

    def unevenness(shares: Shares) -> float:
        sums = [unit for unit in plan.units if unit.name in added(plan)]
        load = [sum(shares.cost(unit) for unit in own if unit in sums) for own in shares.of(plan.units, size)]
        return (max(load) - min(load)) / max(map(shares.cost, sums))

    assert unevenness(Shares(plan, direct=True)) <= 1 < unevenness(Shares(plan))


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("at_once", [1, 2])
def test_only_as_many_processes_compute_gates_as_memory_allows(folder: Path, at_once: int, direct: bool) -> None:
    router = ComputedRouter("key", lambda name: np.zeros((3, 16)), at_once, bytes_of_gate=1 << 20)
    plan = plan_of(folder, shared=True, router=router)
    gates = [unit for unit in plan.units if plan.router_of(unit.name) is router]
    assert len(gates) == 2
    given = Shares(plan, direct=direct).of(plan.units, 3)
    assert sum(bool({*own} & {*gates}) for own in given) == at_once
    assert sorted((unit for own in given for unit in own), key=plan.units.index) == plan.units


def test_what_an_interrupted_merge_left_is_shared_out_anew(folder: Path) -> None:
    plan = plan_of(folder, shared=False)
    sums = [unit for unit in plan.units if unit.name in added(plan)]
    given = Shares(plan).of(sums, 2)
    assert sorted((unit for own in given for unit in own), key=plan.units.index) == sums
    assert all(given)
    assert Shares(plan, added(plan)).of([], 3) == [[], [], []]


@pytest.mark.parametrize("most_summed", [0, 1 << 30])
@pytest.mark.parametrize("shared", [False, True])
def test_units_are_shared_out_by_what_is_known_of_them(
    shared: bool, most_summed: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        shutil.copytree(folder / name, tmp_path / name)
    hash_and_keep(tmp_path / "a")
    imported: list[str] = []
    found: list[Shares] = []

    def captured(outputs: Sequence[workers.Output], jobs: int | None, *, chunk_bytes: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(workers, "torch_is_loaded", lambda: False)
            patch.setattr("importlib.import_module", imported.append)
            patch.setattr(numpy_runner, "MOST_BYTES", 0)
            patch.setattr(numpy_runner, "MOST_SUMMED", most_summed)
            found.append(workers._shares(outputs, forks=True))
        workers.merge_in_processes(outputs, jobs, chunk_bytes=chunk_bytes)

    monkeypatch.setattr("btm_scale.checkpoint.merge.merge.merge_in_processes", captured)
    inputs = [(tmp_path / name, 1.0) for name in NAMES]
    merge(tmp_path / "out", inputs, method="moe", ingredients=Ingredients(NAMES, shared=shared))
    (shares,) = found
    assert imported == []
    plan = shares.plan
    assert shares.by_torch == (set() if most_summed else added(plan))
    copies = {unit for unit in plan.units if plan.how(unit.name).models and plan.copies(unit.name)}
    from_a = {unit for unit in copies if plan.everyone[plan.how(unit.name).models[0]].path == tmp_path / "a"}
    assert shares.hashed == from_a != set()

    merge(tmp_path / "mean", inputs, method="linear")
    assert imported == ([] if most_summed else ["torch"]), "all of a mean is added"


def test_a_unit_whose_hash_is_known_takes_a_third_of_the_time_to_copy(folder: Path) -> None:
    plan = plan_of(folder, shared=False)
    copied = next(unit for unit in plan.units if plan.copies(unit.name))
    assert Shares(plan).cost(copied) == 3 * Shares(plan, hashed={copied}).cost(copied)


@pytest.mark.parametrize("written", ["direct", "buffered"])
@pytest.mark.parametrize("rest", ["shared", "averaged"])
def test_a_large_mixture_has_the_same_bytes_from_one_process_and_from_several_that_begin_without_torch(
    folder: Path, rest: str, written: str
) -> None:
    inputs = [(folder / name, 1.0) for name in NAMES]
    by_torch = folder / f"{rest}-by-torch-{written}"
    ingredients = Ingredients(NAMES, shared=rest == "shared")
    expected = merge(by_torch, inputs, method="moe", ingredients=ingredients).content_hash
    for jobs in ("1", "3"):
        done = subprocess.run(
            [sys.executable, "-c", LARGE, str(folder), rest, jobs, written], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == expected
        ours = folder / f"{rest}-{jobs}-{written}"
        assert (ours / "model.safetensors").read_bytes() == (by_torch / "model.safetensors").read_bytes()


@pytest.mark.parametrize("code", ["BF16", "F16", "F32", "F64"])
def test_bit_patterns_show_whether_all_numbers_are_finite(code: str) -> None:
    dtype = dtype_of(code)
    limits = torch.finfo(dtype)
    finite = [0.0, -0.0, limits.max, limits.min, limits.tiny, -limits.tiny / 4, 1.5]
    assert _is_finite(as_bytes(torch.tensor(finite, dtype=dtype)), code)
    assert _is_finite(memoryview(b""), code)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        bad = torch.tensor([*finite, value], dtype=torch.float64).to(dtype)
        assert not _is_finite(as_bytes(bad), code), value
    if code in ("BF16", "F16"):
        every = torch.from_numpy(np.arange(0, 1 << 16, 7, dtype="<u2")).view(dtype)
        alone = [_is_finite(as_bytes(one), code) for one in every.split(1)]
        assert alone == every.isfinite().tolist()
