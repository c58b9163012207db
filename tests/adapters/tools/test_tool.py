from __future__ import annotations

import asyncio
from typing import Annotated

import pytest
from annotated_types import Len
from pydantic import BaseModel, Field

from adapters.tools.texts import RESULT_TEXT_BYTES_MAX, decoded, result_text
from adapters.tools.tool import tool
from domain.ports import Effect, EgressDenied, Tool, ToolContext, ToolFailed, ToolResult
from tests.adapters.tools.calls import context, failure_of, result_of


class Stop(BaseModel):
    title: str
    zone: int = 1


@tool(timeout_s=5.0, effect=Effect.IDEMPOTENT)
async def journey(
    origin: Annotated[str, Len(1, 5), Field(description="Where it begins")],
    stops: Annotated[list[Stop], Len(0, 2)],
    context: ToolContext,
    fast: bool = False,
) -> str:
    """Plan a journey.

    Longer words.
    """
    return f"{origin} {[stop.title for stop in stops]} {fast} {context.tool_call_id}"


ARGUMENTS = {"origin": "Rome", "stops": [{"title": "Pisa"}]}


async def test_name_docstring_and_annotations_are_what_a_model_sees() -> None:
    port: Tool = journey
    assert (port.name, port.kind, port.effect, port.timeout_s) == (
        "journey",
        "builtin",
        Effect.IDEMPOTENT,
        5.0,
    )
    assert port.description == "Plan a journey.\n\nLonger words."
    assert port.missing() is None
    assert port.parameters == {
        "type": "object",
        "additionalProperties": False,
        "required": ["origin", "stops"],
        "properties": {
            "origin": {"type": "string", "minLength": 1, "maxLength": 5, "description": "Where it begins"},
            "stops": {
                "type": "array",
                "maxItems": 2,
                "items": {
                    "type": "object",
                    "required": ["title"],
                    "properties": {"title": {"type": "string"}, "zone": {"type": "integer", "default": 1}},
                },
            },
            "fast": {"type": "boolean", "default": False},
        },
    }


async def test_the_function_gets_checked_arguments_and_the_context() -> None:
    assert journey.validate(ARGUMENTS) is None
    assert await result_of(journey, **ARGUMENTS) == "Rome ['Pisa'] False call-1"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"stops": []}, "'origin'"),
        ({**ARGUMENTS, "origin": "Stockholm"}, "'origin'"),
        ({**ARGUMENTS, "origin": 7}, "'origin'"),
        ({**ARGUMENTS, "stops": [{"title": "a"}, {"zone": "x"}]}, "'stops.1.title'"),
        ({**ARGUMENTS, "detour": 1}, "'detour'"),
        ({**ARGUMENTS, "context": {}}, "'context'"),
    ],
)
async def test_arguments_that_do_not_fit_are_told_in_one_sentence_naming_the_field(
    arguments: dict[str, object], field: str
) -> None:
    sentence = journey.validate(arguments)
    assert sentence is not None
    assert field in sentence
    assert sentence.count("\n") == 0
    failure = await failure_of(journey, **arguments)
    assert (str(failure), failure.error_class) == (sentence, "invalid_arguments")


@pytest.mark.parametrize("limit_s", [0.05, 60.0])
async def test_a_tool_ends_at_the_earlier_of_its_own_limit_and_the_callers(limit_s: float) -> None:
    @tool(timeout_s=0.05 if limit_s == 60.0 else 60.0, effect=Effect.PURE)
    async def endless() -> str:
        """Never end."""
        await asyncio.Event().wait()
        return ""

    with pytest.raises(ToolFailed, match=r"did not finish within 0\.05 s") as failure:
        await endless.run({}, context(timeout_s=limit_s))
    assert failure.value.error_class == "timed_out"


async def test_a_denied_request_is_a_failure_of_the_tool() -> None:
    @tool(timeout_s=1.0, effect=Effect.PURE)
    async def visit() -> str:
        """Visit."""
        raise EgressDenied("The door is shut.")

    failure = await failure_of(visit)
    assert (str(failure), failure.error_class) == ("The door is shut.", "unreachable")


async def test_units_and_files_pass_and_unstorable_characters_do_not() -> None:
    @tool(timeout_s=1.0, effect=Effect.PURE)
    async def count() -> ToolResult:
        """Count."""
        return ToolResult("a\x00b\ud800", {"pages": 2}, ("file-1",))

    result = await count.run({}, context())
    assert (result.text, result.units, result.files) == ("a\ufffdb\ufffd", {"pages": 2}, ("file-1",))


def test_a_long_result_is_cut_between_characters_with_a_note() -> None:
    text = result_text("é🦊" * RESULT_TEXT_BYTES_MAX)
    assert len(text.encode()) <= RESULT_TEXT_BYTES_MAX
    assert text.endswith(
        f"[cut: {6 * RESULT_TEXT_BYTES_MAX} bytes, the first {RESULT_TEXT_BYTES_MAX} are shown]"
    )
    assert "\ufffd" not in text
    assert result_text("x" * RESULT_TEXT_BYTES_MAX) == "x" * RESULT_TEXT_BYTES_MAX


@pytest.mark.parametrize(
    ("content", "charset", "text"),
    [
        (b"caf\xe9", "iso-8859-1", "café"),
        (b"caf\xe9", None, "caf\ufffd"),
        ("日本".encode("shift_jis"), "Shift_JIS", "日本"),
        (b"\xef\xbb\xbfx", "utf-8", "x"),
        (b"\\u0041", "unicode_escape", "\\u0041"),
        (b"x", "iso-8859-99", "x"),
        (b"xn--a", "idna", "xn--a"),
    ],
)
def test_text_is_read_in_its_character_set_if_that_is_one(
    content: bytes, charset: str | None, text: str
) -> None:
    assert decoded(content, charset) == text
