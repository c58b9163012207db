"""The order of turns between somebody and an agent: one answers at a time, the others wait."""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

from domain.aggregate import Created, PersonalText, Root
from domain.errors import ConversationBusy, NotFound, TooManyQueued
from domain.ids import AgentId, ConversationId, MessageId, ToolCallId, TurnId, UserId

QUEUED_TURNS_MAX = 20
FIRST_MESSAGE_VERSION = 2  # in the stream of its conversation, right after the beginning

Channel = Literal["api", "api_v1", "dashboard", "share", "mcp", "openai"]
WhenBusy = Literal["queue", "reject", "interrupt"]


class Conversation(Root):
    """A thread. It holds the order of its turns and no text: texts are read from the log where they are needed."""

    TOPIC = "Conversation"

    class Started(Root.Event, Created):
        TOPIC = "Conversation.Started"
        owner_id: UserId
        agent_id: AgentId
        channel: Channel
        started_by: str
        name: str | None
        started_at: datetime

    class MessageSent(Root.Event):
        TOPIC = "Conversation.MessageSent"
        message_id: MessageId
        turn_id: TurnId
        content: PersonalText
        attachments: tuple[UUID, ...]
        sent_at: datetime

        def apply(self, aggregate: Conversation) -> None:
            aggregate.message_count += 1
            if aggregate.active_turn is None:
                aggregate.active_turn = self.turn_id

    class TurnQueued(Root.Event):
        TOPIC = "Conversation.TurnQueued"
        turn_id: TurnId

        def apply(self, aggregate: Conversation) -> None:
            aggregate.queue = [*aggregate.queue, self.turn_id]

    class TurnActivated(Root.Event):
        TOPIC = "Conversation.TurnActivated"
        turn_id: TurnId

        def apply(self, aggregate: Conversation) -> None:
            aggregate.active_turn = self.turn_id
            aggregate.queue = [turn_id for turn_id in aggregate.queue if turn_id != self.turn_id]

    class AssistantReplied(Root.Event):
        """The answer; it also ends the turn's place in the conversation."""

        TOPIC = "Conversation.AssistantReplied"
        message_id: MessageId
        turn_id: TurnId
        content: PersonalText
        tool_call_ids: tuple[ToolCallId, ...]
        replied_at: datetime

        def apply(self, aggregate: Conversation) -> None:
            aggregate.message_count += 1
            aggregate._leave(self.turn_id)

    class TurnClosed(Root.Event):
        """A turn that ended without an answer."""

        TOPIC = "Conversation.TurnClosed"
        turn_id: TurnId
        outcome: str

        def apply(self, aggregate: Conversation) -> None:
            aggregate._leave(self.turn_id)

    def __init__(self, owner_id: UserId, agent_id: AgentId, channel: Channel, name: str | None) -> None:
        self.owner_id = owner_id
        self.agent_id = agent_id
        self.channel = channel
        self.name = name
        self.active_turn: TurnId | None = None
        self.queue: list[TurnId] = []
        self.message_count = 0

    @classmethod
    def start(
        cls,
        conversation_id: ConversationId,
        owner_id: UserId,
        agent_id: AgentId,
        channel: Channel,
        started_by: str,
        name: str | None,
        started_at: datetime,
    ) -> Conversation:
        """A new thread with an agent; `name` is what its caller calls it, if anything."""
        return cls.begin(
            cls.Started,
            conversation_id,
            owner_id=owner_id,
            agent_id=agent_id,
            channel=channel,
            started_by=started_by,
            name=name,
            started_at=started_at,
        )

    def check_agent(self, agent_id: AgentId) -> None:
        """A conversation of another agent does not exist for this one."""
        if agent_id != self.agent_id:
            raise NotFound("conversation")

    def accept(
        self, turn_id: TurnId, message_id: MessageId, content: str, when_busy: WhenBusy, sent_at: datetime
    ) -> bool:
        """Take a message. True when its turn may run at once, False when it waits for those before it.

        Raises:
            ConversationBusy: another turn is running and the caller asked not to queue.
            TooManyQueued: the queue is full.
        """
        busy = self.active_turn is not None
        if busy and when_busy == "reject":
            raise ConversationBusy
        if busy and len(self.queue) >= QUEUED_TURNS_MAX:
            raise TooManyQueued(QUEUED_TURNS_MAX)
        self.trigger_event(
            self.MessageSent,
            message_id=message_id,
            turn_id=turn_id,
            content=content,
            attachments=(),
            sent_at=sent_at,
        )
        if busy:
            self.trigger_event(self.TurnQueued, turn_id=turn_id)
        return not busy

    def interrupt(self) -> TurnId | None:
        """Make room for a message that does not wait; those in the queue wait on. Returns the turn that must end now."""
        turn_id = self.active_turn
        if turn_id is not None:
            self.trigger_event(self.TurnClosed, turn_id=turn_id, outcome="cancelled")
        return turn_id

    def reply(
        self,
        turn_id: TurnId,
        message_id: MessageId,
        content: str,
        tool_call_ids: tuple[ToolCallId, ...],
        replied_at: datetime,
    ) -> TurnId | None:
        """Answer a turn. Returns the turn that may run now."""
        self.trigger_event(
            self.AssistantReplied,
            message_id=message_id,
            turn_id=turn_id,
            content=content,
            tool_call_ids=tool_call_ids,
            replied_at=replied_at,
        )
        return self._activate_next()

    def close(self, turn_id: TurnId, outcome: str) -> TurnId | None:
        """End a turn without an answer. Returns the turn that may run now, if this one made room."""
        self.trigger_event(self.TurnClosed, turn_id=turn_id, outcome=outcome)
        return self._activate_next()

    def _activate_next(self) -> TurnId | None:
        if self.active_turn is not None or not self.queue:
            return None
        turn_id = self.queue[0]
        self.trigger_event(self.TurnActivated, turn_id=turn_id)
        return turn_id

    def _leave(self, turn_id: TurnId) -> None:
        if self.active_turn == turn_id:
            self.active_turn = None
        else:
            self.queue = [queued for queued in self.queue if queued != turn_id]
