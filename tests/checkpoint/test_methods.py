"""What every merge method has in common: any order and chunks, bounded memory, non-finite numbers, refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.small_models import Save, random_weights

from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.hashing import content_hash
from btm_scale.checkpoint.merge import runner
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.checkpoint.merge.noise import uniform
from btm_scale.checkpoint.merge.plan import Unit
from btm_scale.checkpoint.merge.registry import METHODS, Piece, TensorPieces
from btm_scale.checkpoint.merge.statistics import least_of_largest
from btm_scale.errors import CheckpointError

_OF_ANY_TENSORS = sorted(METHODS.keys() - {"moe"})


@pytest.mark.parametrize("count", [0, 1, 7, 500, 999, 1000])
def test_the_top_k_threshold_equals_that_of_a_sort(count: int) -> None:
    """With ties, zeros, and numbers that differ only in the last bits of a float32."""
    draw = torch.Generator().manual_seed(count)
    values = torch.randn(1000, generator=draw).abs()
    values[::3] = torch.tensor([0.0, 1.0, 1.0 + 2**-23])[torch.randint(0, 3, (334,), generator=draw)]

    def pieces() -> Iterator[Piece]:
        return (Piece(tensors=[part], weights=[1.0], zeros=part) for part in values.double().split(77))

    least = least_of_largest(TensorPieces((1000,), pieces), Piece.copies, count)
    assert least == [float(values.sort(descending=True).values[count - 1]) if count else math.inf]


def test_noise_is_uniform_and_depends_only_on_key_and_position() -> None:
    noise = torch.from_numpy(uniform("key", 0, 100_000))
    assert torch.from_numpy(uniform("key", 777, 888)).equal(noise[777:888])
    assert not torch.from_numpy(uniform("other", 777, 888)).equal(noise[777:888])
    assert 0 <= float(noise.min()) <= float(noise.max()) < 1
    assert torch.histc(noise, 10, 0, 1).sub(10_000).abs().max() < 500
    assert abs(float(torch.corrcoef(torch.stack([noise[:-1], noise[1:]]))[0, 1])) < 0.02


@pytest.mark.parametrize("name", _OF_ANY_TENSORS)
def test_every_method_gives_the_same_bytes_for_any_input_order_and_chunk_size(
    name: str, save: Save, tmp_path: Path
) -> None:
    base = save("base", random_weights(9)) if METHODS[name].needs_base else None
    models = [(save(f"m{i}", random_weights(i)), 1.0) for i in range(METHODS[name].exactly or 3)]
    first = merge(tmp_path / "a", models, method=name, base=base).content_hash
    assert merge(tmp_path / "b", models[::-1], method=name, base=base, chunk_bytes=66).content_hash == first
    merged = SafetensorsModel(tmp_path / "a")
    assert all(merged.read(tensor).isfinite().all() for tensor in merged.names)


@pytest.mark.parametrize("name", _OF_ANY_TENSORS)
def test_no_method_holds_a_full_matrix(name: str, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piece, sizes = runner.UnitRunner._piece, []

    def recorded(self: runner.UnitRunner, part: Unit, *shape: tuple[int, ...]) -> Piece:
        sizes.append(part.stop - part.start)
        return piece(self, part, *shape)

    monkeypatch.setattr(runner, "_ROWS_ELEMENTS", 64)
    monkeypatch.setattr(runner.UnitRunner, "_piece", recorded)
    models = [(save(f"m{i}", random_weights(i)), 1.0) for i in range(METHODS[name].exactly or 2)]
    base = save("base", random_weights(9)) if METHODS[name].needs_base else None
    scale = {"scale": 0.5} if name == "passthrough" else None  # otherwise a copy, not merged in pieces
    merge(tmp_path / "out", models, method=name, base=base, parameters=scale, chunk_bytes=128)
    assert max(sizes) == 64


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method.needs_base))
def test_copies_of_the_base_merge_to_the_base(name: str, save: Save, tmp_path: Path) -> None:
    base = save("base", random_weights(9))
    report = merge(tmp_path / "out", [(base, 1)] * (METHODS[name].exactly or 2), method=name, base=base)
    assert report.content_hash == content_hash(base)


def test_model_stock_of_opposite_differences_is_the_base(save: Save, tmp_path: Path) -> None:
    base = {name: tensor for name, tensor in random_weights(0).items() if tensor.is_floating_point()}
    models = [save(f"m{step}", {n: (t.float() + step).bfloat16() for n, t in base.items()}) for step in (-64, 64)]
    merge(
        tmp_path / "out",
        [(model, 1.0) for model in models],
        method="model_stock",
        base=save("base", {n: torch.zeros_like(t) for n, t in base.items()}),
    )
    with SafetensorsModel(tmp_path / "out") as out:
        assert all(out.read(name).isfinite().all() and out.read(name).abs().max() < 4 for name in base)


@pytest.mark.parametrize("name", _OF_ANY_TENSORS)
def test_inf_and_nan_never_merge_to_a_finite_number(name: str, save: Save, tmp_path: Path) -> None:
    weights = random_weights(1, torch.float32)
    for value in (math.inf, -math.inf, math.nan):
        weights["model.norm.weight"][3:5] = torch.tensor([value, -value])
        save(f"{value}", weights)
    inputs = [(tmp_path / path, 1.0) for path in ("inf", "-inf", "nan")[: METHODS[name].exactly or 3]]
    base = save("base", random_weights(0, torch.float32)) if METHODS[name].needs_base else None
    density = {"density": 0.5} if "density" in METHODS[name].parameters else None
    merge(tmp_path / "out", inputs, method=name, base=base, parameters=density)
    with SafetensorsModel(tmp_path / "out") as out:
        assert not out.read("model.norm.weight")[3:5].isfinite().any()


def test_slerp_interpolates_parallel_tensors_linearly(save: Save, tmp_path: Path) -> None:
    model = save("m", random_weights(1))
    report = merge(tmp_path / "out", [(model, 1), (model, 3)], method="slerp")
    assert report.content_hash == content_hash(model)


@pytest.mark.parametrize(
    ("method", "count", "settings", "message"),
    [
        ("ties", 2, {}, r"a base: the model from which all inputs were trained\. Give it \(--base DIR; `base` in Py"),
        ("slerp", 3, {}, "exactly 2 models, but 3"),
        ("ties", 2, {"density": 2}, r"keep a fraction of 2 .* It must be above 0 and at most 1: change density\.\n"),
        (
            "ties",
            2,
            {"densty": 0.5},
            r"no parameter 'densty'\. Did you mean 'density'\? Its parameters are: density \(",
        ),
        ("slerp", 2, {"density": 0.5}, r"no parameter 'density'\. It takes no parameters: leave it out\."),
        ("della", 2, {"density": 0.99}, "Both must be above 0 and at most 1: change density or window"),
        (
            "dare",
            2,
            {"scale": math.nan},
            "'scale' of 'dare' is nan. It must be finite: leave it out",
        ),
        ("tise", 2, {}, "Unknown merge method 'tise'. Did you mean 'ties'. Choose one of arcee_fusion, "),
    ],
)
def test_invalid_inputs_and_parameters_of_a_method_are_rejected(
    save: Save, tmp_path: Path, method: str, count: int, settings: dict[str, float], message: str
) -> None:
    models = [(save(f"m{i}", random_weights(i)), 1.0) for i in range(count)]
    with pytest.raises(CheckpointError, match=message):
        merge(tmp_path / "out", models, method=method, parameters=settings)


def test_weights_are_rejected_for_a_method_that_computes_its_own(save: Save, tmp_path: Path) -> None:
    models = [(save(f"m{i}", random_weights(i)), float(i + 1)) for i in range(2)]
    with pytest.raises(CheckpointError, match="computes its own weights"):
        merge(tmp_path / "out", models, method="sce", base=models[0][0])


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_a_base_is_rejected_for_a_method_that_takes_none(save: Save, tmp_path: Path, method: str) -> None:
    models = [(save(f"m{i}", random_weights(i)), 1.0) for i in range(2)]
    with pytest.raises(
        CheckpointError, match=f"'{method}' takes no base. .* use a method that takes one: arcee_fusion, "
    ):
        merge(tmp_path / "out", models, method=method, base=models[0][0])
    assert not (tmp_path / "out").exists()
