"""The floor beside a turn: FastAPI, one aiohttp call to the same model, nothing kept. What no platform can be below."""

from __future__ import annotations

import aiohttp
import orjson
from fastapi import FastAPI, Request, Response

from benchmarks.peers import answer_with, ask, new_session, serve

app = FastAPI(openapi_url=None)
_sessions: list[aiohttp.ClientSession] = []


@app.post("/api/v1/chat")
async def chat(request: Request) -> Response:
    """Pass the message on and answer with what comes back."""
    if not _sessions:
        _sessions.append(new_session())
    message = orjson.loads(await request.body())["message"]
    return answer_with(await ask(_sessions[0], [{"role": "user", "content": message}]))


if __name__ == "__main__":
    serve(app)
