from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st

from domain.ports import Message, ToolRequest
from domain.prompt import FORGOTTEN, Exchange, digest_of, messages_of
from tests.domain.spec import given
from tests.domain.turns import accepted, asked, ran, said, wants

HISTORY = [Exchange(f"q{n}", f"a{n}", 2 * n, 2 * n + 1) for n in range(3)]
NEW = given(accepted()).root
ROLES = st.sampled_from(["user", "assistant", "tool"])
MESSAGES = st.lists(st.builds(Message, ROLES, st.text("a\x1e\x1f\n", max_size=4)), max_size=4)


def contents(history_messages_max: int) -> list[str]:
    return [message.content for message in messages_of(HISTORY, "now", NEW, history_messages_max)]


def test_the_past_comes_before_the_question():
    assert contents(50) == ["q0", "a0", "q1", "a1", "q2", "a2", "now"]
    assert [message.role for message in messages_of(HISTORY[:1], "now", NEW, 50)] == [
        "user",
        "assistant",
        "user",
    ]


@pytest.mark.parametrize(("limit", "kept"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (6, 3), (1000, 3)])
def test_only_so_many_messages_of_the_past_are_kept_and_only_whole_exchanges(limit, kept):
    assert contents(limit) == [
        *(text for n in range(3 - kept, 3) for text in (f"q{n}", f"a{n}")),
        "now",
    ]


def test_what_happened_since_is_told_with_the_results_of_tools():
    turn = given(
        accepted(), asked(), said("Let me look.", wants(), wants("ocr", "p")), ran(), ran("failed", 1)
    ).root
    messages = messages_of([], "now", turn, 50)
    assert messages == (
        Message("user", "now"),
        Message(
            "assistant",
            "Let me look.",
            (
                ToolRequest("ref-web_search-q", "web_search", {"query": "q"}, '{"query": "q"}'),
                ToolRequest("ref-ocr-p", "ocr", {"query": "p"}, '{"query": "p"}'),
            ),
        ),
        Message("tool", "succeeded", tool_call_id="ref-web_search-q"),
        Message("tool", "failed", tool_call_id="ref-ocr-p"),
    )


def test_what_was_erased_is_said_to_be():
    turn = given(accepted(), asked(), said("Let me look.", wants()), ran()).root.fork()
    turn.said = [replace(each, text=None) for each in turn.said]
    turn.tool_calls = {id: replace(call, arguments=None, result=None) for id, call in turn.tool_calls.items()}
    messages = messages_of([], "now", turn, 50)
    assert messages[1] == Message("assistant", "", (ToolRequest("ref-web_search-q", "web_search", {}, "{}"),))
    assert messages[2].content == FORGOTTEN


@for_all(st.text(max_size=3), MESSAGES, st.text(max_size=3), MESSAGES)
def test_different_prompts_have_different_fingerprints(system, messages, other_system, other_messages):
    same = (system, messages) == (other_system, other_messages)
    assert (digest_of(system, messages) == digest_of(other_system, other_messages)) == same


def test_a_fingerprint_covers_what_tools_were_asked():
    prompts = [
        [
            Message("assistant", "", (ToolRequest("1", "ocr", {}, raw),)),
            Message("tool", "x", tool_call_id=ref),
        ]
        for raw in ("{}", '{"a":1}')
        for ref in ("1", "2")
    ]
    assert len({digest_of("", messages) for messages in prompts}) == 4
    assert digest_of("", prompts[0]) == digest_of("", list(prompts[0]))
