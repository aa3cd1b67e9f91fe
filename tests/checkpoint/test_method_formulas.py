"""Every merge method against its formula in plain Python floats."""

from __future__ import annotations

import math

import pytest
from helpers.merge_formulas import BASE, COLUMNS, DELTAS, MODELS, NOISE, ROWS, WEIGHTS, Vector, cosine, elected, run


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


def test_dare_ties_elects_signs_of_randomly_kept_differences() -> None:
    kept = [
        [d / 0.4 if noise < 0.4 else 0.0 for d, noise in zip(delta, noises, strict=True)]
        for delta, noises in zip(DELTAS, NOISE, strict=True)
    ]
    expected = [b + m for b, m in zip(BASE, elected(list(zip(*kept, strict=True)), WEIGHTS), strict=True)]
    assert run("dare_ties", density=0.4, normalize=1) == pytest.approx(expected, rel=1e-12)


def test_breadcrumbs_drops_the_largest_and_the_smallest_differences() -> None:
    kept = []
    for delta in DELTAS:
        order = sorted(range(len(delta)), key=lambda e: abs(delta[e]))
        inner = order[len(delta) - 2 - 12 : len(delta) - 2]  # gamma drops 2 of 24, density keeps 12
        kept.append([d if e in inner else 0.0 for e, d in enumerate(delta)])
    columns = list(zip(*kept, strict=True))
    sums = [math.fsum(w * d for w, d in zip(WEIGHTS, column, strict=True)) for column in columns]
    expected = [b + s for b, s in zip(BASE, sums, strict=True)]
    assert run("breadcrumbs", density=0.5, gamma=0.1) == pytest.approx(expected, rel=1e-12)
    expected = [b + m for b, m in zip(BASE, elected(columns, WEIGHTS), strict=True)]
    assert run("breadcrumbs_ties", density=0.5, gamma=0.1, normalize=1) == pytest.approx(expected, rel=1e-12)


def test_rescale_restores_the_sum_of_magnitudes() -> None:
    delta = [x - b for x, b in zip(run("ties", [1.0], density=0.25, rescale=1), BASE, strict=True)]
    assert math.fsum(map(abs, delta)) == pytest.approx(math.fsum(map(abs, DELTAS[0])))
    assert sum(d != 0 for d in delta) == 6


def test_signs_are_elected_among_weighted_differences() -> None:
    negative = [-1.0, 1.0, 1.0]
    columns = [[w * d for w, d in zip(negative, column, strict=True)] for column in zip(*DELTAS, strict=True)]
    sums = [math.fsum(part for part in column if part * math.fsum(column) > 0) for column in columns]
    expected = [b + s for b, s in zip(BASE, sums, strict=True)]
    assert run("ties", negative, density=1, normalize=0) == pytest.approx(expected, rel=1e-12)


def test_multislerp_is_the_mean_direction_of_the_differences_with_their_mean_length() -> None:
    lengths = [math.hypot(*model) for model in DELTAS]
    shares = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    mean = [
        math.fsum(s * x / n for s, x, n in zip(shares, column, lengths, strict=True))
        for column in zip(*DELTAS, strict=True)
    ]
    length = math.fsum(s * n for s, n in zip(shares, lengths, strict=True))
    expected = [b + x / math.hypot(*mean) * length for b, x in zip(BASE, mean, strict=True)]
    assert run("multislerp") == pytest.approx(expected, rel=1e-6)  # eps is added to lengths


def test_the_karcher_mean_is_where_the_moves_to_all_models_cancel_out() -> None:
    mean = run("karcher", [1, 1, 1], max_iter=200, tol=1e-12)
    assert math.hypot(*mean) == pytest.approx(math.fsum(math.hypot(*model) for model in MODELS) / 3)
    unit = [x / math.hypot(*mean) for x in mean]
    moves = []
    for model in MODELS:
        similarity = cosine(model, mean)
        angle = math.acos(similarity)
        moves.append(
            [
                angle / math.sin(angle) * (x / math.hypot(*model) - similarity * u)
                for x, u in zip(model, unit, strict=True)
            ]
        )
    assert [math.fsum(column) for column in zip(*moves, strict=True)] == pytest.approx([0.0] * len(mean), abs=1e-9)


