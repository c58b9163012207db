"""Floor plans: rooms to scale, with their names and measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapters.tools.svg import canvas

PLAN_WIDTH = 860.0
PLAN_HEIGHT = 640.0
MARGIN = 40.0
TITLE_HEIGHT = 24.0


@dataclass(frozen=True, slots=True)
class Room:
    """A rectangle of the plan in the caller's unit of length."""

    name: str
    x: float
    y: float
    width: float
    height: float


def draw(title: str, rooms: Sequence[Room]) -> str:
    """The plan as SVG, scaled to fit PLAN_WIDTH × PLAN_HEIGHT."""
    left, top = min(room.x for room in rooms), min(room.y for room in rooms)
    width = max(room.x + room.width for room in rooms) - left
    height = max(room.y + room.height for room in rooms) - top
    scale = min(PLAN_WIDTH / width, PLAN_HEIGHT / height)
    upper = MARGIN + (TITLE_HEIGHT if title else 0)
    elements = [
        element
        for position, room in enumerate(rooms)
        for element in _room(
            room, MARGIN + (room.x - left) * scale, upper + (room.y - top) * scale, scale, position
        )
    ]
    return canvas.document(width * scale + 2 * MARGIN, height * scale + upper + MARGIN, title, elements)


def _room(room: Room, x: float, y: float, scale: float, position: int) -> list[str]:
    width, height = room.width * scale, room.height * scale
    fill = canvas.FILLS[position % len(canvas.FILLS)]
    lines = canvas.wrapped(room.name, max(3, int(width / canvas.CHAR_WIDTH)), 2)
    if height >= canvas.LINE_HEIGHT * (len(lines) + 1):
        lines = [*lines, f"{room.width:g} × {room.height:g}"]
    return [
        canvas.rectangle(x, y, width, height, fill=fill, stroke=canvas.INK, stroke_width="3"),
        canvas.text(x + width / 2, y + height / 2, lines),
    ]
