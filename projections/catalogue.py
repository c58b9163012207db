"""All read models."""

from __future__ import annotations

from projections.agents import agents
from projections.api_keys import api_keys
from projections.conversations import conversations
from projections.credit_ledger import credit_ledger
from projections.projection import Projection
from projections.requests import requests
from projections.tool_calls import tool_calls
from projections.turns import turns
from projections.usage import usage
from projections.users import users

PROJECTIONS: tuple[Projection, ...] = (
    users,
    agents,
    api_keys,
    conversations,
    requests,
    turns,
    tool_calls,
    credit_ledger,
    usage,
)
