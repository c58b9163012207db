"""`oshaani turn show`: why a turn answered, or did not, and what it cost."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from oshaani.cli import show
from oshaani.cli.names import CONVERSATION, turn_id_of, uuid_of
from oshaani.cli.session import open_core, run
from oshaani.cli.show import AsJson
from oshaani.cli.trouble import Failed

if TYPE_CHECKING:
    from domain.event_log import StoredEvent
    from oshaani.cli.turn_story import Teller
    from oshaani.wiring import Core
    from schemas.records import AnyRecord

app = typer.Typer()
turn = typer.Typer(help="Turns: one question and all that was done to answer it.", no_args_is_help=True)
app.add_typer(turn, name="turn")

EVENTS_MAX = 5_000  # about one turn


@turn.callback()
def _family() -> None:
    """Have `show` be a command of its own although it is the only one."""


@turn.command("show")
def show_turn(
    id: Annotated[str, typer.Argument(help="req-…, its bare id, or conv-… to list a conversation's turns.")],
    personal: Annotated[bool, typer.Option("--personal", help="Show personal text whole.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell the story of a turn from the log; personal text is cut short."""
    if id.startswith(CONVERSATION):
        listed = run(_turns_of(uuid_of(id.removeprefix(CONVERSATION), id), personal))
        _print_list(listed, as_json)
        return
    found = run(_story(turn_id_of(id), personal))
    if as_json:
        show.document(found)
    else:
        _print_story(found)


# --- one turn -----------------------------------------------------------------------------------------------------------


async def _story(turn_id: UUID, personal: bool) -> dict[str, Any]:
    from oshaani.cli.turn_story import Teller
    from oshaani.wiring import utc_now

    async with open_core() as core:
        records = await _records_of(core, turn_id)
        story = Teller(turn_id, personal).tell(records).conclude(utc_now())
        if story.accepted is None:
            raise Failed(f"{turn_id} is no turn; see `oshaani events show {turn_id}`")
        return {**_summary(story), "agent": await _agent(core, story), **_details(story)}


async def _records_of(core: Core, turn_id: UUID) -> list[AnyRecord]:
    """All that the log has about a turn, in order."""
    from oshaani.cli.log_search import Filter, latest

    rows = await latest(core, Filter(turn_id=turn_id), EVENTS_MAX, await core.log.heads())
    return await core.records.open(sorted(rows, key=_place))


def _place(row: StoredEvent) -> tuple[int, int]:
    return row.shard, row.position


async def _agent(core: Core, story: Teller) -> dict[str, Any]:
    """The agent as it is now, and the version of its configuration that the turn ran with."""
    from domain.agent import Agent

    accepted = story.accepted
    assert accepted is not None
    agent = await core.bus.read(Agent, accepted.agent_id, accepted.owner_id)
    _, settings = agent.settings_at(accepted.config_version)
    if agent.config_version != accepted.config_version:
        story.notes.append(
            f"the agent's configuration has changed since: the turn ran with v{accepted.config_version}, "
            f"it is v{agent.config_version} now"
        )
    prompt = settings.system_prompt
    return {
        "agent_id": agent.number,
        "name": agent.name,
        "deleted": agent.deleted,
        "config_version": accepted.config_version,
        "model": story.model,
        "system_prompt": prompt if story.personal else show.plain(prompt, 80),
    }


def _summary(story: Teller) -> dict[str, Any]:
    accepted = story.accepted
    assert accepted is not None
    conversation = accepted.conversation_id
    return {
        "turn_id": story.turn_id,
        "request_id": f"req-{story.turn_id}",
        "status": story.status,
        "error_code": getattr(story.ended, "error_code", None),
        "conversation_id": f"conv-{conversation}" if conversation else None,
        "owner_id": accepted.owner_id,
        "asked_by": accepted.actor,
        "channel": accepted.channel,
        "mode": accepted.mode,
        "accepted_at": story.accepted_at,
        "ended_at": story.ended_at,
        "duration_ms": _ms(story.accepted_at, story.ended_at),
        "message": story.excerpt(story.message) if story.message is not None else None,
        "answer": story.excerpt(story.answer) if story.answer is not None else None,
    }


