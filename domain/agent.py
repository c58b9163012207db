"""An agent: what it is told, what it may use, who may talk to it. Its configuration's history stays readable."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from domain import configuration as configurations
from domain.aggregate import Created as First
from domain.aggregate import Root
from domain.errors import (
    AgentNotPublished,
    AgentStateConflict,
    CustomToolLimit,
    InvalidValue,
    NotFound,
    VersionMismatch,
)
from domain.ids import AgentId, UserId, agent_of

CUSTOM_TOOLS_MAX = 10  # SOP §4.1
API_KEYS_MAX = 50
VERSIONS_KEPT = 20  # so that a running turn finds the configuration it began with
NAME_CHARS_MAX = 200
DESCRIPTION_CHARS_MAX = 5_000

Status = Literal["draft", "training", "testing", "published"]


class Agent(Root):
    """What people create, publish and talk to. Its public id is `number`; its stream id follows from it."""

    TOPIC = "Agent"

    class Created(Root.Event, First):
        TOPIC = "Agent.Created"
        owner_id: UserId
        number: int
        name: str
        description: str
        model_id: int
        agent_type: str
        configuration: dict[str, Any]
        created_at: datetime

    class Changed(Root.Event):
        """Name, description, model or type; only what changed is set."""

        TOPIC = "Agent.Changed"
        name: str | None
        description: str | None
        model_id: int | None
        agent_type: str | None
        config_version: int

        def apply(self, aggregate: Agent) -> None:
            for field in ("name", "description", "model_id", "agent_type"):
                value = getattr(self, field)
                if value is not None:
                    setattr(aggregate, field, value)
            aggregate._remember(self.config_version)

    class ConfigurationChanged(Root.Event):
        """An RFC 7396 merge patch on the configuration."""

        TOPIC = "Agent.ConfigurationChanged"
        patch: dict[str, Any]
        config_version: int

        def apply(self, aggregate: Agent) -> None:
            aggregate.configuration = configurations.merged(aggregate.configuration, self.patch)
            aggregate._remember(self.config_version)

    class TrainingStarted(Root.Event):
        TOPIC = "Agent.TrainingStarted"

        def apply(self, aggregate: Agent) -> None:
            aggregate.status = "training"

    class TestingStarted(Root.Event):
        TOPIC = "Agent.TestingStarted"

        def apply(self, aggregate: Agent) -> None:
            aggregate.status = "testing"

    class Published(Root.Event):
        TOPIC = "Agent.Published"
        config_version: int
        published_at: datetime

        def apply(self, aggregate: Agent) -> None:
            aggregate.status = "published"
            aggregate.published_version = self.config_version

    class Unpublished(Root.Event):
        TOPIC = "Agent.Unpublished"

        def apply(self, aggregate: Agent) -> None:
            aggregate.status = "draft"

    class CustomToolAdded(Root.Event):
        TOPIC = "Agent.CustomToolAdded"
        tool: dict[str, Any]

        def apply(self, aggregate: Agent) -> None:
            aggregate.custom_tools[self.tool["name"]] = self.tool

    class CustomToolChanged(Root.Event):
        TOPIC = "Agent.CustomToolChanged"
        tool: dict[str, Any]

        def apply(self, aggregate: Agent) -> None:
            aggregate.custom_tools[self.tool["name"]] = self.tool

    class CustomToolRemoved(Root.Event):
        TOPIC = "Agent.CustomToolRemoved"
        name: str

        def apply(self, aggregate: Agent) -> None:
            del aggregate.custom_tools[self.name]

    class KeyIssued(Root.Event):
        TOPIC = "Agent.KeyIssued"
        key_id: str
        name: str
        prefix: str
        digest: str
        issued_at: datetime

        def apply(self, aggregate: Agent) -> None:
            aggregate.key_ids.add(self.key_id)

    class KeyRevoked(Root.Event):
        TOPIC = "Agent.KeyRevoked"
        key_id: str

        def apply(self, aggregate: Agent) -> None:
            aggregate.key_ids.discard(self.key_id)

    class Deleted(Root.Event):
        TOPIC = "Agent.Deleted"

        def apply(self, aggregate: Agent) -> None:
            aggregate.deleted = True
            aggregate.key_ids = set()

    def __init__(
        self,
        owner_id: UserId,
        number: int,
        name: str,
        description: str,
        model_id: int,
        agent_type: str,
        configuration: dict[str, Any],
    ) -> None:
        self.owner_id = owner_id
        self.number = number
        self.name = name
        self.description = description
        self.model_id = model_id
        self.agent_type = agent_type
        self.configuration = configuration
        self.status: Status = "draft"
        self.published_version: int | None = None
        self.custom_tools: dict[str, dict[str, Any]] = {}
        self.key_ids: set[str] = set()
        self.deleted = False
        self.config_version = 0
        self.snapshots: dict[int, tuple[int, configurations.Settings]] = {}
        self._remember(1)

    @classmethod
    def create(
        cls,
        owner_id: UserId,
        number: int,
        name: str,
        description: str,
        model_id: int,
        agent_type: str,
        configuration: Mapping[str, Any],
        created_at: datetime,
    ) -> Agent:
        """A draft that only its owner can try.

        Raises:
            InvalidValue: a field or a known configuration key is not acceptable.
        """
        _check_text("/name", name, 1, NAME_CHARS_MAX)
        _check_text("/description", description, 0, DESCRIPTION_CHARS_MAX)
        configurations.check_depth(configuration)
        kept = configurations.merged({}, configuration)  # null means "unset", as in a patch
        configurations.check(kept)
        return cls.begin(
            cls.Created,
            agent_of(number),
            owner_id=owner_id,
            number=number,
            name=name,
            description=description,
            model_id=model_id,
            agent_type=agent_type,
            configuration=kept,
            created_at=created_at,
        )

    @property
    def agent_id(self) -> AgentId:
        return AgentId(self.id)

    # --- what a turn needs to know

    def settings_at(self, config_version: int) -> tuple[int, configurations.Settings]:
        """Model id and settings of a version of the configuration; the current ones when that version is long gone."""
        return self.snapshots.get(config_version) or self.snapshots[self.config_version]

    def served_version(self, by_owner: bool) -> int:
        """The version of the configuration a new turn runs with: without `auto_apply`, callers keep the published one."""
        settings = self.snapshots[self.config_version][1]
        if by_owner or settings.auto_apply or self.published_version is None:
            return self.config_version
        return self.published_version

    def check_can_answer(self, by_owner: bool) -> None:
        """Refuse to talk when deleted, or when not published and asked by somebody else than the owner."""
        if self.deleted:
            raise NotFound("agent")
        if not by_owner and self.status != "published":
            raise AgentNotPublished

    # --- what its owner may do

    def check_version(self, expected_version: int | None) -> None:
        """Optimistic concurrency for callers: `expected_version` comes from If-Match, None means "whatever it is"."""
        self._check_alive()
        if expected_version is not None and expected_version != self.version:
            raise VersionMismatch(self.version)

    def change(self, patch: Mapping[str, Any]) -> None:
        """Apply a merge patch of name, description, model_id, agent_type and configuration."""
        self._check_alive()
        fields = {key: patch.get(key) for key in ("name", "description", "model_id", "agent_type")}
        if fields["name"] is not None:
            _check_text("/name", str(fields["name"]), 1, NAME_CHARS_MAX)
        if fields["description"] is not None:
            _check_text("/description", str(fields["description"]), 0, DESCRIPTION_CHARS_MAX)
        changes = patch.get("configuration") or {}
        configurations.check_depth(changes)
        after = configurations.merged(self.configuration, changes)
        configurations.check(after)
        changed = {key: None if value == getattr(self, key) else value for key, value in fields.items()}
        if any(value is not None for value in changed.values()):
            self.trigger_event(self.Changed, config_version=self.config_version + 1, **changed)
        if after != self.configuration:
            self.trigger_event(
                self.ConfigurationChanged, patch=dict(changes), config_version=self.config_version + 1
            )

    def start_training(self) -> None:
        """Gather knowledge; from draft or testing."""
        self._go("training", ("draft", "testing"))

    def start_testing(self) -> None:
        """Try it out; from draft or training."""
        self._go("testing", ("draft", "training"))

    def publish(self, published_at: datetime) -> None:
        """Let callers with an agent key talk to it. Publishing what is published changes nothing."""
        self._check_alive()
        if self.status != "published" or self.published_version != self.config_version:
            self.trigger_event(self.Published, config_version=self.config_version, published_at=published_at)

    def unpublish(self) -> None:
        """Back to draft; keys stay but are refused until it is published again."""
        self._check_alive()
        if self.status == "published":
            self.trigger_event(self.Unpublished)

    def add_custom_tool(self, tool: Mapping[str, Any]) -> None:
        """Give it a tool of its own. `tool` has been checked by `domain.custom_tool`."""
        self._check_alive()
        if tool["name"] in self.custom_tools:
            raise InvalidValue("/name", f"The agent already has a custom tool {tool['name']!r}.", "taken")
        if len(self.custom_tools) >= CUSTOM_TOOLS_MAX:
            raise CustomToolLimit(CUSTOM_TOOLS_MAX)
        self.trigger_event(self.CustomToolAdded, tool=dict(tool))

    def change_custom_tool(self, name: str, tool: Mapping[str, Any]) -> None:
        """Replace the definition of a tool, keeping its name."""
        self._check_alive()
        if name not in self.custom_tools:
            raise NotFound("custom tool")
        changed = {**tool, "name": name}
        if changed != self.custom_tools[name]:
            self.trigger_event(self.CustomToolChanged, tool=changed)

    def remove_custom_tool(self, name: str) -> None:
        """The agent cannot use it any more."""
        self._check_alive()
        if name not in self.custom_tools:
            raise NotFound("custom tool")
        self.trigger_event(self.CustomToolRemoved, name=name)

    def issue_key(self, key_id: str, name: str, prefix: str, digest: str, issued_at: datetime) -> None:
        """Let a new key talk to this agent. Keys exist for published agents only (SOP §5.5.2)."""
        self._check_alive()
        if self.status != "published":
            raise AgentStateConflict(self.status, ["published"])
        if len(self.key_ids) >= API_KEYS_MAX:
            raise InvalidValue("/name", f"At most {API_KEYS_MAX} keys; revoke one first.")
        self.trigger_event(
            self.KeyIssued, key_id=key_id, name=name, prefix=prefix, digest=digest, issued_at=issued_at
        )

    def revoke_key(self, key_id: str) -> None:
        """The key is refused from now on."""
        self._check_alive()
        if key_id not in self.key_ids:
            raise NotFound("API key")
        self.trigger_event(self.KeyRevoked, key_id=key_id)

    def delete(self) -> None:
        """Take it away from everybody. Its history and its charges stay."""
        self._check_alive()
        self.trigger_event(self.Deleted)

    # --- inside

    def _check_alive(self) -> None:
        if self.deleted:
            raise NotFound("agent")

    def _go(self, status: Status, allowed_from: tuple[Status, ...]) -> None:
        self._check_alive()
        if self.status == status:
            return
        if self.status not in allowed_from:
            raise AgentStateConflict(self.status, ["draft"] if self.status == "published" else [])
        self.trigger_event(self.TrainingStarted if status == "training" else self.TestingStarted)

    def _remember(self, config_version: int) -> None:
        self.config_version = config_version
        kept = {**self.snapshots, config_version: (self.model_id, configurations.read(self.configuration))}
        published = self.published_version
        oldest = config_version - VERSIONS_KEPT
        self.snapshots = {v: snapshot for v, snapshot in kept.items() if v > oldest or v == published}


def _check_text(pointer: str, text: str, chars_min: int, chars_max: int) -> None:
    if not chars_min <= len(text.strip() if chars_min else text) <= chars_max:
        raise InvalidValue(
            pointer, f"{pointer[1:]} must have {chars_min} to {chars_max} characters.", "length"
        )
