from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from domain.agent import (
    API_KEYS_MAX,
    CUSTOM_TOOLS_MAX,
    DESCRIPTION_CHARS_MAX,
    NAME_CHARS_MAX,
    VERSIONS_KEPT,
    Agent,
)
from domain.configuration import Settings
from domain.errors import (
    AgentNotPublished,
    AgentStateConflict,
    CustomToolLimit,
    InvalidValue,
    NotFound,
    VersionMismatch,
)
from domain.ids import UserId, agent_of
from tests.domain.spec import given

Do = Callable[[Agent], object]

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
OWNER = UserId(UUID(int=1))
NUMBER = 7
WEATHER = {"name": "weather", "method": "GET", "url": "https://weather.example/now"}


def created(**facts: Any) -> Callable[[], Agent]:
    details = {"name": "Ada", "description": "Helps", "configuration": {"system_prompt": "Be kind."}, **facts}
    return lambda: Agent.create(OWNER, NUMBER, model_id=1, agent_type="chat", created_at=NOON, **details)


def changed(**patch: Any) -> Do:
    return lambda agent: agent.change(patch)


def configured(**configuration: Any) -> Do:
    return changed(configuration=configuration)


def published(agent: Agent) -> None:
    agent.publish(NOON)


def key_issued(key_id: str = "key-1") -> Do:
    return lambda agent: agent.issue_key(key_id, "CI", "osk_abc", "digest", NOON)


def tool_added(name: str = "weather") -> Do:
    return lambda agent: agent.add_custom_tool({**WEATHER, "name": name})


# --- creating and changing


def test_a_new_agent_is_a_draft_with_a_number_people_see():
    when = given(created()).when()
    when.then(id=agent_of(NUMBER), agent_id=agent_of(NUMBER), number=NUMBER, status="draft", config_version=1)
    assert when.root.settings_at(1) == (1, Settings(system_prompt="Be kind."))


@pytest.mark.parametrize(
    ("facts", "pointer"),
    [
        ({"name": ""}, "/name"),
        ({"name": "   "}, "/name"),
        ({"name": "x" * (NAME_CHARS_MAX + 1)}, "/name"),
        ({"description": "x" * (DESCRIPTION_CHARS_MAX + 1)}, "/description"),
        ({"configuration": {"rag_top_k": 0}}, "/configuration/rag_top_k"),
    ],
)
def test_what_cannot_be_an_agent_is_refused(facts, pointer):
    with pytest.raises(InvalidValue) as refused:
        created(**facts)()
    assert refused.value.facts["pointer"] == pointer
    given(created()).when(changed(**facts)).then_refused(InvalidValue, pointer=pointer)


def test_only_what_changed_is_recorded():
    when = given(created()).when(changed(name="Ada", description="Helps a lot", model_id=None))
    when.then(Agent.Changed, description="Helps a lot", config_version=2)
    (event,) = when.events
    assert (event.name, event.description, event.model_id) == (None, "Helps a lot", None)
    given(created()).when(changed(name="Ada", description="Helps")).then(config_version=1)


def test_a_description_can_be_emptied():
    given(created()).when(changed(description="")).then(Agent.Changed, description="")


def test_a_change_of_fields_and_configuration_is_refused_as_one():
    when = given(created()).when(changed(name="Bob", configuration={"temperature": 3}))
    when.then_refused(InvalidValue)
    assert when.events == []


def test_the_configuration_is_merged():
    before = given(created(configuration={"system_prompt": "Be kind.", "extra": {"a": 1, "b": 2}}))
    when = before.when(configured(temperature=0.5, extra={"b": None, "c": [3]}, system_prompt=None))
    when.then(
        Agent.ConfigurationChanged,
        configuration={"temperature": 0.5, "extra": {"a": 1, "c": [3]}},
        config_version=2,
    )
    before.when(configured(extra={"a": 1})).then(config_version=1)


def test_a_configuration_too_deep_to_replay_is_refused():
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    given(created()).when(configured(extra=deep)).then_refused(InvalidValue, pointer="/configuration")
    with pytest.raises(InvalidValue):
        created(configuration=deep)()


def test_a_caller_that_saw_another_version_is_told_the_current_one():
    before = given(created(), changed(name="Bob"))
    before.when(lambda agent: agent.check_version(1)).then_refused(VersionMismatch, current_version=2)
    for expected in (2, None):
        before.when(lambda agent, expected=expected: agent.check_version(expected)).then()


# --- what a turn sees


def test_a_running_turn_finds_the_configuration_it_began_with():
    agent = given(created(), configured(system_prompt="Be brief."), changed(model_id=2)).root
    assert agent.settings_at(1) == (1, Settings(system_prompt="Be kind."))
    assert agent.settings_at(2) == (1, Settings(system_prompt="Be brief."))
    assert agent.settings_at(3) == (2, Settings(system_prompt="Be brief."))


def test_old_configurations_are_forgotten_but_not_the_published_one():
    steps = [configured(temperature=n / 100) for n in range(VERSIONS_KEPT + 5)]
    agent = given(created(), published, *steps).root
    assert agent.settings_at(1)[1].temperature is None
    assert agent.settings_at(2) == agent.settings_at(agent.config_version)
    assert len(agent.snapshots) == VERSIONS_KEPT + 1


