"""Everything that happens is published once, in order, without what is personal; states end as they are."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from jsonschema import Draft202012Validator, FormatChecker

from adapters.memory.publisher import MemoryPublisher
from commands.agent import AddCustomTool, ChangeAgent, DeleteAgent, PublishAgent
from commands.turn import CancelTurn
from domain.credit_account import CreditAccount
from domain.money import credits
from domain.ports import PublicMessage, Publisher
from schemas.cloud_events import HEADERS, OPTIONAL_HEADERS, RECORD_HEADERS, CloudEvents
from schemas.codec import EVENT_TYPES
from schemas.public_forms import is_public, public_forms
from schemas.records import AnyRecord
from stream_processors.public_topics import public_topics
from stream_processors.publication import LATE, Publication
from tests.commands.write_side import BY
from tests.stream_processors.conftest import Staged
from tests.stream_processors.stage import CountedTool, ScriptedModels, Stage, hangs, says, wants

BASE_URL = "https://agents.example"
CANARIES = {
    "question": "canary-question-1f",
    "answer": "canary-answer-2e",
    "argument": "canary-argument-3d",
    "prompt": "canary-prompt-4c",
    "thread": "canary-thread-5b",
    "reason": "canary-reason-6a",
    "header": "canary-header-79",
    "address": "ada@example.com",
    "person": "Ada",
}
TYPES = public_forms()


class Subscriber:
    """Publishes a stage's records as a worker would, and reads what was published."""

    def __init__(self, stage: Stage, late: bool = False, publisher: Publisher | None = None) -> None:
        self.publisher = MemoryPublisher()
        ahead = LATE * 2 if late else timedelta(0)
        self.publication = Publication(
            publisher or self.publisher,
            CloudEvents(BASE_URL),
            stage.log,
            stage.records,
            lambda: datetime.now(UTC) + ahead,
        )
        self.work = stage.workers[0].work
        self.work.publication = self.publication

    @property
    def messages(self) -> list[PublicMessage]:
        return self.publisher.messages

    async def take(self, records: Sequence[AnyRecord]) -> Subscriber:
        (handler,) = set(public_topics.handlers.values())
        later = [await handler(record, self.work) for record in records]
        for rest in later:
            assert rest is not None
            await rest
        return self

    def of(self, *names: str) -> list[dict[str, Any]]:
        return [data(message) for message in self.messages if headers(message).get("ce_type") in names]


def headers(message: PublicMessage) -> dict[str, str]:
    return {name: value.decode() for name, value in message.headers}


def data(message: PublicMessage) -> dict[str, Any]:
    assert message.value is not None
    found: dict[str, Any] = json.loads(message.value)
    return found


async def told_a_story(staged: Staged) -> Stage:
    """An owner who uses everything, with a canary wherever something personal or secret may stand."""
    steps = [
        wants(("lookup", {"q": CANARIES["argument"]}), ("missing", {})),
        says(CANARIES["answer"]),
        says(CANARIES["answer"]),
    ]
    stage = await staged(ScriptedModels(*steps, wait=[hangs]), CountedTool()).begin(
        system_prompt=CANARIES["prompt"]
    )
    for content in (CANARIES["question"], CANARIES["question"]):
        await stage.ask(content, name=CANARIES["thread"], beginning="named")
    await stage.idle()
    return stage


async def test_every_message_is_valid_in_its_headers_and_its_data(staged: Staged) -> None:
    stage = await told_a_story(staged)
    subscriber = await Subscriber(stage).take(await stage.happened())
    header_names = set(HEADERS)
    for message in subscriber.messages:
        found = headers(message)
        assert set(found) <= header_names
        missing = header_names - set(found) - set(OPTIONAL_HEADERS)
        assert missing == set() or (found["ce_type"] == "agent.state.v1" and missing <= set(RECORD_HEADERS))
        for name, value in found.items():
            Draft202012Validator(HEADERS[name][1], format_checker=FormatChecker()).validate(value)
        form = TYPES[found["ce_type"]]
        assert found["ce_dataschema"] == f"{BASE_URL}/schemas/events/{form.name}.json"
        Draft202012Validator(form.schema(), format_checker=FormatChecker()).validate(data(message))
        assert form.noun in message.topic


