"""Every merge method against its formula in plain Python floats."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
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
from btm_scale.checkpoint.merge.registry import METHODS, Piece, TensorPieces, find_method
from btm_scale.checkpoint.merge.statistics import least_of_largest
from btm_scale.errors import CheckpointError

ROWS, COLUMNS = 4, 6
WEIGHTS = [0.5, 1.0, 2.0]
_OF_ANY_TENSORS = sorted(METHODS.keys() - {"moe"})
Vector = list[float]


def draw(seed: int) -> Vector:
    source = random.Random(seed)
    return [source.gauss(0, 1) for _ in range(ROWS * COLUMNS)]


BASE, MODELS = draw(0), [draw(seed) for seed in (1, 2, 3)]
DELTAS = [[x - b for x, b in zip(model, BASE, strict=True)] for model in MODELS]
NOISE = [uniform(f"model {i}", 0, ROWS * COLUMNS).tolist() for i in range(3)]


def matrix(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(ROWS, COLUMNS)


def piece(count: int, weights: Sequence[float], rows: slice) -> Piece:
    """Return the same rows of every model."""
    return Piece(
        tensors=iter([matrix(model)[rows] for model in MODELS[:count]]),
        weights=weights,
        zeros=torch.zeros_like(matrix(BASE)[rows]),
        base=matrix(BASE)[rows],
        noise=lambda i: matrix(NOISE[i])[rows],
    )


def run(name: str, weights: Sequence[float] = WEIGHTS, **parameters: float) -> Vector:
    """Run a method on matrices; the result must not depend on how they are split into pieces."""
    results = []
    for rows in (ROWS, 3, 1):
        parts = [slice(start, start + rows) for start in range(0, ROWS, rows)]

        def pieces(parts: Sequence[slice] = parts) -> Iterator[Piece]:
            return (piece(len(weights), weights, part) for part in parts)

        merge = find_method(name).prepare(TensorPieces((ROWS, COLUMNS), pieces), parameters)
        results.append(torch.cat([merge(part) for part in pieces()]).reshape(-1).tolist())
    assert results[1] == pytest.approx(results[0], rel=1e-12)
    assert results[2] == pytest.approx(results[0], rel=1e-12)
    return results[0]


def elected(columns: Sequence[Sequence[float]], weights: Sequence[float]) -> Vector:
    """Return, per column, the weighted mean of the entries that have the sign of the column's weighted sum."""
    result = []
    for column in columns:
        sign = 1 if math.fsum(w * d for w, d in zip(weights, column, strict=True)) >= 0 else -1
        agreeing = [(w, d) for w, d in zip(weights, column, strict=True) if d * sign > 0]
        weight_sum = math.fsum(w for w, _ in agreeing)
        result.append(math.fsum(w * d for w, d in agreeing) / weight_sum if weight_sum else 0.0)
    return result


def test_linear_is_the_weighted_mean() -> None:
    expected = [
        math.fsum(w * x for w, x in zip(WEIGHTS, column, strict=True)) / 3.5 for column in zip(*MODELS, strict=True)
    ]
    assert run("linear") == pytest.approx(expected, rel=1e-14)


def test_task_arithmetic_adds_the_scaled_differences() -> None:
    expected = [
        b + 0.7 * math.fsum(w * d for w, d in zip(WEIGHTS, column, strict=True))
        for b, column in zip(BASE, zip(*DELTAS, strict=True), strict=True)
    ]
    assert run("task_arithmetic", scale=0.7) == pytest.approx(expected, rel=1e-13)


def test_dare_rescales_randomly_kept_differences() -> None:
    expected = [
        BASE[e] + math.fsum(w * DELTAS[i][e] / 0.4 for i, w in enumerate(WEIGHTS) if NOISE[i][e] < 0.4)
        for e in range(ROWS * COLUMNS)
    ]
    assert run("dare", density=0.4) == pytest.approx(expected, rel=1e-13)


def test_ties_averages_the_largest_differences_of_the_elected_sign() -> None:
    trimmed = []
    for delta in DELTAS:
        kept = sorted(range(len(delta)), key=lambda e: -abs(delta[e]))[: int(0.3 * len(delta))]
        trimmed.append([d if e in kept else 0.0 for e, d in enumerate(delta)])
    merged = elected(list(zip(*trimmed, strict=True)), WEIGHTS)
    expected = [b + 1.5 * m for b, m in zip(BASE, merged, strict=True)]
    assert run("ties", density=0.3, scale=1.5) == pytest.approx(expected, rel=1e-13)


def test_della_drops_small_differences_more_often() -> None:
    pruned = []
    for delta, noise in zip(DELTAS, NOISE, strict=True):
        row_pruned: Vector = []
        for row in range(ROWS):
            values = delta[row * COLUMNS : (row + 1) * COLUMNS]
            order = sorted(range(COLUMNS), key=lambda e: abs(values[e]))
            for e, value in enumerate(values):
                chance = 0.45 + 0.1 * order.index(e) / (COLUMNS - 1)
                row_pruned.append(value / chance if noise[row * COLUMNS + e] < chance else 0.0)
        pruned.append(row_pruned)
    merged = elected(list(zip(*pruned, strict=True)), WEIGHTS)
    expected = [b + m for b, m in zip(BASE, merged, strict=True)]
    assert run("della", density=0.5, window=0.1) == pytest.approx(expected, rel=1e-13)


