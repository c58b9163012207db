"""Architecture diagrams: nodes in layers along the arrows, groups side by side in columns of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapters.tools.svg import canvas

NODE_WIDTH = 168.0
NODE_HEIGHT = 58.0
NODE_GAP = 28.0
LAYER_GAP = 66.0
GROUP_PADDING = 16.0
GROUP_TITLE_HEIGHT = 18.0
MARGIN = 32.0
TITLE_HEIGHT = 24.0
LINE_CHARS_MAX = 22
LINE_COUNT_MAX = 3


@dataclass(frozen=True, slots=True)
class Node:
    """A part of an architecture; shape is "box", "round" or "store"."""

    id: str
    label: str
    group: str
    shape: str


@dataclass(frozen=True, slots=True)
class Edge:
    """An arrow from one node's id to another's."""

    source: str
    target: str
    label: str


@dataclass(frozen=True, slots=True)
class _Column:
    """A group's place: its left edge, how many nodes fit beside each other, and its nodes by layer."""

    group: str
    left: float
    node_count: int
    layers: Mapping[int, list[Node]]

    @property
    def width(self) -> float:
        return self.node_count * (NODE_WIDTH + NODE_GAP) - NODE_GAP + 2 * GROUP_PADDING


Point = tuple[float, float]


def draw(title: str, nodes: Sequence[Node], edges: Sequence[Edge]) -> str:
    """The diagram as SVG. Edges name existing nodes."""
    layers = layers_of(nodes, edges)
    columns = _columns(nodes, layers)
    upper = MARGIN + (TITLE_HEIGHT if title else 0) + GROUP_TITLE_HEIGHT + GROUP_PADDING
    centres = _centres(columns, upper)
    width = columns[-1].left + columns[-1].width + MARGIN
    layer_count = max(layers.values()) + 1
    height = upper + layer_count * (NODE_HEIGHT + LAYER_GAP) - LAYER_GAP + GROUP_PADDING + MARGIN
    colours = {column.group: canvas.FILLS[n % len(canvas.FILLS)] for n, column in enumerate(columns)}
    return canvas.document(
        width,
        height,
        title,
        [
            *_groups([column for column in columns if column.group], upper),
            *_edges(edges, centres),
            *(element for node in nodes for element in _node(node, centres[node.id], colours[node.group])),
        ],
    )


def layers_of(nodes: Sequence[Node], edges: Sequence[Edge]) -> dict[str, int]:
    """The layer of each node: one below the lowest of those that point at it; arrows that close a circle count not."""
    targets: dict[str, list[str]] = {node.id: [] for node in nodes}
    for edge in edges:
        targets[edge.source].append(edge.target)
    layers = dict.fromkeys(targets, 0)
    for source in reversed(_finished(targets)):
        for target in targets[source]:
            layers[target] = max(layers[target], layers[source] + 1)
    return layers


def _finished(targets: dict[str, list[str]]) -> list[str]:
    """Node ids, each after all it points at. Drops the arrows that close a circle from `targets`."""
    finished: list[str] = []
    state = dict.fromkeys(targets, "new")

    def visit(node_id: str) -> None:  # At most as deep as there are nodes.
        state[node_id] = "open"
        targets[node_id] = [target for target in targets[node_id] if state[target] != "open"]
        for target in targets[node_id]:
            if state[target] == "new":
                visit(target)
        state[node_id] = "done"
        finished.append(node_id)

    for node_id in targets:
        if state[node_id] == "new":
            visit(node_id)
    return finished


def _columns(nodes: Sequence[Node], layers: Mapping[str, int]) -> list[_Column]:
    columns: list[_Column] = []
    left = MARGIN
    for group in dict.fromkeys(node.group for node in nodes):
        members: dict[int, list[Node]] = {}
        for node in nodes:
            if node.group == group:
                members.setdefault(layers[node.id], []).append(node)
        column = _Column(group, left, max(map(len, members.values())), members)
        columns.append(column)
        left += column.width + NODE_GAP
    return columns


def _centres(columns: Sequence[_Column], upper: float) -> dict[str, Point]:
    centres: dict[str, Point] = {}
    for column in columns:
        middle = column.left + column.width / 2
        for layer, members in column.layers.items():
            first = middle - (len(members) - 1) * (NODE_WIDTH + NODE_GAP) / 2
            for position, node in enumerate(members):
                centres[node.id] = (first + position * (NODE_WIDTH + NODE_GAP), _layer_middle(layer, upper))
    return centres


