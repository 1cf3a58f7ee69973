"""A plan as a layered drawing: each step below all that it is made of, few lines crossing.

Layers are by the longest way from a step without inputs. Where lines from a step pass a layer they
have a place there, one for all of them, so that no box stands on it; places of a layer are ordered
by the mean of their neighbours', down and up by turns (Sugiyama, Tagawa and Toda 1981,
doi:10.1109/TSMC.1981.4308636).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

BOX_WIDTH, BOX_HEIGHT = 184, 66
GAP_X, GAP_Y = 22, 44
PASS_WIDTH = 14  # of a place that a line passes at
MARGIN = 6
SWEEPS = 6


@dataclass(frozen=True, slots=True)
class Box:
    """Where a step's box stands: its upper left corner, in pixels."""

    name: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Drawing:
    """All boxes, and each line as the ``d`` of an SVG path with its two ends' names."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    lines: tuple[tuple[str, str, str], ...]


def draw(needs: Mapping[str, Sequence[str]]) -> Drawing:
    """Lay out steps, given in an order in which each comes after what it needs."""
    layer_of: dict[str, int] = {}
    for name, needed in needs.items():
        layer_of[name] = 1 + max((layer_of[other] for other in needed), default=-1)
    layers: list[list[str]] = [[] for _ in range(1 + max(layer_of.values(), default=-1))]
    for name, layer in layer_of.items():
        layers[layer].append(name)
    above: dict[str, list[str]] = {}
    ways: list[tuple[str, str, list[str]]] = []
    for name, needed in needs.items():
        for other in needed:
            way = [other]
            for layer in range(layer_of[other] + 1, layer_of[name]):
                place = f"{other} @ {layer}"  # no step's name has a blank
                if place not in above:
                    layers[layer].append(place)
                    above[place] = [way[-1]]
                way.append(place)
            above.setdefault(name, []).append(way[-1])
            ways.append((other, name, [*way, name]))
    _order(layers, above)
    return _place(layers, ways)


def _order(layers: list[list[str]], above: Mapping[str, Sequence[str]]) -> None:
    """Sort each layer by where its neighbours above stand, then by those below, a few times."""
    below: dict[str, list[str]] = {}
    for name, others in above.items():
        for other in others:
            below.setdefault(other, []).append(name)
    for sweep in range(SWEEPS):
        neighbours = below if sweep % 2 else above
        for layer in reversed(layers) if sweep % 2 else layers:
            at = {name: i / len(names) for names in layers for i, name in enumerate(names)}
            keys = {
                name: fmean(at[other] for other in neighbours[name])
                if neighbours.get(name)
                else at[name]
                for name in layer
            }
            layer.sort(key=lambda name: keys[name])


def _place(layers: Sequence[Sequence[str]], ways: Sequence[tuple[str, str, list[str]]]) -> Drawing:
    widths = [[PASS_WIDTH if "@" in name else BOX_WIDTH for name in layer] for layer in layers]
    totals = [sum(row) + GAP_X * (len(row) - 1) for row in widths]
    whole = max(totals, default=0)
    centres: dict[str, float] = {}
    tops: dict[str, float] = {}
    for depth, (layer, row, total) in enumerate(zip(layers, widths, totals, strict=True)):
        x = MARGIN + (whole - total) / 2
        for name, width in zip(layer, row, strict=True):
            centres[name], tops[name] = x + width / 2, MARGIN + depth * (BOX_HEIGHT + GAP_Y)
            x += width + GAP_X
    boxes = tuple(
        Box(name, centres[name] - BOX_WIDTH / 2, tops[name])
        for layer in layers
        for name in layer
        if "@" not in name
    )
    lines = tuple((first, last, _path(way, centres, tops)) for first, last, way in ways)
    height = 2 * MARGIN + len(layers) * (BOX_HEIGHT + GAP_Y) - GAP_Y
    return Drawing(whole + 2 * MARGIN, max(height, 0), boxes, lines)


def _path(way: Sequence[str], centres: Mapping[str, float], tops: Mapping[str, float]) -> str:
    """Return curves from the foot of each place to the head of the next, straight past boxes."""
    parts = [f"M{centres[way[0]]:g},{tops[way[0]] + BOX_HEIGHT:g}"]
    for name in way[1:]:
        x, y = centres[name], tops[name]
        before = parts[-1].rsplit(" ", 1)[-1].lstrip("MLC")
        x0, y0 = map(float, before.split(","))
        middle = (y0 + y) / 2
        parts.append(f"C{x0:g},{middle:g} {x:g},{middle:g} {x:g},{y:g}")
        if name != way[-1]:
            parts.append(f"L{x:g},{y + BOX_HEIGHT:g}")
    return " ".join(parts)