def test_sce_weights_the_most_variable_elements_by_energy() -> None:
    columns = list(zip(*DELTAS, strict=True))
    variance = [math.fsum((d - math.fsum(c) / 3) ** 2 for d in c) / 3 for c in columns]
    kept = sorted(range(len(columns)), key=lambda e: -variance[e])[: len(columns) // 2]
    columns = [c if e in kept else (0.0, 0.0, 0.0) for e, c in enumerate(columns)]
    energy = [math.fsum(c[i] ** 2 for c in columns) for i in range(3)]
    shares = [e / math.fsum(energy) for e in energy]
    expected = []
    for b, column in zip(BASE, columns, strict=True):
        sign = 1 if math.fsum(column) >= 0 else -1
        agreeing = [(s, d) for s, d in zip(shares, column, strict=True) if d * sign > 0]
        weight_sum = math.fsum(s for s, _ in agreeing)
        expected.append(b + (math.fsum(s * d for s, d in agreeing) / weight_sum if weight_sum else 0.0))
    assert run("sce", [1, 1, 1], density=0.5) == pytest.approx(expected, rel=1e-12)


def cosine(one: Vector, other: Vector) -> float:
    product = math.fsum(a * b for a, b in zip(one, other, strict=True))
    return product / math.hypot(*one) / math.hypot(*other)


def test_slerp_interpolates_on_the_arc() -> None:
    angle = math.acos(cosine(MODELS[0], MODELS[1]))
    shares = [math.sin(w / 1.5 * angle) / math.sin(angle) for w in (0.5, 1.0)]
    expected = [shares[0] * a + shares[1] * b for a, b in zip(MODELS[0], MODELS[1], strict=True)]
    assert run("slerp", WEIGHTS[:2]) == pytest.approx(expected, rel=1e-12)


def test_model_stock_interpolates_by_the_mean_cosine() -> None:
    mean_cosine = math.fsum(cosine(DELTAS[i], DELTAS[j]) for i, j in ((0, 1), (0, 2), (1, 2))) / 3
    t = 3 * mean_cosine / (1 + 2 * mean_cosine)
    expected = [t * math.fsum(c) / 3 + (1 - t) * b for b, c in zip(BASE, zip(*MODELS, strict=True), strict=True)]
    assert run("model_stock", [1, 1, 1]) == pytest.approx(expected, rel=1e-12)


def test_widen_weights_columns_by_norm_and_direction() -> None:
    def columns(values: Vector) -> list[Vector]:
        return [values[c::COLUMNS] for c in range(COLUMNS)]

    def ranks(values: Vector) -> Vector:
        return [sum(other < value for other in values) / COLUMNS for value in values]

    base = columns(BASE)
    lengths = [
        ranks([abs(math.hypot(*m) - math.hypot(*b)) for m, b in zip(columns(model), base, strict=True)])
        for model in MODELS
    ]
    directions = [ranks([1 - cosine(m, b) for m, b in zip(columns(model), base, strict=True)]) for model in MODELS]

    def score(rank: list[Vector], i: int, c: int) -> float:
        if rank[i][c] > math.fsum(rank[i]) / COLUMNS * 1.2:
            return 0.9
        return math.exp(rank[i][c]) / math.fsum(math.exp(rank[j][c]) for j in range(3))

    def weight(i: int, c: int) -> float:
        return (score(lengths, i, c) + score(directions, i, c)) / 2

    expected = [b + math.fsum(DELTAS[i][e] * weight(i, e % COLUMNS) for i in range(3)) for e, b in enumerate(BASE)]
    assert run("widen", [1, 1, 1], threshold=1.2, calibration=0.9) == pytest.approx(expected, rel=1e-12)


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
    noise = uniform("key", 0, 100_000)
    assert uniform("key", 777, 888).equal(noise[777:888])
    assert not uniform("other", 777, 888).equal(noise[777:888])
    assert 0 <= float(noise.min()) <= float(noise.max()) < 1
    assert torch.histc(noise, 10, 0, 1).sub(10_000).abs().max() < 500
    assert abs(float(torch.corrcoef(torch.stack([noise[:-1], noise[1:]]))[0, 1])) < 0.02


@pytest.mark.parametrize("name", _OF_ANY_TENSORS)
def test_every_method_gives_the_same_bytes_for_any_input_order_and_chunk_size(
    name: str, save: Save, tmp_path: Path
) -> None:
    base = save("base", random_weights(9)) if METHODS[name].needs_base else None
    models = [(save(f"m{i}", random_weights(i)), 1.0) for i in range(2 if name == "slerp" else 3)]
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
    models = [(save(f"m{i}", random_weights(i)), 1.0) for i in range(2)]
    base = save("base", random_weights(9)) if METHODS[name].needs_base else None
    merge(tmp_path / "out", models, method=name, base=base, chunk_bytes=128)
    assert max(sizes) == 64


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "della", "dare", "sce", "model_stock", "widen"])
def test_copies_of_the_base_merge_to_the_base(name: str, save: Save, tmp_path: Path) -> None:
    base = save("base", random_weights(9))
    report = merge(tmp_path / "out", [(base, 1), (base, 1)], method=name, base=base)
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
        ("tise", 2, {}, "Unknown merge method 'tise'. Did you mean 'ties'. Choose one of dare, "),
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
    with pytest.raises(CheckpointError, match=f"'{method}' takes no base. .* use a method that takes one: dare, della"):
        merge(tmp_path / "out", models, method=method, base=models[0][0])
    assert not (tmp_path / "out").exists()