async def test_every_public_event_is_published_once_under_its_own_id(staged: Staged) -> None:
    stage = await told_a_story(staged)
    records = await stage.happened()
    subscriber = await Subscriber(stage).take(records)
    ids = Counter(headers(message)["ce_id"] for message in subscriber.messages)
    assert set(ids.values()) == {1}
    assert {str(record.event_id) for record in records if is_public(EVENT_TYPES[record.type])} <= set(ids)


async def test_what_is_published_again_is_the_same_again(staged: Staged) -> None:
    stage = await told_a_story(staged)
    records = await stage.happened()
    first = await Subscriber(stage).take(records)
    again = await Subscriber(stage).take(records)
    assert first.messages == again.messages


async def test_a_worker_that_begins_anywhere_publishes_the_same(staged: Staged) -> None:
    stage = await told_a_story(staged)
    records = await stage.happened()
    whole = {headers(m)["ce_id"]: m for m in (await Subscriber(stage).take(records)).messages}
    for begin in range(len(records)):
        rest = await Subscriber(stage).take(records[begin:])
        assert all(whole[headers(message)["ce_id"]] == message for message in rest.messages)
        assert {str(record.event_id) for record in records[begin:]} <= {
            headers(message)["ce_id"] for message in rest.messages
        }


async def test_a_worker_that_missed_records_in_between_reads_them(staged: Staged) -> None:
    stage = await told_a_story(staged)
    records = await stage.happened()
    turn = [record for record in records if record.stream_id == stage.sent[0]]
    subscriber = Subscriber(stage)
    await subscriber.take([turn[0], *turn[5:]])
    assert {each["model"] for each in subscriber.of("usage.model_called.v1")} == {"peer:script"}
    assert {each["tool"] for each in subscriber.of("usage.tool_called.v1")} == {"lookup", "missing"}


async def test_nothing_personal_and_no_secret_is_published(staged: Staged) -> None:
    stage = await told_a_story(staged)
    owner = stage.owner
    tool = {
        "name": "weather",
        "description": CANARIES["prompt"],
        "method": "GET",
        "url": f"https://private.example/{CANARIES['header']}",
        "headers": {"X-Key": CANARIES["header"]},
    }
    await stage.bus.execute(
        AddCustomTool(tenant_id=owner.tenant_id, agent_id=owner.agent_id, tool=tool), by=BY
    )
    waiting = await stage.send("wait")
    cancel = CancelTurn(tenant_id=owner.tenant_id, turn_id=waiting.turn_id, reason=CANARIES["reason"])
    await stage.bus.execute(cancel, by=BY)
    await stage.end_of(waiting.turn_id)
    records = await stage.happened()
    everything = repr([vars(record.event) for record in records])
    assert [name for name, canary in CANARIES.items() if canary not in everything] == []
    subscriber = await Subscriber(stage).take(records)
    published = repr([(m.key, m.value, m.headers) for m in subscriber.messages])
    assert [name for name, canary in CANARIES.items() if canary in published] == []


async def test_a_conversations_turns_are_published_in_order_under_one_key(staged: Staged) -> None:
    stage = await staged(ScriptedModels()).begin()
    await stage.talk("one", "two", "three")
    subscriber = await Subscriber(stage).take(await stage.happened())
    turns = [message for message in subscriber.messages if message.topic == "oshaani.turn.events.v1"]
    assert len({message.key for message in turns}) == 1
    positions = [int(headers(message)["ce_oshaaniposition"]) for message in turns]
    assert positions == sorted(positions)
    subjects = [headers(message)["ce_subject"] for message in turns]
    assert [UUID(subject) for subject in dict.fromkeys(subjects)] == stage.sent


async def test_usage_tells_tokens_tools_and_settled_lines(staged: Staged) -> None:
    stage = await told_a_story(staged)
    subscriber = await Subscriber(stage).take(await stage.happened())
    called = subscriber.of("usage.model_called.v1")[0]
    assert (called["input_tokens"], called["output_tokens"], called["provider"]) == (10, 5, "peer")
    tools = {each["tool"]: each["outcome"] for each in subscriber.of("usage.tool_called.v1")}
    assert tools == {"lookup": "succeeded", "missing": "refused"}
    lines = subscriber.of("usage.charged.v1")
    assert Counter((each["meter"], each["tool"], each["amount_credits"]) for each in lines) == {
        ("agent_create", None, "1.50"): 1,
        ("message", None, "3.00"): 2,
        ("tool_call", "lookup", "0.15"): 1,
    }


