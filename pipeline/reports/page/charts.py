"""Charts as SVG, drawn by Vega-Lite when the page is made: no script draws in the reader's browser.

Colours are the page's CSS variables, so one drawing is right in light and in dark. Every mark that
says a number has it in its ``aria-label``, which the page's script also shows under the pointer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.reports.page.distributions import Distribution

VEGA_LITE = "6.4"
WIDTH, HEIGHT = 268, 130  # of the plot itself: with its axes a chart fits a screen of 400 px
MOST_POINTS = 150  # of a curve
SERIES = tuple(f"var(--series-{number})" for number in range(1, 9))
_CONFIG: dict[str, Any] = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "domainColor": "var(--line)",
        "gridColor": "var(--grid)",
        "tickColor": "var(--line)",
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "tickCount": 5,
    },
    "legend": {
        "labelColor": "var(--text)",
        "titleColor": "var(--muted)",
        "labelFontSize": 12,
        "labelLimit": 240,
        "orient": "bottom",
        "direction": "vertical",
        "title": None,
    },
    "range": {"category": list(SERIES)},
}

Rows = Sequence[Mapping[str, Any]]


def histogram(found: Distribution) -> str:
    """Return bars of how many values lie in each bin."""
    shift = 0.5 if found.is_whole else 0.0  # so that a whole number stands below its bar
    rows = [
        {
            "from": low - shift,
            "to": high - shift,
            "count": count,
            "said": f"{_bin(found, low, high)}: {count:,}",
        }
        for low, high, count in zip(found.edges, found.edges[1:], found.counts, strict=False)
    ]
    x: dict[str, Any] = {"title": f"{found.name}{f' ({found.unit})' if found.unit else ''}"}
    if found.is_whole:
        x["tickMinStep"] = 1
    return _svg(
        rows,
        mark={"type": "bar", "color": "var(--series-1)", "binSpacing": 1},
        encoding={
            "x": {"field": "from", "type": "quantitative", "bin": "binned", "axis": x},
            "x2": {"field": "to"},
            "y": {
                "field": "count",
                "type": "quantitative",
                "axis": {"title": "values", "tickMinStep": 1},
            },
            "description": {"field": "said"},
        },
        about=f"Histogram of {found.name}, {found.num_values:,} values",
    )


def _bin(found: Distribution, low: float, high: float) -> str:
    if not found.is_whole:
        return f"{low:.4g} to {high:.4g}"
    return f"{low:.0f}" if high - low == 1 else f"{low:.0f} to {high - 1:.0f}"


def curves(rows: Rows, *, x: str, y: str, about: str, order: Sequence[str] = ()) -> str:
    """Return a line for each ``series``; ``rows`` have ``x``, ``y`` and ``series``.

    A series has the colour of its place in ``order``, so that it is the same in several charts.
    """
    told = [
        {**row, "said": f"{row['series']}, {x} {row['x']:g}: {y} {row['y']:.4g}"} for row in rows
    ]
    names = list(dict.fromkeys(row["series"] for row in rows))
    encoding = {
        "x": {"field": "x", "type": "quantitative", "axis": {"title": x, "format": "~s"}},
        "y": {
            "field": "y",
            "type": "quantitative",
            "axis": {"title": None},
            "scale": {"zero": False},
        },
        "color": {
            "field": "series",
            "type": "nominal",
            "scale": {"domain": list(order or names)},
            "legend": {"values": names} if len(order or names) > 1 else None,
        },
    }
    points = {"type": "point", "filled": True, "size": 36, "opacity": 0.9}
    return _svg(
        told,
        layer=[
            {"mark": {"type": "line", "strokeWidth": 2, "aria": False}},
            {"mark": points, "encoding": {"description": {"field": "said"}}},
        ],
        encoding=encoding,
        about=about,
    )


def bars(rows: Rows, *, about: str) -> str:
    """Return a dot for each ``name`` at ``x``, in the order given, coloured by ``series``."""
    told = [{**row, "said": f"{row['name']}, {row['series']}: {row['x']:.4g}"} for row in rows]
    names = list(dict.fromkeys(row["name"] for row in rows))
    series = list(dict.fromkeys(row["series"] for row in rows))
    is_large = any(abs(row["x"]) >= 10_000 for row in rows)
    large = {"format": "~s"} if is_large else {}
    return _svg(
        told,
        mark={"type": "point", "filled": True, "size": 90, "opacity": 1},
        height={"step": 22},
        encoding={
            "x": {
                "field": "x",
                "type": "quantitative",
                "axis": {"title": None, "tickCount": 3, "labelOverlap": "greedy", **large},
                "scale": {"zero": False, "nice": True},
            },
            "y": {
                "field": "name",
                "type": "nominal",
                "scale": {"domain": names},
                "axis": {"title": None, "labelLimit": 130, "grid": True},
            },
            "color": {
                "field": "series",
                "type": "nominal",
                "scale": {"domain": series},
                "legend": {"direction": "horizontal"} if len(series) > 1 else None,
            },
            "description": {"field": "said"},
        },
        about=about,
        width=170,
    )


def thinned(points: Sequence[Any]) -> list[Any]:
    """Return at most ``MOST_POINTS`` of a curve's points, evenly spaced, its last among them."""
    if len(points) <= MOST_POINTS:
        return list(points)
    last = len(points) - 1
    return [points[round(i * last / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]


def _svg(rows: Rows, *, about: str, width: int = WIDTH, height: Any = HEIGHT, **parts: Any) -> str:
    import vl_convert  # 33 MB, for who makes a page alone

    spec = {
        "data": {"values": list(rows)},
        "width": width,
        "height": height,
        "padding": {"left": 14, "top": 6, "right": 10, "bottom": 2},
        "autosize": {"type": "pad"},
        "description": about,
        "config": _CONFIG,
        **parts,
    }
    return str(vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE))
