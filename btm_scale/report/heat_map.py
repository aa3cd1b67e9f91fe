"""A matrix as coloured cells, each with its number."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from btm_scale.report.charts import drawing, element, fit, line, rectangle, text, text_width, tooltip

_ROW = 28.0
_GAP = 10.0


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    shades: Sequence[Sequence[float | None]],
    *,
    title: str,
    width: int,
    framed: Collection[tuple[int, int]] = (),
    strong: Collection[tuple[int, int]] = (),
    gap_before_row: int | None = None,
    gap_before_column: int | None = None,
) -> str:
    """Cells [rows, columns] of text on a shade from 0 (paper) to 1 (full colour); None is no shade.

    `framed` cells get an outline and `strong` ones bold text. As wide as it needs to be, at most `width` if
    that leaves room for the numbers.
    """
    left = min(150.0, max([40.0, *(text_width(name, 13) + 14 for name in rows)]))
    widest = max([30.0, *(text_width(cell, 12) + 6 for row in cells for cell in row)])
    longest = max([0.0, *(min(130.0, text_width(name, 12)) for name in columns)])
    cell_width = max(widest, min(92.0, (width - left - _GAP) / max(1, len(columns))))
    slanted = longest > cell_width - 6
    top, overhang = 22.0, 2.0
    if slanted:
        # The last slanted name leans out to the right of its column.
        top, overhang = 16.0 + 0.71 * longest, max(2.0, 0.71 * longest - widest / 2 + 6)
        cell_width = max(widest, min(92.0, (width - left - _GAP - overhang) / max(1, len(columns))))

    def x(column: int) -> float:
        return left + column * cell_width + (_GAP if gap_before_column and column >= gap_before_column else 0)

    def y(row: int) -> float:
        return top + row * _ROW + (_GAP if gap_before_row and row >= gap_before_row else 0)

    parts = []
    for j, name in enumerate(columns):
        middle = x(j) + cell_width / 2
        if slanted:
            words = text(
                0,
                0,
                fit(name, 130, 12),
                class_="label",
                transform=f"translate({middle:.1f} {top - 6:.1f}) rotate(-45)",
            )
        else:
            words = text(middle, top - 8, name, class_="label", text_anchor="middle")
        parts.append(element("g", tooltip(name), words))
    for i, name in enumerate(rows):
        parts.append(element("g", tooltip(name), text(0, y(i) + 18.5, fit(name, left - 12, 13), class_="label")))
        for j, column in enumerate(columns):
            shade = shades[i][j]
            # Between the two, dark ink reads better on either paper.
            ink = "on-heat" if (shade or 0) > 0.75 else "on-middle" if (shade or 0) > 0.5 else "on-paper"
            bold = " strong" if (i, j) in strong else ""
            box = rectangle(
                x(j) + 1,
                y(i) + 1,
                cell_width - 2,
                _ROW - 2,
                rx=2,
                class_="heat" if shade is not None else "no-heat",
                fill_opacity=f"{shade or 0:.3f}",
            )
            number = text(x(j) + cell_width / 2, y(i) + 18.5, cells[i][j], class_=ink + bold, text_anchor="middle")
            parts.append(element("g", tooltip(f"{name} on {column}: {cells[i][j]}"), box, number))
    for i, j in framed:
        parts.append(rectangle(x(j) + 1.5, y(i) + 1.5, cell_width - 3, _ROW - 3, rx=2, class_="frame"))
    right = x(max(0, len(columns) - 1)) + cell_width
    return drawing(right + overhang, y(len(rows)) + 4, title, *parts)


def shade_key(low: str, high: str) -> str:
    """The colours of a heat map from 0 to 1, with words for both ends."""
    steps = [rectangle(i * 14, 2, 14, 12, class_="heat", fill_opacity=f"{i / 9:.2f}") for i in range(10)]
    outline = [line(0, 14.5, 140, 14.5, class_="rule")]
    swatch = drawing(140, 16, f"Colour scale from {low} to {high}", *steps, *outline, class_="key")
    return element("span", element("span", low), swatch, element("span", high), class_="scale")
