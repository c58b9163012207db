"""What the routes answer of a turn: its story, read where it stands, and errors for turns without an answer."""

from __future__ import annotations

from uuid import UUID

from api.call import Call, conversation_name, request_name
from api.errors import Problem
from domain.conversation import Conversation
from domain.errors import NotFound
from domain.ids import TurnId, UserId, shard_of
from domain.money import credits
from domain.turn import Turn
from schemas.records import AnyRecord
from schemas.turn_story import Story, code_of_end

TURN_EVENTS_MAX = 1_000  # more than a turn can have, see domain.turn
RUNNING = "Request is being processed. Use /api/get_answer with request_id to get the response."


async def turn_records(call: Call, turn_id: TurnId, owner_id: UserId) -> list[AnyRecord]:
    """Everything recorded about a turn, as the log has it now.

    Raises:
        NotFound: no such turn of this tenant.
    """
    server = call.server
    rows = await server.log.read_stream(shard_of(owner_id), turn_id, TURN_EVENTS_MAX)
    if not rows or rows[0].tenant_id != owner_id or rows[0].type != Turn.Accepted.TOPIC:
        raise NotFound("request")
    return await server.records.open(rows)


async def story_of(call: Call, turn_id: TurnId, owner_id: UserId) -> Story:
    """The story of a turn, as the log has it now.

    Raises:
        NotFound: no such turn of this tenant.
    """
    return Story(turn_id).tell(await turn_records(call, turn_id, owner_id))


async def visible_story(call: Call, turn_id: TurnId | None) -> Story:
    """The story of a turn that the caller may know of: the owner's, and for an agent's key that agent's.

    Raises:
        NotFound: no such turn, or not the caller's.
    """
    principal = call.caller()
    if turn_id is None:
        raise NotFound("request")
    story = await story_of(call, turn_id, principal.owner_id)
    assert story.accepted is not None
    if principal.agent_id not in (None, story.accepted.agent_id):
        raise NotFound("request")
    return story


async def conversation_shown(call: Call, conversation_id: UUID | None, owner_id: UserId) -> str | None:
    """A conversation as its caller calls it."""
    if conversation_id is None:
        return None
    conversation = await call.server.bus.read(Conversation, conversation_id, owner_id)
    return conversation.name or conversation_name(conversation_id)


def problem_of_end(story: Story) -> Problem:
    """Why a turn has no answer."""
    ended = story.ended
    assert isinstance(ended, Turn.Failed | Turn.TimedOut | Turn.Cancelled)
    facts = {"request_id": request_name(story.turn_id), "reason": ended.error_code}
    return Problem(code_of_end(ended), ended.sentence, facts)


def charged(story: Story) -> str:
    """What the turn cost, in credits."""
    return credits(story.ended.charged_ncr) if story.ended else "0.00"