@pytest.mark.parametrize("row_wise", [False, True])
def test_nuslerp_interpolates_each_row_or_column_on_its_arc(row_wise: bool) -> None:
    lines = [slice(c, None, COLUMNS) for c in range(COLUMNS)]
    if not row_wise:
        lines = [slice(r * COLUMNS, (r + 1) * COLUMNS) for r in range(ROWS)]
    expected = [0.0] * len(BASE)
    for line in lines:
        first, second = DELTAS[0][line], DELTAS[1][line]
        angle = math.acos(cosine(first, second))
        shares = [math.sin(w / 1.5 * angle) / math.sin(angle) for w in (0.5, 1.0)]
        expected[line] = [
            origin + shares[0] * a + shares[1] * b for origin, a, b in zip(BASE[line], first, second, strict=True)
        ]
    assert run("nuslerp", WEIGHTS[:2], flatten=0, row_wise=row_wise) == pytest.approx(expected, rel=1e-9)


def test_nearswap_moves_the_base_by_at_most_t() -> None:
    expected = [b + max(-0.2, min(0.2, d)) for b, d in zip(BASE, DELTAS[0], strict=True)]
    assert run("nearswap", [1], t=0.2) == pytest.approx(expected, rel=1e-12)


def test_ram_averages_the_models_that_moved_and_ramplus_enlarges_unshared_moves() -> None:
    moved = [[abs(d) > 1.0 for d in delta] for delta in DELTAS]
    counts = [sum(column) for column in zip(*moved, strict=True)]
    sums = [math.fsum(d for d in column if abs(d) > 1.0) for column in zip(*DELTAS, strict=True)]
    expected = [b + s / max(n, 1) for b, s, n in zip(BASE, sums, counts, strict=True)]
    assert run("ram", [1, 1, 1], epsilon=1.0) == pytest.approx(expected, rel=1e-12)

    factors = []
    for mask in moved:
        shared = sum(m for m, n in zip(mask, counts, strict=True) if n > 1)
        unshared = sum(m for m, n in zip(mask, counts, strict=True) if n == 1)
        factors.append(1 + 0.3 * min(shared / max(unshared, 1.0), 5))
    expected = [
        b + math.fsum(DELTAS[i][e] * moved[i][e] * (factors[i] if n == 1 else 1 / max(n, 1)) for i in range(3))
        for e, (b, n) in enumerate(zip(BASE, counts, strict=True))
    ]
    assert run("ramplus_tl", [1, 1, 1], epsilon=1.0, r=0.3, alpha=5) == pytest.approx(expected, rel=1e-12)


def test_arcee_fusion_takes_elements_of_outstanding_importance() -> None:
    importance = []
    for row in range(ROWS):
        line = slice(row * COLUMNS, (row + 1) * COLUMNS)
        p, q = (
            [math.exp(x) / math.fsum(map(math.exp, values[line])) + 1e-8 for x in values[line]]
            for values in (MODELS[0], BASE)
        )
        divergence = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        importance += [abs(d) * divergence for d in DELTAS[0][line]]
    first, median, third = (sorted(importance)[int(quartile * 23)] for quartile in (0.25, 0.5, 0.75))
    least = median + 1.5 * (third - first)
    taken = [i >= least for i in importance]
    assert 0 < sum(taken) < 24
    expected = [b + d * t for b, d, t in zip(BASE, DELTAS[0], taken, strict=True)]
    assert run("arcee_fusion", [1]) == pytest.approx(expected, rel=1e-12)


def test_model_stock_by_filter_measures_the_angle_of_each_row() -> None:
    expected = []
    for row in range(ROWS):
        line = slice(row * COLUMNS, (row + 1) * COLUMNS)
        rows = [delta[line] for delta in DELTAS]
        mean_cosine = max(0.0, math.fsum(cosine(rows[i], rows[j]) for i, j in ((0, 1), (0, 2), (1, 2))) / 3)
        t = 3 * mean_cosine / (1 + 2 * mean_cosine)
        expected += [b + t * math.fsum(c) / 3 for b, c in zip(BASE[line], zip(*rows, strict=True), strict=True)]
    assert run("model_stock", [1, 1, 1], filter_wise=1) == pytest.approx(expected, rel=1e-12)


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
