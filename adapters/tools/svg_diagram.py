"""Tool `svg_diagram`: pictures of architectures and floor plans as SVG text (SOP §4.1).

The picture follows from the arguments alone. It holds shapes and escaped text: no script, style, link or image.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, Field

from adapters.tools.svg import architecture, floor_plan
from adapters.tools.tool import tool
from domain.ports import Effect, Tool, ToolFailed

TIMEOUT_S = 5.0
NODE_COUNT_MAX = 48
EDGE_COUNT_MAX = 96
ROOM_COUNT_MAX = 60

Id = Annotated[str, Len(1, 64)]
Label = Annotated[str, Len(1, 60)]
ShortLabel = Annotated[str, Len(0, 30)]


class Node(BaseModel):
    """A part of an architecture."""

    model_config = ConfigDict(extra="forbid")
    id: Id
    label: Label
    group: ShortLabel = Field("", description="Name of the group that the node is drawn in")
    shape: Literal["box", "round", "store"] = Field("box", description="store: a database, queue or disk")


class Edge(BaseModel):
    """An arrow between two parts."""

    model_config = ConfigDict(extra="forbid")
    source: Id = Field(description="id of a node")
    target: Id = Field(description="id of a node")
    label: ShortLabel = ""


class Room(BaseModel):
    """A room of a floor plan; its lengths share one unit, y grows downwards."""

    model_config = ConfigDict(extra="forbid")
    name: ShortLabel
    x: float = Field(ge=-1_000, le=1_000, allow_inf_nan=False)
    y: float = Field(ge=-1_000, le=1_000, allow_inf_nan=False)
    width: float = Field(gt=0, le=1_000, allow_inf_nan=False)
    height: float = Field(gt=0, le=1_000, allow_inf_nan=False)


def svg_diagram() -> Tool:
    """The tool; it needs nothing."""

    @tool(timeout_s=TIMEOUT_S, effect=Effect.PURE)
    async def svg_diagram(
        title: Annotated[str, Len(0, 100)] = "",
        nodes: Annotated[list[Node], Len(0, NODE_COUNT_MAX)] = [],  # noqa: B006 - pydantic copies defaults
        edges: Annotated[list[Edge], Len(0, EDGE_COUNT_MAX)] = [],  # noqa: B006 - pydantic copies defaults
        rooms: Annotated[list[Room], Len(0, ROOM_COUNT_MAX)] = [],  # noqa: B006 - pydantic copies defaults
    ) -> str:
        """Draw an architecture (nodes and edges) or the floor plan of a building (rooms) as an SVG picture."""
        if bool(nodes) == bool(rooms):
            raise ToolFailed(
                "Give nodes (an architecture) or rooms (a floor plan), not both.", "invalid_arguments"
            )
        if rooms:
            return floor_plan.draw(
                title, [floor_plan.Room(room.name, room.x, room.y, room.width, room.height) for room in rooms]
            )
        return architecture.draw(title, *_checked(nodes, edges))

    return svg_diagram


def _checked(nodes: list[Node], edges: list[Edge]) -> tuple[list[architecture.Node], list[architecture.Edge]]:
    ids = {node.id for node in nodes}
    if len(ids) != len(nodes):
        raise ToolFailed("Two nodes have the same id.", "invalid_arguments")
    for edge in edges:
        if unknown := {edge.source, edge.target} - ids:
            raise ToolFailed(
                f"An edge names {sorted(unknown)[0]!r}, which is no node's id.", "invalid_arguments"
            )
    return (
        [architecture.Node(node.id, node.label, node.group, node.shape) for node in nodes],
        [architecture.Edge(edge.source, edge.target, edge.label) for edge in edges],
    )
