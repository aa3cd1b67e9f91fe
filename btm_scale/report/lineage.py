"""Who came from whom: models in columns by generation, and lines from parents as thick as their weights."""

from __future__ import annotations

from collections.abc import Mapping

from btm_scale.report.svg import drawing, element, fit, text, tooltip
from btm_scale.run_dir import SEED

Lineage = Mapping[str, Mapping[str, float]]

_PITCH, _THICKEST = 30.0, 6.0


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
