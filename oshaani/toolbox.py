"""The tools of this server and of one agent, for the workers that run them and for the people who look at them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from uuid import UUID

from adapters.tools.catalogue import ToolCatalogue
from adapters.tools.custom_http import CustomHttpTool
from api.server import OfferedTool
from domain.agent import Agent
from domain.configuration import Settings
from domain.ports import Egress, Tool, Vault

AGENTS_KEPT = 2_000  # agents whose own tools are kept built


class ServerToolbox:
    """Built-in tools and agents' custom ones, filtered by what an agent's configuration enables (SOP §4.2.3)."""

    def __init__(self, catalogue: ToolCatalogue, egress: Egress, vault: Vault) -> None:
        self._catalogue, self._egress, self._vault = catalogue, egress, vault
        self._custom: OrderedDict[UUID, tuple[int, dict[str, Tool]]] = OrderedDict()

    def offered(self, agent: Agent, settings: Settings) -> Mapping[str, Tool]:
        """What the agent may use now: enabled, and able to run on this server."""
        if not settings.tools_enabled:
            return {}
        own = {name: tool for name, tool in self._custom_of(agent).items() if tool.missing() is None}
        tools = {tool.name: tool for tool in self._catalogue.all()} | own
        return {name: tool for name, tool in tools.items() if settings.offers(name)}

    def known(self, agent: Agent) -> Sequence[OfferedTool]:
        """Every tool the agent may know by name, whether its configuration enables it or not."""
        builtin = [
            OfferedTool(
                entry.name,
                entry.description,
                "builtin",
                entry.tool.parameters if entry.tool else None,
                entry.missing is None,
                entry.missing,
            )
            for entry in self._catalogue.entries()
        ]
        own = [
            OfferedTool(tool.name, tool.description, tool.kind, tool.parameters, missing is None, missing)
            for tool, missing in ((tool, tool.missing()) for tool in self._custom_of(agent).values())
        ]
        return [*builtin, *own]

    def get(self, name: str, agent: Agent) -> Tool | None:
        """The tool, built-in or the agent's own; None when there is none of this name."""
        return self._custom_of(agent).get(name) or self._catalogue.get(name)

    def _custom_of(self, agent: Agent) -> dict[str, Tool]:
        if not agent.custom_tools:
            return {}
        kept = self._custom.get(agent.id)
        if kept is None or kept[0] != agent.version:
            built: dict[str, Tool] = {
                name: CustomHttpTool(definition, self._egress, self._vault)
                for name, definition in agent.custom_tools.items()
            }
            kept = self._custom[agent.id] = agent.version, built
            if len(self._custom) > AGENTS_KEPT:
                self._custom.popitem(last=False)
        return kept[1]


class OwnersToolbox:
    """The same tools as an agent's owner sees them; implements `api.server.Toolbox`."""

    def __init__(self, toolbox: ServerToolbox) -> None:
        self._toolbox = toolbox

    def offered(self, agent: Agent) -> Sequence[OfferedTool]:
        return self._toolbox.known(agent)

    def get(self, name: str, agent: Agent) -> Tool | None:
        return self._toolbox.get(name, agent)