async def test_every_command_that_changed_something_is_published_once(staged: Staged) -> None:
    stage = await told_a_story(staged)
    records = await stage.happened()
    subscriber = await Subscriber(stage).take(records)
    commands = subscriber.of("command.accepted.v1")
    assert Counter(each["command_id"] for each in commands) == dict.fromkeys(
        {str(record.command_id) for record in records}, 1
    )
    assert {each["type"] for each in commands} >= {"RegisterUser", "CreateAgent", "SendMessage", "SettleHold"}
    last = {record.command_id: record.position for record in records}
    assert all(each["position"] == last[UUID(each["command_id"])] for each in commands)


# --- states


def latest(subscriber: Subscriber, topic: str) -> dict[str, dict[str, Any] | None]:
    """What compaction leaves."""
    return {
        message.key: None if message.value is None else data(message)
        for message in subscriber.messages
        if message.topic == topic
    }


async def test_the_latest_balance_is_the_accounts(staged: Staged) -> None:
    stage = await told_a_story(staged)
    subscriber = await Subscriber(stage).take(await stage.happened())
    account = await stage.account()
    (balance,) = latest(subscriber, "oshaani.credit.balance.v1").values()
    assert balance is not None
    assert balance["available_credits"] == credits(account.available_ncr)
    assert balance["balance_credits"] == credits(account.posted_ncr)
    assert balance["held_credits"] == "0.00"


async def test_versions_of_a_state_never_fall(staged: Staged) -> None:
    stage = await told_a_story(staged)
    subscriber = await Subscriber(stage).take(await stage.happened())
    versions = defaultdict(list)
    for message in subscriber.messages:
        if message.topic in ("oshaani.credit.balance.v1", "oshaani.agent.state.v1"):
            versions[message.key].append(data(message)["version"])
    assert len(versions) == 2
    assert all(each == sorted(set(each)) for each in versions.values())


async def test_a_worker_that_comes_too_late_ends_with_the_latest_balance(staged: Staged) -> None:
    stage = await told_a_story(staged)
    movements = [r for r in await stage.happened() if isinstance(r.event, CreditAccount.Moved)]
    # It was given the second movement, slept, and others have published the rest.
    subscriber = await Subscriber(stage, late=True).take(movements[1:2])
    (balance,) = latest(subscriber, "oshaani.credit.balance.v1").values()
    assert balance is not None
    assert balance["position"] == movements[-1].position
    assert balance["available_credits"] == credits((await stage.account()).available_ncr)


async def test_catching_up_publishes_the_latest_state_and_not_all_before_it(staged: Staged) -> None:
    stage = await told_a_story(staged)
    subscriber = Subscriber(stage, late=True)
    for record in await stage.happened():
        await subscriber.take([record])
    balances = [m for m in subscriber.messages if m.topic == "oshaani.credit.balance.v1"]
    assert len(balances) == 2  # the first, and the one found when looking again


async def test_an_agents_state_follows_it_and_goes_with_it(staged: Staged) -> None:
    stage = await staged(ScriptedModels()).begin()
    owner = stage.owner
    of_owner = {"tenant_id": owner.tenant_id, "agent_id": owner.agent_id}
    await stage.bus.execute(PublishAgent(**of_owner), by=BY)
    await stage.bus.execute(ChangeAgent(**of_owner, patch={"name": "Other"}), by=BY)
    subscriber = await Subscriber(stage).take(await stage.happened())
    state = latest(subscriber, "oshaani.agent.state.v1")[str(owner.agent_id)]
    assert state is not None
    assert (state["name"], state["status"], state["version"]) == ("Other", "published", 3)
    await stage.bus.execute(DeleteAgent(**of_owner), by=BY)
    subscriber = await Subscriber(stage).take(await stage.happened())
    assert latest(subscriber, "oshaani.agent.state.v1") == {str(owner.agent_id): None}
