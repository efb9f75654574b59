"""Small drawings as inline SVG: layered graphs, histograms and bars. No libraries, no fonts, no scripts.

Graphs are laid out in layers by longest path, ordered inside a layer by the mean position of their neighbours (two
sweeps down and up), and drawn top to bottom with curves. Colours are CSS classes of the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

_CHARACTER = 6.7
"""Width of a character of the page's 12 px font, generously."""
_ROW, _HEIGHT, _GAP = 84, 46, 26


def graph_svg(nodes: Sequence[Mapping[str, Any]], edges: Sequence[Sequence[str]]) -> str:
    """A directed graph. A node has `id`, `title`, `subtitle` and `kind` (its CSS class); edges are pairs of ids."""
    if not nodes:
        return ""
    layers = _layers([str(n["id"]) for n in nodes], edges)
    by_id = {str(n["id"]): n for n in nodes}
    width_of = {key: _width(by_id[key]) if key in by_id else 14.0 for layer in layers.order for key in layer}
    total = (
        max(sum(width_of[k] for k in layer) + _GAP * (len(layer) - 1) for layer in layers.order) + 2 * _GAP
    )
    centre: dict[str, tuple[float, float]] = {}
    for depth, layer in enumerate(layers.order):
        x = (total - sum(width_of[k] for k in layer) - _GAP * (len(layer) - 1)) / 2
        for key in layer:
            centre[key] = (x + width_of[key] / 2, depth * _ROW + _HEIGHT / 2 + 8)
            x += width_of[key] + _GAP
    paths = [_path(chain, centre, set(by_id)) for chain in layers.chains]
    boxes = [_box(by_id[key], centre[key], width_of[key]) for key in by_id]
    height = (len(layers.order) - 1) * _ROW + _HEIGHT + 16
    return (
        f'<svg class="graph" role="img" viewBox="0 0 {total:.0f} {height:.0f}" '
        f'style="width:100%;max-width:{total:.0f}px;height:auto">'
        + "".join(paths)
        + "".join(boxes)
        + "</svg>"
    )


def histogram_svg(low: float, high: float, before: Sequence[int], after: Sequence[int]) -> str:
    """Two histograms over the same bins of `[low, high]`: before filled, after outlined; the height is root(count)."""
    width, height, foot = 320.0, 110.0, 16.0
    top = max([*before, *after, 1]) ** 0.5
    step = width / max(len(before), 1)

    def points(counts: Sequence[int]) -> list[tuple[float, float]]:
        corners = []
        for index, count in enumerate(counts):
            y = height - (count**0.5 / top) * (height - 6)
            corners += [(index * step, y), ((index + 1) * step, y)]
        return corners

    filled = " ".join(f"{x:.1f},{y:.1f}" for x, y in [(0, height), *points(before), (width, height)])
    outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in points(after))
    zero = width * -low / (high - low) if low < 0 < high else None
    ticks = [(0.0, low, "start"), (width, high, "end")]
    if zero is not None and 40 < zero < width - 40:
        ticks.append((zero, 0.0, "middle"))
    labels = "".join(
        f'<text x="{x:.1f}" y="{height + 13:.0f}" text-anchor="{anchor}">{number:.3g}</text>'
        for x, number, anchor in ticks
    )
    return (
        f'<svg class="histogram" role="img" viewBox="0 0 {width:.0f} {height + foot:.0f}">'
        f'<polygon class="before" points="{filled}"/><polyline class="after" points="{outline}"/>'
        f'<line class="axis" x1="0" x2="{width:.0f}" y1="{height}" y2="{height}"/>{labels}</svg>'
    )


class _Layout:
    """order: ids of each layer, `a|b|i` for a bend of a long edge; chains: the ids along each edge, from the top."""

    def __init__(self, order: list[list[str]], chains: list[list[str]]) -> None:
        self.order, self.chains = order, chains


