from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from adapters.tools.svg.architecture import Edge, Node, layers_of
from adapters.tools.svg_diagram import EDGE_COUNT_MAX, NODE_COUNT_MAX, ROOM_COUNT_MAX, svg_diagram
from adapters.tools.texts import RESULT_TEXT_BYTES_MAX
from domain.ports import Effect
from tests.adapters.tools.calls import failure_of, result_of

TOOL = svg_diagram()
SVG = "{http://www.w3.org/2000/svg}"
ARCHITECTURE: dict[str, Any] = {
    "title": "Shop",
    "nodes": [
        {"id": "web", "label": "Web site", "group": "Front"},
        {"id": "api", "label": "API", "group": "Back"},
        {"id": "db", "label": "Orders", "group": "Back", "shape": "store"},
        {"id": "mail", "label": "Mail", "shape": "round"},
    ],
    "edges": [
        {"source": "web", "target": "api", "label": "HTTP"},
        {"source": "api", "target": "db"},
        {"source": "api", "target": "mail"},
        {"source": "db", "target": "api", "label": "events"},
        {"source": "api", "target": "api"},
    ],
}
FLAT = {"title": "Flat", "rooms": [
    {"name": "Kitchen", "x": 0, "y": 0, "width": 4, "height": 3},
    {"name": "Living room", "x": 4, "y": 0, "width": 5, "height": 6},
    {"name": "Bath", "x": 0, "y": 3, "width": 4, "height": 3},
]}  # fmt: skip
WORST = "&" * 100


def parsed(svg: str) -> ElementTree.Element:
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    return root


def words(root: ElementTree.Element) -> str:
    return " ".join(each.text or "" for tag in ("text", "tspan") for each in root.iter(f"{SVG}{tag}"))


async def test_an_architecture_shows_its_nodes_groups_labels_and_arrows() -> None:
    assert TOOL.effect is Effect.PURE
    assert TOOL.missing() is None
    root = parsed(await result_of(TOOL, **ARCHITECTURE))
    for word in ("Shop", "Web site", "API", "Orders", "Mail", "Front", "Back", "HTTP", "events"):
        assert word in words(root)
    arrows = [path for each in root.iter(f"{SVG}g") if each.get("marker-end") for path in each]
    assert len(arrows) == len(ARCHITECTURE["edges"])


async def test_the_same_description_gives_the_same_picture() -> None:
    assert await result_of(TOOL, **ARCHITECTURE) == await result_of(svg_diagram(), **ARCHITECTURE)


async def test_nodes_and_groups_do_not_overlap_and_stay_in_the_picture() -> None:
    nodes = [{"id": str(n), "label": f"Node {n}", "group": f"g{n % 5}"} for n in range(NODE_COUNT_MAX)]
    edges = [{"source": str(n), "target": str((n * 7 + 3) % NODE_COUNT_MAX)} for n in range(NODE_COUNT_MAX)]
    root = parsed(await result_of(TOOL, nodes=nodes, edges=edges))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    boxes = [
        [float(each.attrib[key]) for key in ("x", "y", "width", "height")] for each in root.iter(f"{SVG}rect")
    ][1:]
    groups, shapes = boxes[:5], boxes[5:]
    assert len(shapes) == NODE_COUNT_MAX
    for those in (groups, shapes):
        for i, (x, y, w, h) in enumerate(those):
            assert 0 <= x <= x + w <= width
            assert 0 <= y <= y + h <= height
            for x2, y2, w2, h2 in those[:i]:
                assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


def test_layers_follow_the_arrows_and_circles_do_no_harm() -> None:
    nodes = [Node(id, id, "", "box") for id in "abcde"]
    edges = [Edge(pair[0], pair[1], "") for pair in ("ab", "bc", "ac", "ca", "dd", "ce")]
    assert layers_of(nodes, edges) == {"a": 0, "b": 1, "c": 2, "d": 0, "e": 3}


async def test_a_floor_plan_shows_its_rooms_to_scale_with_their_measures() -> None:
    root = parsed(await result_of(TOOL, **FLAT))
    for word in ("Flat", "Kitchen", "Living room", "Bath", "4 × 3", "5 × 6"):
        assert word in words(root)
    kitchen, living = list(root.iter(f"{SVG}rect"))[1:3]
    assert float(living.attrib["height"]) == pytest.approx(2 * float(kitchen.attrib["height"]), abs=0.2)
    assert float(living.attrib["x"]) == pytest.approx(
        float(kitchen.attrib["x"]) + float(kitchen.attrib["width"]), abs=0.2
    )


@pytest.mark.parametrize(
    "text",
    ["<script>alert(1)</script>", "</title><script>", '" onload="x', "]]><!--", "&#x26;", "\x00\x08￾"],
)
async def test_text_stays_text(text: str) -> None:
    nodes = [{"id": "a", "label": text, "group": text[:30]}, {"id": text, "label": "b"}]
    svg = await result_of(
        TOOL, title=text, nodes=nodes, edges=[{"source": "a", "target": text, "label": text[:30]}]
    )
    allowed = {"svg", "title", "defs", "marker", "g", "path", "rect", "text", "tspan"}
    root = parsed(svg)
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= allowed
    assert not any(
        name.startswith("on") or "href" in name for element in root.iter() for name in element.attrib
    )


async def test_the_largest_pictures_fit_a_result() -> None:
    nodes = [
        {"id": str(n), "label": WORST[:60], "group": str(n) + WORST[:28], "shape": "store"}
        for n in range(NODE_COUNT_MAX)
    ]
    edges = [
        {"source": str(n % 48), "target": str(n * 5 % 48), "label": WORST[:30]} for n in range(EDGE_COUNT_MAX)
    ]
    largest = await result_of(TOOL, title=WORST[:100], nodes=nodes, edges=edges)
    parsed(largest)
    assert len(largest.encode()) < RESULT_TEXT_BYTES_MAX
    rooms = [
        {"name": WORST[:30], "x": n, "y": -n, "width": 999.123, "height": 999.9}
        for n in range(ROOM_COUNT_MAX)
    ]
    parsed(await result_of(TOOL, rooms=rooms))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"nodes": ARCHITECTURE["nodes"], "rooms": FLAT["rooms"]},
        {"nodes": [{"id": "a", "label": "x"}] * 2},
        {"nodes": [{"id": "a", "label": "x"}], "edges": [{"source": "a", "target": "b"}]},
        {"nodes": [{"id": str(n), "label": "x"} for n in range(NODE_COUNT_MAX + 1)]},
        {"nodes": [{"id": "a", "label": "x" * 61}]},
        {"nodes": [{"id": "a", "label": "x", "shape": "star"}]},
        {"rooms": [{"name": "a", "x": 0, "y": 0, "width": 0, "height": 1}]},
        {"rooms": [{"name": "a", "x": float("nan"), "y": 0, "width": 1, "height": 1}]},
        {"rooms": [{"name": "a", "x": 1e9, "y": 0, "width": 1, "height": 1}]},
        {"nodes": [{"id": "a", "label": "x"}], "style": "x"},
    ],
)
async def test_what_cannot_be_drawn_is_told(arguments: dict[str, Any]) -> None:
    assert (await failure_of(TOOL, **arguments)).error_class == "invalid_arguments"
