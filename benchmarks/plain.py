"""A peer beside a turn: a plain chat server as one would write it in an afternoon, on the same Postgres.

It looks up the key, keeps the question, reads the conversation, asks the same model, keeps the answer and takes the price
off the balance, with two commits. It loses what is under way when it dies, charges twice who asks twice,
lets parallel requests overspend, and can explain nothing.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import orjson
from fastapi import FastAPI, Request, Response
from psycopg_pool import AsyncConnectionPool

from benchmarks.peers import answer_with, ask, new_session, serve

CONNECTIONS = 8
_TABLES = """
    CREATE SCHEMA IF NOT EXISTS plain;
    CREATE TABLE IF NOT EXISTS plain.account (key text PRIMARY KEY, balance numeric NOT NULL DEFAULT 1000000);
    CREATE TABLE IF NOT EXISTS plain.message (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, conversation uuid NOT NULL, role text NOT NULL,
        content text NOT NULL, at timestamptz NOT NULL DEFAULT now()
    );
    CREATE INDEX IF NOT EXISTS message_of ON plain.message (conversation, id)
"""
_ACCOUNT = "SELECT balance FROM plain.account WHERE key = %s"
_OPEN_ACCOUNT = "INSERT INTO plain.account (key) VALUES (%s) ON CONFLICT (key) DO NOTHING"
_KEEP = "INSERT INTO plain.message (conversation, role, content) VALUES (%s, %s, %s)"
_PAST = "SELECT role, content FROM plain.message WHERE conversation = %s ORDER BY id"
_CHARGE = "UPDATE plain.account SET balance = balance - 1 WHERE key = %s"


async def _configure(connection: Any) -> None:
    connection.prepare_threshold = 0


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    pool: AsyncConnectionPool[Any] = AsyncConnectionPool(
        sys.argv[3],
        min_size=CONNECTIONS,
        max_size=CONNECTIONS,
        open=False,
        configure=_configure,
        kwargs={"autocommit": True},
    )
    async with pool, new_session() as session:
        async with pool.connection() as connection:
            await connection.execute(_TABLES, prepare=False)
        app.state.pool, app.state.session = pool, session
        yield


app = FastAPI(openapi_url=None, lifespan=_lifespan)


@app.post("/api/v1/chat")
async def chat(request: Request) -> Response:
    """Answer, and keep question, answer and balance."""
    key, conversation = request.headers["authorization"], uuid4()
    message = orjson.loads(await request.body())["message"]
    async with request.app.state.pool.connection() as connection:
        account = await (await connection.execute(_ACCOUNT, (key,))).fetchone()
        if account is None:
            await connection.execute(_OPEN_ACCOUNT, (key,))
        elif account[0] < 1:
            return Response(b'{"error": "no credit"}', 402)
        await connection.execute(_KEEP, (conversation, "user", message))
        past = await (await connection.execute(_PAST, (conversation,))).fetchall()
    messages = [{"role": role, "content": content} for role, content in past]
    content = await ask(request.app.state.session, messages)
    async with request.app.state.pool.connection() as connection, connection.transaction():
        await connection.execute(_KEEP, (conversation, "assistant", content))
        await connection.execute(_CHARGE, (key,))
    return answer_with(content)


if __name__ == "__main__":
    serve(app)
