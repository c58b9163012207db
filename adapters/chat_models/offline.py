"""The built-in model `offline:offline`: what answers when no language model is connected.

It is deterministic and invents nothing. It runs a tool when asked to in so many words, quotes tool results, and
answers questions with the very sentences of its prompt that share the question's words, saying where they stand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from json import JSONDecoder
from typing import NamedTuple

from adapters.chat_models.limits import TOOL_REQUESTS_MAX
from adapters.chat_models.reply import ReplyParts
from domain.ports import Message, ModelCard, ModelReply, ModelRequest

SCANNED_CHARS_MAX = 100_000
"""How much of the prompt is searched, the newest part of it: a limit on the time one answer may take."""
QUOTED_CHARS_MAX = 20_000
QUESTION_CHARS_MAX = 2_000
GREETING_CHARS_MAX = 80
SENTENCES_QUOTED_MAX = 3
WORDS_SHARED_MIN = 2
TOOLS_NAMED_MAX = 20

NOTICE = (
    "I am the built-in offline model. To connect a real one, start Ollama, or set OPENAI_BASE_URL and "
    "OPENAI_API_KEY, or provide AWS credentials and a region for Bedrock."
)

CARD = ModelCard(
    name="offline:offline",
    provider="offline",
    display_name="Offline (built in, extractive)",
    tools=True,
    vision=False,
    context_tokens=None,
    price_class="free",
)

_TOOL_WISH = re.compile(
    r"(?:(?:^|\s)/tool\s+|\b(?:use|run|call)\s+(?:the\s+)?tool\s+)[`\"']?([\w.:-]+)[`\"']?"
    r"(?:\s+with(?:\s+(?:the\s+)?arguments?)?)?\s*:?\s*",
    re.IGNORECASE,
)
_GREETING = re.compile(
    r"\s*(?:(?:who|what) are you|hi|hello|hey|hallo|hola|bonjour|salut|ciao|greetings|good (?:morning|afternoon|evening|day))"
    r"(?:[ ,]+(?:there|you|all|everyone|agent|assistant|oshaani))*\s*[!.,?\s]*",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[^\n.!?]+(?:[.!?](?!\s|$)[^\n.!?]*)*[.!?]*")
_LABEL = re.compile(r"\s*(?:[-*>]\s*)?\[([^\]\n]{1,80})\]")
_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
_STREAMED = re.compile(r"\s*\S+|\s+$")
_COMMON = frozenset(
    """
    a about an and any are as at be been but by can could did do does doesn't for from give had has have he her his how
    i if in into is it its know me my no not of on or our please say she so some tell than that the their them then
    there these they this to us was we were what what's when where which who whom whose why will with would you your
    """.split()  # noqa: SIM905 - a list of ninety quoted words is harder to read.
)


def _no_constant(name: str) -> object:
    """Refuse NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(name)


_json = JSONDecoder(parse_constant=_no_constant)


class _Wish(NamedTuple):
    """A tool the user asked for. `arguments` is None where they are no JSON object."""

    tool: str
    arguments: object


class _Found(NamedTuple):
    """A sentence of the prompt, where it stands, and how many of the question's words it has."""

    score: int
    order: int
    place: str
    sentence: str


class Offline:
    """The built-in model; holds nothing, touches nothing, and may be called from any task."""

    provider = "offline"

    async def cards(self) -> Sequence[ModelCard]:
        """Its one card: it can always be reached."""
        return (CARD,)

    async def complete(
        self, request: ModelRequest, on_text: Callable[[str], None] | None = None
    ) -> ModelReply:
        """Answer at once; never fails. Streams by words."""
        parts = ReplyParts(request, "The offline model", on_text)
        answer = _answer(request)
        if isinstance(answer, str):
            for piece in _STREAMED.findall(answer) if on_text is not None else (answer,):
                parts.add_text(piece)
        else:
            for wish in answer:
                parts.add_tool("", wish.tool, wish.arguments)
        return parts.finished("stop", None)

    async def close(self) -> None:
        """Nothing to let go of."""


def _answer(request: ModelRequest) -> str | list[_Wish]:
    """Text, or the tools that the user asked for in so many words."""
    if not request.messages:
        return f"There is no question. {NOTICE}"
    last = request.messages[-1]
    if last.role == "tool":
        return _quoted_results(request.messages)
    if wishes := list(_wishes(last.content)):
        return _excuse(wishes, request) or wishes
    if len(last.content) <= GREETING_CHARS_MAX and _GREETING.fullmatch(last.content):
        return f"Hello! {NOTICE} Until then I only quote what I was given.{_tools_line(request)}"
    return _extracted(request, last.content) or _cannot(request)


