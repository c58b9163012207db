"""What the programs beside the product share: `python -m benchmarks.NAME PORT MODEL_URL …`, one model, one server."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import aiohttp
import orjson
import uvicorn
from fastapi import FastAPI, Response

_HEADERS = {"Content-Type": "application/json"}


def new_session() -> aiohttp.ClientSession:
    """Connections to the model, as many as are needed."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=3600))


async def ask(session: aiohttp.ClientSession, messages: Sequence[dict[str, str]]) -> str:
    """What the model says."""
    body = orjson.dumps({"model": "fake", "messages": messages})
    async with session.post(sys.argv[2] + "/chat/completions", data=body, headers=_HEADERS) as answer:
        reply = orjson.loads(await answer.read())
    return str(reply["choices"][0]["message"]["content"])


def answer_with(content: str) -> Response:
    """The answer in the product's form."""
    return Response(orjson.dumps({"response": content, "tool_calls": []}), media_type="application/json")


def serve(app: FastAPI) -> None:
    """Serve on the port of the command line, as fast as the product is served."""
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_config=None,
        access_log=False,
        loop="uvloop",
        http="httptools",
    )