def test_callers_get_changes_at_once_unless_the_agent_waits_for_publishing():
    waiting = given(created(configuration={"auto_apply": False}), published, configured(temperature=1)).root
    assert (waiting.served_version(by_owner=False), waiting.served_version(by_owner=True)) == (1, 2)
    eager = given(created(), published, configured(temperature=1)).root
    assert (eager.served_version(by_owner=False), eager.served_version(by_owner=True)) == (2, 2)
    again = given(
        created(configuration={"auto_apply": False}), published, configured(temperature=1), published
    )
    assert again.root.served_version(by_owner=False) == 2


def test_only_the_owner_talks_to_what_is_not_published():
    draft, live = given(created()), given(created(), published)
    draft.when(lambda agent: agent.check_can_answer(by_owner=True)).then()
    draft.when(lambda agent: agent.check_can_answer(by_owner=False)).then_refused(AgentNotPublished)
    live.when(lambda agent: agent.check_can_answer(by_owner=False)).then()
    gone = given(created(), published, Agent.unpublish)
    gone.when(lambda agent: agent.check_can_answer(by_owner=False)).then_refused(AgentNotPublished)


# --- the life of an agent


def test_an_agent_goes_from_draft_over_training_and_testing_to_published():
    when = given(created()).when(Agent.start_training, Agent.start_testing, Agent.start_training, published)
    when.then(
        Agent.TrainingStarted,
        Agent.TestingStarted,
        Agent.TrainingStarted,
        Agent.Published,
        status="published",
    )


@pytest.mark.parametrize("step", [Agent.start_training, Agent.start_testing])
def test_a_published_agent_has_to_be_unpublished_first(step):
    before = given(created(), published)
    before.when(step).then_refused(AgentStateConflict, status="published", allowed_transitions=["draft"])
    assert before.when(Agent.unpublish, step).refusal is None


def test_what_is_already_so_is_not_said_again():
    given(created(), Agent.start_training).when(Agent.start_training).then()
    given(created(), published).when(published).then()
    given(created()).when(Agent.unpublish).then()


def test_publishing_again_publishes_the_newer_configuration():
    before = given(created(), published, configured(temperature=1))
    before.when(published).then(Agent.Published, published_version=2)


def test_a_deleted_agent_is_not_there_for_anybody():
    before = given(created(), published, key_issued(), tool_added(), Agent.delete)
    assert before.root.key_ids == set()
    for step in (
        *(published, Agent.unpublish, Agent.start_training, Agent.start_testing, Agent.delete),
        *(changed(name="Bob"), tool_added("other"), key_issued("key-2")),
        *(lambda agent: agent.revoke_key("key-1"), lambda agent: agent.remove_custom_tool("weather")),
        *(lambda agent: agent.check_version(None), lambda agent: agent.check_can_answer(by_owner=True)),
        lambda agent: agent.change_custom_tool("weather", WEATHER),
    ):
        before.when(step).then_refused(NotFound)


# --- custom tools and keys


def test_a_custom_tool_is_added_changed_and_removed():
    before = given(created(), tool_added())
    before.when(tool_added()).then_refused(InvalidValue, pointer="/name")
    changed_tool = {**WEATHER, "method": "POST"}
    before.when(lambda agent: agent.change_custom_tool("weather", changed_tool)).then(
        Agent.CustomToolChanged, custom_tools={"weather": changed_tool}
    )
    before.when(lambda agent: agent.change_custom_tool("weather", {**WEATHER})).then()
    before.when(lambda agent: agent.remove_custom_tool("weather")).then(
        Agent.CustomToolRemoved, custom_tools={}
    )


def test_a_change_keeps_the_name_of_a_custom_tool():
    before = given(created(), tool_added())
    before.when(lambda agent: agent.change_custom_tool("weather", {**WEATHER, "name": "climate"})).then()
    renamed = {**WEATHER, "name": "climate", "method": "POST"}
    before.when(lambda agent: agent.change_custom_tool("weather", renamed)).then(
        Agent.CustomToolChanged, custom_tools={"weather": {**WEATHER, "method": "POST"}}
    )


def test_a_custom_tool_that_is_not_there_cannot_be_changed_or_removed():
    for step in (
        lambda agent: agent.change_custom_tool("weather", WEATHER),
        lambda agent: agent.remove_custom_tool("weather"),
    ):
        given(created()).when(step).then_refused(NotFound)


def test_an_agent_has_at_most_ten_custom_tools():
    before = given(created(), *(tool_added(f"tool_{n}") for n in range(CUSTOM_TOOLS_MAX)))
    before.when(tool_added()).then_refused(CustomToolLimit, limit=10)


def test_keys_exist_for_published_agents_only():
    given(created()).when(key_issued()).then_refused(
        AgentStateConflict, status="draft", allowed_transitions=["published"]
    )
    given(created(), published).when(key_issued()).then(Agent.KeyIssued, key_ids={"key-1"})


def test_a_key_is_revoked_once():
    before = given(created(), published, key_issued())
    before.when(lambda agent: agent.revoke_key("key-1")).then(Agent.KeyRevoked, key_ids=set())
    before.when(lambda agent: agent.revoke_key("key-2")).then_refused(NotFound)


def test_there_are_so_many_keys_and_a_revoked_one_makes_room():
    before = given(created(), published, *(key_issued(f"key-{n}") for n in range(API_KEYS_MAX)))
    before.when(key_issued("one-more")).then_refused(InvalidValue)
    before.when(lambda agent: agent.revoke_key("key-0"), key_issued("one-more")).then(
        Agent.KeyRevoked, Agent.KeyIssued
    )
