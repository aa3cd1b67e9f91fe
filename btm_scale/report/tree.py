"""The run as one picture: a seed, its branches, and what they come to, with the mean perplexities."""

from __future__ import annotations

from collections.abc import Mapping

from btm_scale.evaluate.results import Results
from btm_scale.forest.methods import ENSEMBLE, EXPERT
from btm_scale.report.charts import drawing, element, fit, text, tooltip
from btm_scale.report.summary import mean, ordered_methods, perplexity, training_domains
from btm_scale.run_dir import DENSE, SEED

Lineage = Mapping[str, Mapping[str, float]]

_TRUNK = 7.0
_PITCH, _THICKEST = 30.0, 6.0


def run_tree(results: Results, styles: Mapping[str, str], *, width: int) -> str:
    """Seed to experts to ensemble, with dense below if there is one. `styles`: each expert's CSS class.

    Empty where there are no experts. A line is as thick as its share of the training compute.
    """
    experts = [m.removeprefix(EXPERT) for m in ordered_methods(results) if m.startswith(EXPERT)]
    if not experts:
        return ""
    narrow = width < 600
    pitch = 24.0 if len(experts) <= 10 else 17.0
    has_dense = DENSE in results.methods
    height = 24 + len(experts) * pitch + (46 if has_dense else 0)
    middle = 12 + len(experts) * pitch / 2
    fork, join = width * (0.24 if narrow else 0.22), width * (0.78 if narrow else 0.80)
    bend = width * 0.13
    parts = [_stroke(f"M0 {middle:.1f}H{fork:.1f}", _TRUNK, "seed")]
    thick = max(1.6, _TRUNK / len(experts))
    for i, name in enumerate(experts):
        y = 12 + (i + 0.5) * pitch
        out, back = _bend(fork, middle, fork + bend, y), _bend(join - bend, y, join, middle)
        path = f"M{fork:.1f} {middle:.1f}{out}H{join - bend:.1f}{back}"
        parts.append(_stroke(path, thick, styles.get(name, "")))
        parts.append(_named(width / 2, y, name, join - fork - 2 * bend + 20))
    if has_dense:
        low = height - 28
        path = f"M{fork:.1f} {middle:.1f}{_bend(fork, middle, fork + bend, low)}H{width}"
        parts.append(_stroke(path, _TRUNK, "dense"))
        parts.append(_named((fork + bend + width) / 2, low, DENSE, 200, "strong"))
        parts += _figure(width, low, _mean_of(results, DENSE), "end")
    parts.append(_stroke(f"M{join:.1f} {middle:.1f}H{width}", _TRUNK, "ensemble"))
    parts.append(text(0, middle - 12, "seed", class_="strong"))
    parts += _figure(0, middle, _mean_of(results, SEED), "start")
    parts.append(text(width, middle - 12, "ensemble", class_="strong", text_anchor="end"))
    parts += _figure(width, middle, _mean_of(results, ENSEMBLE), "end")
    words = f"The seed LM branches into {len(experts)} experts, which are merged into an ensemble"
    return drawing(width, height, words + ("; the dense baseline goes on alone" if has_dense else ""), *parts)


def _mean_of(results: Results, method: str) -> str:
    found = mean(results, method, training_domains(results))
    return "" if found is None or found.partial else perplexity(found.value)


def _figure(x: float, y: float, number: str, anchor: str) -> list[str]:
    return [text(x, y + 21, number, class_="hint", text_anchor=anchor)] if number else []


def _bend(x: float, y: float, to_x: float, to_y: float) -> str:
    """A curve that leaves and arrives level."""
    reach = 0.62 * (to_x - x)
    return f"C{x + reach:.1f} {y:.1f} {to_x - reach:.1f} {to_y:.1f} {to_x:.1f} {to_y:.1f}"


def _stroke(path: str, thickness: float, style: str) -> str:
    return element("path", d=path, stroke_width=thickness, class_=f"branch {style}".strip())


def _named(x: float, y: float, name: str, room: float, css: str = "") -> str:
    # The paper behind the words interrupts the line, so that it runs into its name and out of it.
    shown = fit(name, room, 12.5)
    return text(x, y + 4.2, shown, class_=f"on-line {css}".strip(), text_anchor="middle")


def is_worth_drawing(lineage: Lineage) -> bool:
    """Whether any model has other parents than the seed LM alone."""
    return any(parents and set(parents) != {SEED} for parents in lineage.values())


def generations(lineage: Lineage) -> dict[str, int]:
    """How many steps each model is from one without parents, by its longest way; parents stand before children."""
    found: dict[str, int] = {}
    for name, parents in lineage.items():
        found[name] = 1 + max((found.get(parent, 0) for parent in parents), default=-1)
    return found


def lineage_graph(lineage: Lineage, styles: Mapping[str, str], *, width: int) -> str:
    """`lineage`: parents with weights, parents before children; `styles`: each expert's CSS class."""
    column = generations(lineage)
    last = max(column.values())
    columns = [[name for name in lineage if column[name] == number] for number in range(last + 1)]
    height = 24 + _PITCH * max(map(len, columns))
    room = width / (last + 1)
    place = {
        name: (room * (number + 0.5), height / 2 + _PITCH * (i - (len(names) - 1) / 2))
        for number, names in enumerate(columns)
        for i, name in enumerate(names)
    }
    lines = []
    for name, parents in lineage.items():
        for parent, weight in parents.items():
            (x, y), (to_x, to_y) = place[parent], place[name]
            bend = (to_x - x) / 2
            path = f"M{x:.1f} {y:.1f}C{x + bend:.1f} {y:.1f} {to_x - bend:.1f} {to_y:.1f} {to_x:.1f} {to_y:.1f}"
            words = tooltip(f"{name} began with {weight:.0%} of {parent}")
            thick = max(1.0, _THICKEST * weight)
            css = f"branch {styles.get(name, '')}".strip()
            lines.append(element("path", words, d=path, stroke_width=thick, class_=css))
    names = [
        text(x, y + 4.2, fit(name, room * 0.6, 12.5), class_="on-line strong", text_anchor="middle")
        for name, (x, y) in place.items()
    ]
    return drawing(width, height, "Which models every expert began with", *lines, *names)
