from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from uuid import UUID

from domain.conversation import QUEUED_TURNS_MAX, Conversation, WhenBusy
from domain.errors import ConversationBusy, NotFound, TooManyQueued
from domain.ids import AgentId, ConversationId, MessageId, ToolCallId, TurnId, UserId, named_conversation
from tests.domain.spec import given

Do = Callable[[Conversation], object]

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
AGENT, OTHER_AGENT = AgentId(UUID(int=1)), AgentId(UUID(int=2))
TURN_1, TURN_2, TURN_3 = (TurnId(UUID(int=10 + n)) for n in (1, 2, 3))
TOOL_CALL = ToolCallId(UUID(int=20))


def started() -> Conversation:
    return Conversation.start(
        ConversationId(UUID(int=3)), UserId(UUID(int=4)), AGENT, "api", "user:4", "support", NOON
    )


def sent(turn_id: TurnId, when_busy: WhenBusy = "queue") -> Do:
    message_id = MessageId(UUID(int=turn_id.int + 100))
    return lambda conversation: conversation.accept(turn_id, message_id, "Hello", when_busy, NOON)


def replied(turn_id: TurnId) -> Do:
    message_id = MessageId(UUID(int=turn_id.int + 200))
    return lambda conversation: conversation.reply(turn_id, message_id, "Hi", (TOOL_CALL,), NOON)


def closed(turn_id: TurnId, outcome: str = "failed") -> Do:
    return lambda conversation: conversation.close(turn_id, outcome)


def test_the_first_message_runs_at_once():
    when = given(started).when(sent(TURN_1))
    when.then(Conversation.MessageSent, active_turn=TURN_1, queue=[], message_count=1).then_returned(True)


def test_a_message_to_a_busy_conversation_waits_its_turn():
    when = given(started, sent(TURN_1)).when(sent(TURN_2))
    when.then(Conversation.MessageSent, Conversation.TurnQueued, active_turn=TURN_1, queue=[TURN_2])
    when.then_returned(False)


def test_who_does_not_want_to_wait_is_told_that_the_conversation_is_busy():
    given(started, sent(TURN_1)).when(sent(TURN_2, "reject")).then_refused(ConversationBusy)
    given(started).when(sent(TURN_1, "reject")).then(Conversation.MessageSent)


def test_who_interrupts_goes_ahead_of_those_that_wait():
    busy = given(started, sent(TURN_1), sent(TURN_2))
    when = busy.when(lambda conversation: conversation.interrupt())
    when.then(Conversation.TurnClosed, active_turn=None, queue=[TURN_2]).then_returned(TURN_1)
    busy.when(lambda conversation: conversation.interrupt(), sent(TURN_3, "interrupt")).then(
        Conversation.TurnClosed, Conversation.MessageSent, active_turn=TURN_3, queue=[TURN_2]
    )
    given(started).when(lambda conversation: conversation.interrupt()).then().then_returned(None)


def test_so_many_messages_may_wait():
    waiting = [sent(TurnId(UUID(int=1000 + n))) for n in range(QUEUED_TURNS_MAX)]
    before = given(started, sent(TURN_1), *waiting)
    before.when(sent(TURN_2)).then_refused(TooManyQueued, limit=QUEUED_TURNS_MAX)
    before.when(replied(TURN_1), sent(TURN_2)).then(
        Conversation.AssistantReplied,
        Conversation.TurnActivated,
        Conversation.MessageSent,
        Conversation.TurnQueued,
    )


def test_an_answer_makes_room_for_the_next_in_order():
    when = given(started, sent(TURN_1), sent(TURN_2), sent(TURN_3)).when(replied(TURN_1))
    when.then(
        Conversation.AssistantReplied,
        Conversation.TurnActivated,
        active_turn=TURN_2,
        queue=[TURN_3],
        message_count=4,
    ).then_returned(TURN_2)


def test_the_last_answer_leaves_the_conversation_free():
    when = given(started, sent(TURN_1)).when(replied(TURN_1))
    when.then(Conversation.AssistantReplied, active_turn=None).then_returned(None)


def test_a_turn_that_failed_makes_room_too():
    when = given(started, sent(TURN_1), sent(TURN_2)).when(closed(TURN_1))
    when.then(
        Conversation.TurnClosed, Conversation.TurnActivated, active_turn=TURN_2, queue=[], message_count=2
    )
    when.then_returned(TURN_2)


def test_a_waiting_turn_that_is_cancelled_leaves_the_queue_and_wakes_nobody():
    before = given(started, sent(TURN_1), sent(TURN_2), sent(TURN_3))
    when = before.when(closed(TURN_2, "cancelled"))
    when.then(Conversation.TurnClosed, active_turn=TURN_1, queue=[TURN_3]).then_returned(None)


def test_a_conversation_of_another_agent_does_not_exist():
    given(started).when(lambda conversation: conversation.check_agent(OTHER_AGENT)).then_refused(NotFound)
    given(started).when(lambda conversation: conversation.check_agent(AGENT)).then()


def test_the_same_name_with_another_agent_is_another_conversation():
    assert named_conversation(AGENT, "support") == named_conversation(AGENT, "support")
    assert named_conversation(AGENT, "support") != named_conversation(OTHER_AGENT, "support")


def test_a_conversation_keeps_no_text():
    conversation = given(started, sent(TURN_1), replied(TURN_1)).root
    assert "Hello" not in repr(conversation)
