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
INK, SOFT, FAINT, PAPER, ACCENT, HEAT = (
    PALETTE[name][0] for name in ("ink", "soft", "faint", "paper", "accent", "heat")
)
_SERIES = [PALETTE[f"c{i}"][0] for i in range(8)]
_TRANSPARENT = "rgba(0,0,0,0)"


def literal(name: object, length: int | None = None) -> str:
    """Return text that plotly draws as it is: plotly reads HTML tags and entities in every name and label.

    `length`: the most characters, the middle becomes an ellipsis.
    """
    words = " ".join(printable(name).split())
    return html.escape(words if length is None else shorten(words, length), quote=False)


def is_narrow(width: int) -> bool:
    """Whether a figure is for a phone."""
    return width < 600


def expert_lines(experts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return a colour for each expert, and a dash for the second eight. Dashes of more lines would be a pattern."""
    count = len(_SERIES)
    dashed = range(count, len(experts)) if len(experts) <= 2 * count else ()
    return {
        name: {"color": _SERIES[i % count]} | ({"dash": "dash"} if i in dashed else {})
        for i, name in enumerate(experts)
    }


def figure(traces: Sequence[Any], width: int, height: float, **layout: Any) -> go.Figure:
    """Return a figure in the page's style; `layout` is plotly's."""
    axis = {"gridcolor": FAINT, "linecolor": SOFT, "zeroline": False, "tickfont": {"color": SOFT}, "automargin": True}
    style = {
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": INK},
        "paper_bgcolor": _TRANSPARENT,
        "plot_bgcolor": _TRANSPARENT,
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": PAPER, "bordercolor": SOFT, "font": {"color": INK, "size": 13}, "align": "left"},
        "modebar": {"bgcolor": _TRANSPARENT, "color": SOFT, "activecolor": INK},
        "legend": {"font": {"color": INK}, "bgcolor": _TRANSPARENT},
        "margin": {"l": 0, "r": 0, "t": 8, "b": 8, "pad": 4},
        "xaxis": axis,
        "yaxis": axis,
        "annotationdefaults": {"showarrow": False, "font": {"color": INK}},
    }
    # Drawing a zoom rectangle would keep a phone's reader from scrolling.
    own = {"dragmode": False} if is_narrow(width) else {}
    template = go.layout.Template(layout=style)
    return go.Figure(
        list(traces), go.Layout(template=template, height=round(height), uirevision="kept", **own | layout)
    )


def bare_axis(low: float, high: float) -> dict[str, Any]:
    """Return an axis without line, grid or labels, for drawings."""
    return {"range": [low, high], "visible": False, "fixedrange": True}