def _details(story: Teller) -> dict[str, Any]:
    from domain.money import credits

    money, context, ended = story.money, story.context, story.ended
    return {
        "context": None
        if context is None
        else {
            "history_messages": context.history_count,
            "tools_offered": context.tools_offered,
            "prompt_digest": context.prompt_digest,
        },
        "usage": None
        if ended is None
        else {"input": ended.usage.input, "output": ended.usage.output, "source": ended.usage.source},
        "credits": {
            "held": credits(money.held_ncr),
            "extended": credits(money.extended_ncr),
            "charged": credits(money.charged_ncr),
            "given_back": credits(money.released_ncr),
            "uncollected": credits(money.uncollected_ncr),
            "balance_after": None if money.balance_after_ncr is None else credits(money.balance_after_ncr),
            "end": money.end,
            "settled_ms": _ms(story.accepted_at, money.settled_at),
            "lines": [
                {
                    "meter": line.meter,
                    "tool": line.tool,
                    "quantity": line.quantity,
                    "amount": credits(line.amount_ncr),
                    "rate_card": line.rate_card_id,
                }
                for line in money.lines
            ],
        },
        "steps": [
            {"ms": _ms(story.accepted_at, step.at), "type": step.type, "text": step.text, "odd": step.odd}
            for step in story.steps
        ],
        "notes": story.notes,
    }


def _ms(since: datetime | None, at: datetime | None) -> int | None:
    return None if since is None or at is None else round((at - since).total_seconds() * 1000)


def _print_story(found: dict[str, Any]) -> None:
    took = f" in {_seconds(found['duration_ms'])}" if found["duration_ms"] is not None else ""
    code = f" ({found['error_code']})" if found["error_code"] else ""
    charged = f", charged {found['credits']['charged']} credits" if found["credits"]["end"] else ""
    show.line(f"{found['request_id']} {found['status'].replace('_', ' ')}{code}{took}{charged}", "bold")
    for label, text in _heads(found):
        show.line(f"  {label:<9} {show.plain(text)}")
    show.line()
    for step in found["steps"]:
        mark = "!" if step["odd"] else " "
        show.line(f"{mark} {step['ms'] / 1000:+9.3f} s  {step['text']}", "yellow" if step["odd"] else None)
    if found["notes"]:
        show.line()
    for note in found["notes"]:
        show.line(f"! {note}", "yellow")


def _seconds(ms: int) -> str:
    return f"{ms} ms" if ms < 1000 else f"{ms / 1000:.2f} s"


def _heads(found: dict[str, Any]) -> list[tuple[str, str]]:
    agent = found["agent"]
    asked_at = show.instant(found["accepted_at"])
    deleted = " (deleted)" if agent["deleted"] else ""
    return [
        ("asked", f"{asked_at} by {found['asked_by']}, {found['channel']}, {found['mode']}"),
        ("in", found["conversation_id"] or "no conversation"),
        (
            "agent",
            f"{agent['agent_id']} {agent['name']!r}{deleted}, configuration v{agent['config_version']}",
        ),
        ("model", agent["model"] or "-"),
        ("told", agent["system_prompt"]),
        ("question", found["message"] or "-"),
        ("answer", found["answer"] or "-"),
        ("credits", _credit_words(found["credits"])),
    ]


def _credit_words(money: dict[str, Any]) -> str:
    lines = (
        ", ".join(f"{line['tool'] or line['meter']} {line['amount']}" for line in money["lines"]) or "nothing"
    )
    balance = f"; balance after {money['balance_after']}" if money["balance_after"] is not None else ""
    return (
        f"{money['held']} set aside + {money['extended']} for tools; charged {money['charged']} ({lines}); "
        f"{money['given_back']} given back{balance}"
    )


# --- a conversation -----------------------------------------------------------------------------------------------------


async def _turns_of(conversation_id: UUID, personal: bool) -> list[dict[str, Any]]:
    from domain.conversation import Conversation
    from oshaani.cli.streams import first_event, whole_stream

    async with open_core() as core:
        first = await first_event(core.log, conversation_id)
        if first is None or first.type != Conversation.Started.TOPIC:
            raise Failed(f"there is no conversation conv-{conversation_id} in the log")
        found: dict[UUID, dict[str, Any]] = {}
        for record in await core.records.open(await whole_stream(core.log, first.shard, conversation_id)):
            match record.event:
                case Conversation.MessageSent(turn_id=turn_id, content=content):
                    message = content if personal else show.plain(content or "(erased)", 80)
                    found[turn_id] = {
                        "request_id": f"req-{turn_id}",
                        "asked_at": record.recorded_at,
                        "outcome": None,
                        "message": message,
                    }
                case Conversation.AssistantReplied(turn_id=turn_id):
                    found[turn_id]["outcome"] = "answered"
                case Conversation.TurnClosed(turn_id=turn_id, outcome=outcome):
                    found[turn_id]["outcome"] = outcome
                case _:
                    pass
        return list(found.values())


def _print_list(listed: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        show.document(listed)
        return
    rows = [
        (
            each["request_id"],
            show.instant(each["asked_at"]),
            each["outcome"] or "open",
            each["message"] or "(erased)",
        )
        for each in listed
    ]
    show.table(("turn", "asked", "outcome", "message"), rows)
