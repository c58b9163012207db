"""How the tests call a tool."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from domain.ports import Tool, ToolContext, ToolFailed

TENANT_ID = UUID(int=1)


def context(timeout_s: float = 10.0, tenant_id: UUID = TENANT_ID) -> ToolContext:
    return ToolContext(tenant_id, UUID(int=2), "call-1", "key-1", timeout_s)


async def result_of(tool: Tool, **arguments: Any) -> str:
    return (await tool.run(arguments, context())).text


async def failure_of(tool: Tool, **arguments: Any) -> ToolFailed:
    with pytest.raises(ToolFailed) as failure:
        await tool.run(arguments, context())
    return failure.value