def _layers(ids: list[str], edges: Sequence[Sequence[str]]) -> _Layout:
    ids = _topological(ids, edges)
    position = {key: i for i, key in enumerate(ids)}
    # Edges against the order (modules used twice make cycles) are drawn but do not shape the layers.
    forward = sorted({(position[b], position[a], a, b) for a, b in edges if position[a] < position[b]})
    depth = dict.fromkeys(ids, 0)
    for _, _, a, b in forward:
        depth[b] = max(depth[b], depth[a] + 1)
    for key in reversed(ids):
        below = [depth[b] for _, _, a, b in forward if a == key]
        if below:
            # Sources sit right above their first reader instead of all at the top.
            depth[key] = max(depth[key], min(below) - 1)
    order: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for key in ids:
        order[depth[key]].append(key)
    chains = []
    for a, b in [(a, b) for a, b in edges if a != b]:
        top, bottom = (a, b) if depth[a] <= depth[b] else (b, a)
        bends = [f"{a}|{b}|{level}" for level in range(depth[top] + 1, depth[bottom])]
        for level, bend in enumerate(bends, depth[top] + 1):
            order[level].append(bend)
        chains.append([top, *bends, bottom])
    _untangle(order, chains)
    return _Layout(order, chains)


def _topological(ids: Sequence[str], edges: Sequence[Sequence[str]]) -> list[str]:
    """Ids so that sources come first, in the given order where there is a choice or a cycle."""
    waiting = {key: {a for a, b in edges if b == key and a != key} for key in ids}
    ordered: list[str] = []
    while waiting:
        free = next((key for key, sources in waiting.items() if not sources), next(iter(waiting)))
        del waiting[free]
        ordered.append(free)
        for sources in waiting.values():
            sources.discard(free)
    return ordered


def _untangle(order: list[list[str]], chains: list[list[str]]) -> None:
    above: dict[str, list[str]] = {}
    below: dict[str, list[str]] = {}
    for chain in chains:
        for a, b in pairwise(chain):
            above.setdefault(b, []).append(a)
            below.setdefault(a, []).append(b)
    for sweep in range(4):
        neighbours, levels = (above, order[1:]) if sweep % 2 == 0 else (below, order[-2::-1])
        place = {key: (i + 0.5) / len(layer) for layer in order for i, key in enumerate(layer)}
        for layer in levels:
            mean = {
                key: sum(place[n] for n in neighbours[key]) / len(neighbours[key])
                if key in neighbours
                else place[key]
                for key in layer
            }
            layer.sort(key=mean.__getitem__)
            place.update({key: (i + 0.5) / len(layer) for i, key in enumerate(layer)})


def _path(chain: list[str], centre: Mapping[str, tuple[float, float]], boxes: set[str]) -> str:
    points = []
    for index, key in enumerate(chain):
        x, y = centre[key]
        if key in boxes:
            points.append((x, y + _HEIGHT / 2 if index == 0 else y - _HEIGHT / 2))
        else:
            points += [(x, y - _HEIGHT / 2), (x, y + _HEIGHT / 2)]
    data = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x1, y1), (x2, y2) in pairwise(points):
        middle = (y1 + y2) / 2
        data += f"C{x1:.1f} {middle:.1f} {x2:.1f} {middle:.1f} {x2:.1f} {y2:.1f}"
    return f'<path class="edge" d="{data}"/>'


def _width(node: Mapping[str, Any]) -> float:
    return max(len(str(node["title"])), len(str(node.get("subtitle") or "")), 6) * _CHARACTER + 24


def _box(node: Mapping[str, Any], centre: tuple[float, float], width: float) -> str:
    x, y = centre
    subtitle = str(node.get("subtitle") or "")
    title, line = escape(str(node["title"])), y + (-3 if subtitle else 4)
    lines = f'<text x="{x:.1f}" y="{line:.1f}" text-anchor="middle">{title}</text>'
    if subtitle:
        lines += (
            f'<text class="small" x="{x:.1f}" y="{y + 13:.1f}" text-anchor="middle">{escape(subtitle)}</text>'
        )
    return (
        f'<g class="node {escape(str(node["kind"]))}"><rect x="{x - width / 2:.1f}" y="{y - _HEIGHT / 2:.1f}" '
        f'width="{width:.1f}" height="{_HEIGHT}" rx="9"/>{lines}</g>'
    )
