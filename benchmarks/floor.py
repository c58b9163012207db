"""The floor beside a turn: FastAPI, one aiohttp call to the same model, nothing kept. What no platform can be below."""

from __future__ import annotations

import sys

import aiohttp
import orjson
import uvicorn
from fastapi import FastAPI, Request, Response

app = FastAPI(openapi_url=None)
_sessions: list[aiohttp.ClientSession] = []


@app.post("/api/v1/chat")
async def chat(request: Request) -> Response:
    """Pass the message on and answer with what comes back."""
    if not _sessions:
        _sessions.append(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=3600)))
    message = orjson.loads(await request.body())["message"]
    body = orjson.dumps({"model": "fake", "messages": [{"role": "user", "content": message}]})
    headers = {"Content-Type": "application/json"}
    async with _sessions[0].post(sys.argv[2] + "/chat/completions", data=body, headers=headers) as answer:
        reply = orjson.loads(await answer.read())
    content = reply["choices"][0]["message"]["content"]
    return Response(orjson.dumps({"response": content, "tool_calls": []}), media_type="application/json")


if __name__ == "__main__":
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_config=None,
        access_log=False,
        loop="uvloop",
        http="httptools",
    )
