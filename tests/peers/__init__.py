"""Servers of the outside world that tests run on loopback, and the script that every model peer follows.

A model peer does what the last user message asks for in double square brackets, else it gives `ANSWER`:

    [[tool NAME {json}]]   ask for the tool until its result is there, then repeat the result; may stand several times
    [[loop NAME {json}]]   ask for the tool, again and again
    [[unknown]]            ask for a tool that does not exist
    [[badargs NAME]]       ask for a tool with arguments that are not JSON (or no object)
    [[say TEXT]]           answer with TEXT
    [[slow MS]]            answer, but later
    [[pause]]              stream the first piece, then wait for the peer's `resume` event
    [[hang]]               take the request and never answer
    [[status N]]  [[500]]  answer with that HTTP status
    [[429 N S]]            the first N attempts are told to come back in S seconds (default 1 and 1)
    [[context]]            say that the prompt is too long
    [[garbage]] [[utf8]]   answer with what is not JSON, or not UTF-8
    [[huge]]               answer with more than two megabytes
    [[nul]]                answer with U+0000 in the text
    [[nousage]]            answer without counting tokens
    [[truncate]] [[reset]] stop in the middle: end the body properly, or reset the connection
    [[length]] [[filter]]  stop for that reason
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

ANSWER = "It is so: ✓ done, as asked."
INPUT_TOKENS, CACHED_TOKENS, OUTPUT_TOKENS = 15, 5, 7
HUGE_BYTES = 2_100_000
NUL_TEXT = "before\x00after"
BAD_ARGUMENTS = '{"url": exam'

_DIRECTIVE = re.compile(r"\[\[(\w+)\s*")
_NAME = re.compile(r"([\w.:-]+)\s*")
_json = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Scene:
    """What a peer is to do with one request. `cut` ends a body early; `status` other than 200 is an error."""

    text: str = ANSWER
    tools: tuple[tuple[str, str], ...] = ()
    reason: str = "stop"
    status: int = 200
    retry_after_s: int | None = None
    error: str = "The upstream will not."
    body: bytes | None = None
    cut: str = ""
    hang: bool = False
    pause: bool = False
    slow_s: float = 0.0
    usage: bool = True


@dataclass(slots=True)
class _Play:
    """A scene while the directives are read."""

    results: Sequence[str]
    attempt: int
    set: dict[str, object] = field(default_factory=dict)
    tools: list[tuple[str, str]] = field(default_factory=list)


def scene_of(user_text: str, results: Sequence[str], attempt: int) -> Scene:
    """The scene for the last user message, the tool results after it, and the how-manieth attempt this is (from 1)."""
    play = _Play(results, attempt)
    at = 0
    while found := _DIRECTIVE.search(user_text, at):
        at = _direct(play, found[1], user_text, found.end())
    if play.tools:
        return Scene(text="", tools=tuple(play.tools), reason="tool_calls")
    if results and "text" not in play.set:
        play.set["text"] = "The tool said: " + " | ".join(results)[:1000]
    return Scene(**play.set)  # type: ignore[arg-type]


def _direct(play: _Play, verb: str, text: str, at: int) -> int:
    """Read one directive's arguments; returns where it ends."""
    if verb in ("tool", "loop", "badargs"):
        name = _NAME.match(text, at)
        assert name is not None, f"[[{verb}]] without a tool"
        at, raw = name.end(), BAD_ARGUMENTS
        if verb != "badargs":
            _, end = _json.raw_decode(text, at) if text.startswith("{", at) else ({}, at)
            raw, at = text[at:end] or "{}", end
        if verb == "loop" or not play.results:
            play.tools.append((name[1], raw))
        return at
    end = text.find("]]", at)
    words = text[at : end if end >= 0 else len(text)]
    play.set.update(_simple(verb, words, play))
    return end if end >= 0 else len(text)


def _simple(verb: str, words: str, play: _Play) -> dict[str, object]:
    numbers = [int(word) for word in words.split() if word.isdigit()]
    settings = _PLAIN.get(verb, {})
    match verb:
        case "unknown" if not play.results:
            play.tools.append(("no_such_tool", "{}"))
        case "429":
            attempts, seconds = (*numbers, 1, 1)[:2] if numbers else (1, 1)
            settings = {"status": 429, "retry_after_s": seconds} if play.attempt <= attempts else {}
        case "status":
            settings = {"status": numbers[0]}
        case "slow":
            settings = {"slow_s": numbers[0] / 1000}
        case "say":
            settings = {"text": words}
        case "truncate" | "reset":
            settings = {"cut": verb}
        case _:
            pass
    return settings


_PLAIN: dict[str, dict[str, object]] = {
    "500": {"status": 500},
    "context": {
        "status": 400,
        "error": "Input is too long: this model's maximum context length is 8 tokens.",
    },
    "hang": {"hang": True},
    "pause": {"pause": True},
    "garbage": {"body": b"<html>It works!</html>"},
    "utf8": {
        "body": b'{"choices": [{"message": {"content": "\xff\xfe"}}], "message": {"content": "\xff"}}\n'
    },
    "huge": {"text": "x" * HUGE_BYTES},
    "nul": {"text": NUL_TEXT},
    "nousage": {"usage": False},
    "length": {"reason": "length"},
    "filter": {"reason": "content_filter"},
}


def pieces_of(text: str) -> list[str]:
    """A text as a streaming peer sends it: word by word, a long one in large pieces."""
    if len(text) > 1000:
        return [text[at : at + 50_000] for at in range(0, len(text), 50_000)]
    return re.findall(r"\s*\S+|\s+$", text)