def _layer_middle(layer: int, upper: float) -> float:
    return upper + layer * (NODE_HEIGHT + LAYER_GAP) + NODE_HEIGHT / 2


def _groups(columns: Sequence[_Column], upper: float) -> list[str]:
    frames, names = [], []
    for column in columns:
        top = _layer_middle(min(column.layers), upper) - NODE_HEIGHT / 2 - GROUP_PADDING - GROUP_TITLE_HEIGHT
        bottom = _layer_middle(max(column.layers), upper) + NODE_HEIGHT / 2 + GROUP_PADDING
        frames.append(canvas.rectangle(column.left, top, column.width, bottom - top, rx="10"))
        name = canvas.wrapped(column.group, int(column.width / canvas.CHAR_WIDTH), 1)
        names.append(canvas.text(column.left + column.width / 2, top + GROUP_TITLE_HEIGHT / 2 + 3, name))
    return [
        *canvas.group(frames, fill="#f9fafb", stroke="#9ca3af", stroke_dasharray="5 4"),
        *canvas.group(names, fill=canvas.MUTED, font_weight="600"),
    ]


def _node(node: Node, centre: Point, fill: str) -> list[str]:
    x, y = centre[0] - NODE_WIDTH / 2, centre[1] - NODE_HEIGHT / 2
    if node.shape == "store":
        shape = canvas.path(_cylinder(x, y), fill=fill, stroke=canvas.INK)
        centre = (centre[0], centre[1] + 5)
    else:
        radius = NODE_HEIGHT / 2 if node.shape == "round" else 6
        shape = canvas.rectangle(
            x, y, NODE_WIDTH, NODE_HEIGHT, rx=canvas.number(radius), fill=fill, stroke=canvas.INK
        )
    return [shape, canvas.text(*centre, canvas.wrapped(node.label, LINE_CHARS_MAX, LINE_COUNT_MAX))]


def _cylinder(x: float, y: float) -> str:
    left, right, top, bottom = map(canvas.number, (x, x + NODE_WIDTH, y + 6, y + NODE_HEIGHT - 6))
    arc = f"{canvas.number(NODE_WIDTH / 2)} 6 0 0"
    return (
        f"M{left} {top}A{arc} 1 {right} {top}V{bottom}A{arc} 1 {left} {bottom}Z"
        f"M{left} {top}A{arc} 0 {right} {top}"
    )


def _edges(edges: Sequence[Edge], centres: Mapping[str, Point]) -> list[str]:
    lines, labels = [], []
    for edge in edges:
        start, bend, bow, end = _route(centres[edge.source], centres[edge.target])
        points = " ".join(f"{canvas.number(x)} {canvas.number(y)}" for x, y in (bend, bow, end))
        lines.append(canvas.path(f"M{canvas.number(start[0])} {canvas.number(start[1])}C{points}"))
        if edge.label:
            # The middle of the curve.
            x, y = ((start[i] + 3 * bend[i] + 3 * bow[i] + end[i]) / 8 for i in (0, 1))
            labels.append(canvas.text(x, y, [edge.label]))
    line = {"stroke": canvas.MUTED, "stroke_width": "1.5", "marker_end": "url(#arrow)"}
    halo = {"stroke": "#ffffff", "stroke_width": "4", "paint_order": "stroke"}
    return [
        *canvas.group(lines, fill="none", **line),
        *canvas.group(labels, font_size="11", **halo),
    ]


def _route(source: Point, target: Point) -> tuple[Point, Point, Point, Point]:
    """A curve between the borders: downwards from below to above, else around the right-hand sides."""
    half_width, half_height = NODE_WIDTH / 2, NODE_HEIGHT / 2
    if target[1] > source[1]:
        start, end = (source[0], source[1] + half_height), (target[0], target[1] - half_height)
        middle = (start[1] + end[1]) / 2
        return start, (start[0], middle), (end[0], middle), end
    start, end = (source[0] + half_width, source[1] - 8), (target[0] + half_width, target[1] + 8)
    if source != target and target[1] == source[1] and target[0] > source[0]:
        end = (target[0] - half_width, target[1])
        return (start[0], source[1]), (start[0] + 10, source[1]), (end[0] - 10, end[1]), end
    reach = max(start[0], end[0]) + 40
    return start, (reach, start[1]), (reach, end[1]), end
