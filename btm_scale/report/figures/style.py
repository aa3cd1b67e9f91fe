"""What all figures share: colours, fonts, axes, and names that plotly shows literally."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from btm_scale.report.palette import PALETTE
from btm_scale.report.summary import shorten
from btm_scale.util.terminal import printable

WIDE, NARROW = 960, 360
COLOURS = {name: light for name, (light, _) in PALETTE.items()}
INK, SOFT, FAINT, PAPER, ACCENT = (COLOURS[name] for name in ("ink", "soft", "faint", "paper", "accent"))
BELOW = {"orientation": "h", "x": 0, "y": 0, "xref": "container", "yref": "container", "yanchor": "bottom"}
_SERIES = [COLOURS[f"c{i}"] for i in range(8)]
_CLEAR = "rgba(0,0,0,0)"
_AXIS = {"gridcolor": FAINT, "linecolor": SOFT, "zeroline": False, "tickfont": {"color": SOFT}, "automargin": True}
_STYLE = {
    "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": INK},
    **{"paper_bgcolor": _CLEAR, "plot_bgcolor": _CLEAR, "xaxis": _AXIS, "yaxis": _AXIS, "hovermode": "closest"},
    "hoverlabel": {"bgcolor": PAPER, "bordercolor": SOFT, "font": {"color": INK, "size": 13}, "align": "left"},
    "modebar": {"bgcolor": _CLEAR, "color": SOFT, "activecolor": INK},
    "legend": {"font": {"color": INK}, "bgcolor": _CLEAR},
    "margin": {"l": 0, "r": 0, "t": 8, "b": 8, "pad": 4},
    "annotationdefaults": {"showarrow": False, "font": {"color": INK}},
}


def literal(name: object, length: int | None = None) -> str:
    """Return text that plotly draws as it is, shortened to `length`: plotly reads tags and entities in any text."""
    words = " ".join(printable(name).split())
    return html.escape(words if length is None else shorten(words, length), quote=False)


def is_narrow(width: int) -> bool:
    """Whether a figure is for a phone."""
    return width < 600


def expert_lines(experts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return a colour for each expert, and a dash for the second eight. Dashes of more lines would be a pattern."""
    dashed = range(8, 16) if len(experts) <= 16 else ()
    return {n: {"color": _SERIES[i % 8]} | ({"dash": "dash"} if i in dashed else {}) for i, n in enumerate(experts)}


def rule(x: float | None = None, y: float | None = None, colour: str = SOFT, width: float = 1, **other: Any) -> Any:
    """Return a line across the plot, vertical at `x` or horizontal at `y`."""
    ends = {"x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1} if y is None else {"y0": y, "y1": y, "xref": "paper"}
    ends |= {} if y is None else {"x0": 0, "x1": 1}
    return {"type": "line", "line": {"color": colour, "width": width}} | ends | other


def figure(traces: Sequence[Any], width: int, height: float, **layout: Any) -> go.Figure:
    """Return a figure in the page's style; `layout` is plotly's."""
    # Drawing a zoom rectangle would keep a phone's reader from scrolling.
    own: dict[str, Any] = {"dragmode": False} if is_narrow(width) else {}
    own |= {"height": round(height), "uirevision": "kept", "template": go.layout.Template(layout=_STYLE)}
    return go.Figure(list(traces), go.Layout(own | layout))