def _wishes(text: str) -> Iterator[_Wish]:
    at = 0
    for _ in range(TOOL_REQUESTS_MAX):
        wish = _TOOL_WISH.search(text, at)
        if wish is None:
            return
        at = start = wish.end()
        arguments: object = {}
        if text.startswith("{", start):
            try:
                arguments, at = _json.raw_decode(text, start)
            except (ValueError, RecursionError):
                arguments, at = None, len(text)
        yield _Wish(wish[1], arguments)


def _excuse(wishes: Sequence[_Wish], request: ModelRequest) -> str | None:
    """Why the wishes cannot be granted; None when they can."""
    offered = {tool.name for tool in request.tools}
    for wish in wishes:
        if wish.tool not in offered:
            return f"The tool `{wish.tool}` is not offered to me here.{_tools_line(request)} {NOTICE}"
        if not isinstance(wish.arguments, dict):
            return (
                f'The arguments for `{wish.tool}` are not a JSON object such as {{"name": "value"}}. {NOTICE}'
            )
    return None


def _quoted_results(messages: Sequence[Message]) -> str:
    """The tool results that end the prompt, quoted, each with the name of its tool."""
    first = len(messages)
    while first > 0 and messages[first - 1].role == "tool":
        first -= 1
    asked = messages[first - 1].tool_requests if first else ()
    names = {request.id: request.name for request in asked}
    answers = []
    for message in messages[first:]:
        name = names.get(message.tool_call_id or "")
        source = f"The tool `{name}`" if name else "A tool"
        quoted = _shortened(message.content).replace("\n", "\n> ")
        answers.append(f"{source} answered:\n> {quoted}" if quoted else f"{source} answered with nothing.")
    return "\n\n".join([*answers[:TOOL_REQUESTS_MAX], f"({NOTICE})"])


def _shortened(text: str) -> str:
    text = text.strip()
    if len(text) <= QUOTED_CHARS_MAX:
        return text
    return f"{text[:QUOTED_CHARS_MAX]}… (cut here; {len(text)} characters in all)"


def _extracted(request: ModelRequest, question: str) -> str | None:
    """The sentences that share most of the question's words, with their places; None when none shares enough."""
    wanted = {
        _stem(word) for word in _WORD.findall(question[:QUESTION_CHARS_MAX].lower()) if word not in _COMMON
    }
    if not wanted:
        return None
    enough = min(len(wanted), WORDS_SHARED_MIN)
    found: list[_Found] = []
    for place, text in _sources(request):
        lowered = text.lower()
        if any(word in lowered for word in wanted):
            found.extend(_matches(place, text, wanted, len(found)))
    best = sorted((f for f in found if f.score >= enough), key=lambda f: (-f.score, f.order))
    if not best:
        return None
    # One sentence that has every word says it all; weaker ones beside it would only distract.
    chosen = sorted(best[:SENTENCES_QUOTED_MAX], key=lambda f: f.order)
    lines = "\n".join(
        f"- “{_shortened(f.sentence)}” ({f.place})" for f in chosen if 2 * f.score > best[0].score
    )
    return f"This is what I was given about it:\n{lines}\n\n({NOTICE})"


def _sources(request: ModelRequest) -> Iterator[tuple[str, str]]:
    """What may be quoted, with its place: the system prompt, then earlier messages, the newest part of them."""
    left = SCANNED_CHARS_MAX
    chosen: list[tuple[str, str]] = []
    for number in range(len(request.messages) - 1, 0, -1):
        message = request.messages[number - 1]
        if left <= 0:
            break
        # Its own earlier answers are quotations already.
        if message.content and NOTICE not in message.content:
            chosen.append((f"message {number}, {message.role}", message.content[:left]))
            left -= len(message.content)
    yield "system prompt", request.system[:SCANNED_CHARS_MAX]
    yield from reversed(chosen)


def _matches(place: str, text: str, wanted: set[str], order: int) -> Iterator[_Found]:
    """Sentences of `text` with any of the words. A line that starts with `[label]` names what follows it."""
    label = ""
    for line in text.splitlines():
        if not line.strip():
            continue
        if marked := _LABEL.match(line):
            label = f", [{marked[1]}]"
        for sentence in _SENTENCE.findall(line):
            words = {_stem(word) for word in _WORD.findall(sentence.lower())}
            if shared := len(wanted & words):
                order += 1
                yield _Found(shared, order, place + label, sentence.strip())


def _stem(word: str) -> str:
    """The word without a plural's or verb's `s`: enough for “plans” to find “plan”."""
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _cannot(request: ModelRequest) -> str:
    return f"I cannot answer this: nothing I was given mentions it, and I do not make things up. {NOTICE}{_tools_line(request)}"


def _tools_line(request: ModelRequest) -> str:
    if not request.tools:
        return ""
    names = ", ".join(f"`{tool.name}`" for tool in request.tools[:TOOLS_NAMED_MAX])
    more = " and others" if len(request.tools) > TOOLS_NAMED_MAX else ""
    return f" I can run tools when asked like this: /tool NAME {{JSON arguments}}. Offered: {names}{more}."
