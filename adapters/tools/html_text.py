"""The readable text of an HTML page.

A scanner of our own, linear in the size of the page whatever it contains: the parsers at hand take minutes for a
megabyte of nested or unclosed tags.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass

MAIN_CHARS_MIN = 200
TAG_COUNT_MAX = 200_000  # A second of work; what comes after is not read.

_OPENING = re.compile(r"<(?=/?[a-zA-Z]|[!?])")
_TAG_NAME = re.compile(r"/?[a-zA-Z][^\s/>]{0,40}")
_UNTIL_QUOTE_OR_END = re.compile(r"[^>\"']*")
_SPACES = re.compile(r"\s+")

# Their content is not HTML and not for reading; it ends at the first closing tag.
_OPAQUE = frozenset({"script", "style", "iframe", "noembed", "noframes", "xmp", "title", "textarea"})
# Markup that is not for reading; skipped when it is closed.
_HIDDEN = frozenset({"svg", "template", "math", "select", "object", "canvas"})
_CLOSING = {name: re.compile(rf"</{name}", re.IGNORECASE | re.ASCII) for name in _OPAQUE | _HIDDEN}
_BLOCKS = frozenset(
    {
        *("address", "article", "aside", "blockquote", "body", "dd", "details", "dialog", "div", "dl", "dt"),
        *(
            "fieldset",
            "figcaption",
            "figure",
            "footer",
            "form",
            "header",
            "hr",
            "main",
            "nav",
            "ol",
            "option",
        ),
        *("p", "pre", "section", "summary", "table", "tbody", "tfoot", "thead", "tr", "ul"),
    }
)
_MAIN = frozenset({"main", "article"})
_HEADINGS = {f"h{level}": "\n\n" + "#" * level + " " for level in range(1, 7)}
_MARKS = {"br": "\n", "li": "\n- ", "td": " | ", "th": " | "}


@dataclass(frozen=True, slots=True)
class Page:
    """A page's title, and its text with one blank line at most between paragraphs."""

    title: str
    text: str


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str  # "text", "start", "end" or "title"
    value: str


def readable(markup: str) -> Page:
    """Title and text; of the main content alone where the page marks it."""
    title = ""
    everything: list[str] = []
    main: list[str] = []
    main_depth = pre_depth = 0
    after_space = True
    for token in _tokens(markup):
        if token.kind == "title":
            title = title or _collapsed(token.value).strip()
            continue
        step = {"start": 1, "end": -1}.get(token.kind, 0)
        main_depth = max(0, main_depth + step * (token.value in _MAIN))
        pre_depth = max(0, pre_depth + step * (token.value == "pre"))
        piece = _piece(token, keep_spaces=pre_depth > 0)
        if pre_depth == 0 and after_space:
            piece = piece.removeprefix(" ")
        after_space = piece[-1].isspace() if piece else after_space
        everything.append(piece)
        if main_depth:
            main.append(piece)
    text = _tidy("".join(main))
    return Page(title, text if len(text) >= MAIN_CHARS_MIN else _tidy("".join(everything)))


def without_markup(fragment: str) -> str:
    """A short HTML fragment as one line of text."""
    return _collapsed("".join(_piece(token, keep_spaces=False) for token in _tokens(fragment))).strip()


def _piece(token: _Token, *, keep_spaces: bool) -> str:
    if token.kind == "text":
        text = _unescaped(token.value)
        return text if keep_spaces else _SPACES.sub(" ", text)
    if token.value in _BLOCKS:
        return "\n" if token.value == "tr" else "\n\n"
    if token.value in _HEADINGS:
        return _HEADINGS[token.value] if token.kind == "start" else "\n\n"
    return _MARKS.get(token.value, "") if token.kind == "start" else ""


def _tokens(markup: str) -> Iterator[_Token]:
    scanner = _Scanner(markup)
    position = 0
    for _ in range(TAG_COUNT_MAX):
        opening = _OPENING.search(markup, position)
        start = len(markup) if opening is None else opening.start()
        if start > position:
            yield _Token("text", markup[position:start])
        if opening is None:
            return
        token, position = scanner.tag(start)
        if token is not None:
            yield token


class _Scanner:
    """Reads one tag at a time. A search that found nothing is never made again, so that all of them are linear."""

    def __init__(self, markup: str) -> None:
        self._markup = markup
        self._absent: set[str] = set()

    def tag(self, start: int) -> tuple[_Token | None, int]:
        """The token that opens at `start`, if it is for reading, and where to go on."""
        if self._markup.startswith("<!--", start):
            return None, self._after("-->", start + 4)
        if self._markup.startswith(("<!", "<?"), start):
            return None, self._after(">", start + 2)
        name = _TAG_NAME.match(self._markup, start + 1)
        assert name is not None
        end = self._tag_end(name.end())
        tag = name[0].lower()
        if tag.startswith("/"):
            return _Token("end", tag[1:]), end
        if tag in _CLOSING and not self._markup.startswith("/>", end - 2):
            return self._skipped(tag, end)
        return _Token("start", tag), end

    def _skipped(self, tag: str, start: int) -> tuple[_Token | None, int]:
        closing = None if tag in self._absent else _CLOSING[tag].search(self._markup, start)
        if closing is None:
            self._absent.add(tag)
            return None, len(self._markup) if tag in _OPAQUE else start
        token = _Token("title", _unescaped(self._markup[start : closing.start()])) if tag == "title" else None
        return token, self._after(">", closing.end())

    def _tag_end(self, position: int) -> int:
        while True:
            match = _UNTIL_QUOTE_OR_END.match(self._markup, position)
            assert match is not None
            position = match.end()
            if position >= len(self._markup):
                return position
            if self._markup[position] == ">":
                return position + 1
            position = self._after_quote(self._markup[position], position + 1)

    def _after_quote(self, quote: str, position: int) -> int:
        if quote in self._absent:
            return position
        end = self._markup.find(quote, position)
        if end < 0:
            self._absent.add(quote)
            return position
        return end + 1

    def _after(self, what: str, position: int) -> int:
        end = self._markup.find(what, position)
        return len(self._markup) if end < 0 else end + len(what)


def _unescaped(text: str) -> str:
    try:
        return html.unescape(text)
    except ValueError:  # A character number with more digits than Python reads.
        return text


def _collapsed(text: str) -> str:
    return _SPACES.sub(" ", text)


def _tidy(text: str) -> str:
    lines: list[str] = []
    for line in text.split("\n"):
        # One leading space is left over from the markup; more of them are somebody's program text.
        line = line.rstrip()
        line = line[1:] if line.startswith(" ") and not line.startswith("  ") else line
        line = line.removeprefix("| ") if line.startswith("| ") else line
        if line or (lines and lines[-1]):
            lines.append(line)
    return "\n".join(lines).strip("\n")
