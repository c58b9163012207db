"""The few SVG elements that the pictures are made of."""

from __future__ import annotations

import re
import textwrap
from xml.sax.saxutils import escape, quoteattr

FONT = "ui-sans-serif, Helvetica, Arial, sans-serif"
INK = "#1f2937"
MUTED = "#6b7280"
FILLS = ("#e0ecff", "#e3f5e6", "#fff0db", "#f3e6fb", "#fde4e6", "#e2f4f5", "#f4f0d9", "#ececf1")
LINE_HEIGHT = 16
CHAR_WIDTH = 7.0  # of the 13 pixel font, on average

# XML has no form for these characters, not even an escaped one.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def number(value: float) -> str:
    """A coordinate with one decimal at most."""
    return f"{round(value, 1):g}"


def plain(text: str) -> str:
    """Text that can stand between tags."""
    return escape(_NOT_XML.sub("\ufffd", text))


def wrapped(text: str, line_chars_max: int, line_count_max: int) -> list[str]:
    """The text in lines; what does not fit ends in an ellipsis."""
    return textwrap.wrap(text, line_chars_max, max_lines=line_count_max, placeholder="…") or [""]


def text(x: float, y: float, lines: list[str], **attributes: str) -> str:
    """Lines centred around a point."""
    if len(lines) == 1:
        return f'<text x="{number(x)}" y="{number(y)}"{_attributes(attributes)}>{plain(lines[0])}</text>'
    top = y - (len(lines) - 1) * LINE_HEIGHT / 2
    spans = "".join(
        f'<tspan x="{number(x)}" y="{number(top + row * LINE_HEIGHT)}">{plain(line)}</tspan>'
        for row, line in enumerate(lines)
    )
    return f"<text{_attributes(attributes)}>{spans}</text>"


def group(elements: list[str], **attributes: str) -> list[str]:
    """Elements that share attributes, which are written once."""
    return [f"<g{_attributes(attributes)}>", *elements, "</g>"] if elements else []


def rectangle(x: float, y: float, width: float, height: float, **attributes: str) -> str:
    """A rectangle by its upper left corner."""
    place = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
    return f"<rect {place}{_attributes(attributes)}/>"


def path(commands: str, **attributes: str) -> str:
    """A path; `commands` are ours, never a caller's text."""
    return f'<path d="{commands}"{_attributes(attributes)}/>'


def document(width: float, height: float, title: str, elements: list[str]) -> str:
    """A whole picture, with its title above and for screen readers."""
    heading = [text(width / 2, 24, [title], font_size="17", font_weight="600")] if title else []
    size = f'width="{number(width)}" height="{number(height)}" viewBox="0 0 {number(width)} {number(height)}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family={quoteattr(FONT)}'
            f' font-size="13" fill="{INK}" text-anchor="middle" dominant-baseline="central">',
            f"<title>{plain(title or 'Diagram')}</title>",
            '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7"'
            f' orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{MUTED}"/></marker></defs>',
            rectangle(0, 0, width, height, fill="#ffffff"),
            *heading,
            *elements,
            "</svg>",
        ]
    )


def _attributes(attributes: dict[str, str]) -> str:
    return "".join(f" {name.replace('_', '-')}={quoteattr(value)}" for name, value in attributes.items())
