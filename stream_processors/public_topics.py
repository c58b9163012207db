"""What happened is published, without anything personal, for whoever may subscribe.

Reads every event; asks for nothing and changes nothing. Safe to replay: what is published again has the ids it had
before. Commands that were refused have no events: they are in the log's table of commands only.
"""

from __future__ import annotations

from collections.abc import Awaitable
from functools import partial

from commands.bus import LATEST
from domain.agent import Agent
from domain.credit_account import CreditAccount
from domain.ids import UserId
from domain.ports import PublicMessage
from domain.turn import Turn
from schemas.codec import EVENT_TYPES
from schemas.public_facts import (
    Fact,
    UsageModelCalled,
    UsageToolCalled,
    charged_lines,
    state_of,
)
from schemas.public_forms import is_public
from schemas.records import AnyRecord
from stream_processors.aftermath import insist
from stream_processors.processor import Processor, Work
from stream_processors.publication import Publication, TurnFacts

public_topics = Processor("public_topics", order="tenant")


@public_topics.on(*(kind.event_class for kind in EVENT_TYPES.values()))
async def publish(record: AnyRecord, work: Work) -> Awaitable[None]:
    """Hand a record, and what follows from it, to the broker; what is returned ends when all of it is published."""
    publication = work.publication
    assert publication is not None, "this worker was given nothing to publish with"
    messages: list[PublicMessage] = []
    if is_public(EVENT_TYPES[record.type]):
        messages = await _messages(record, publication)
    finished = publication.aftermath.of(record, await publication.publisher.send(messages))
    if isinstance(record.event, Agent.Event):
        return _publish_agent(record, work, publication, finished)
    return finished


async def _messages(record: AnyRecord, publication: Publication) -> list[PublicMessage]:
    event, key, facts = record.event, record.stream_id, list[Fact]()
    if isinstance(event, Turn.Event):
        turn = await publication.facts_of(record)
        key, facts = turn.conversation_id or record.stream_id, _usage(record, turn)
    elif isinstance(event, CreditAccount.CreditsSettled | CreditAccount.LateCharge):
        facts = [*charged_lines(record)]
    messages = [publication.events.of_event(record, key)]
    messages += [publication.events.of_fact(fact, record, n) for n, fact in enumerate(facts)]
    if isinstance(event, CreditAccount.Moved):
        messages += publication.balance(record)
    return messages


# --- usage


def _usage(record: AnyRecord, turn: TurnFacts) -> list[Fact]:
    event = record.event
    if isinstance(event, Turn.ModelCallCompleted):
        return [_model_called(record, event, turn)]
    if isinstance(event, Turn.ToolCalled) and event.tool_call_id in turn.tools:
        return [_tool_called(record, event, turn)]
    return []


def _model_called(record: AnyRecord, event: Turn.ModelCallCompleted, turn: TurnFacts) -> UsageModelCalled:
    provider, model = turn.models[event.call_id]
    return UsageModelCalled(
        tenant_id=record.tenant_id,
        turn_id=record.stream_id,
        conversation_id=turn.conversation_id,
        agent_id=turn.agent_id,
        call_id=event.call_id,
        provider=provider,
        model=model,
        input_tokens=event.usage.input,
        output_tokens=event.usage.output,
        cache_read_tokens=event.usage.cache_read,
        cache_write_tokens=event.usage.cache_write,
        source=event.usage.source,
        latency_ms=event.latency_ms,
        ttft_ms=event.ttft_ms,
    )


def _tool_called(record: AnyRecord, event: Turn.ToolCalled, turn: TurnFacts) -> UsageToolCalled:
    requested = turn.tools[event.tool_call_id]
    return UsageToolCalled(
        tenant_id=record.tenant_id,
        turn_id=record.stream_id,
        conversation_id=turn.conversation_id,
        agent_id=turn.agent_id,
        tool_call_id=event.tool_call_id,
        tool=requested.tool,
        kind=requested.kind,
        outcome=event.outcome,
        error_class=event.error_class,
        latency_ms=event.latency_ms,
        units=event.units,
        price_ncr=requested.price_ncr,
    )


# --- agents


async def _publish_agent(
    record: AnyRecord, work: Work, publication: Publication, finished: Awaitable[None]
) -> None:
    """The agent as it is now, at least as new as the record; again if another worker may have come in between."""
    await finished
    agent_id, tenant_id, version = record.stream_id, UserId(record.tenant_id), record.stream_version
    while not publication.is_published(agent_id, version):
        agent = await insist(partial(work.bus.read, Agent, agent_id, tenant_id, version))
        if publication.is_published(agent_id, agent.version):
            return
        publication.note(agent_id, agent.version)
        message = (
            publication.events.of_deleted_agent(agent_id)
            if agent.deleted
            else publication.events.of_agent(state_of(agent), record.recorded_at)
        )
        await (await publication.publisher.send([message]))
        if not publication.may_be_overtaken(record):
            return
        version = LATEST
