"""A statement whose parameters are bytes already, sent as they are.

psycopg's own execute looks up a dumper and a type for each parameter on every call; for the 35 columns of an append that
costs more than building them. This uses psycopg.pq, its low level, and waits the way its cursors do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import psycopg
from psycopg import generators
from psycopg.pq import ExecStatus, Format
from psycopg.pq.abc import PGresult

from adapters.postgres.arrays import Array

Connection = psycopg.AsyncConnection[Any]
_FAILED = (ExecStatus.FATAL_ERROR, ExecStatus.BAD_RESPONSE)


class PreparedCall:
    """A call of a function by name, prepared once on each connection that makes it."""

    def __init__(self, function: str) -> None:
        self._name = function.encode()
        self._prepared: WeakSet[Connection] = WeakSet()

    async def __call__(self, connection: Connection, arguments: Sequence[Array]) -> bytes | None:
        """The function's result in its binary form. The types of arguments must be the same in every call.

        Raises:
            psycopg.Error: as a cursor would.
        """
        async with connection.lock:
            if connection not in self._prepared:
                await self._prepare(connection, arguments)
            connection.pgconn.send_query_prepared(
                self._name,
                [argument.encoded for argument in arguments],
                param_formats=[Format.BINARY] * len(arguments),
                result_format=Format.BINARY,
            )
            return (await _result(connection)).get_value(0, 0)

    async def _prepare(self, connection: Connection, arguments: Sequence[Array]) -> None:
        places = b", ".join(b"$%d" % (number + 1) for number in range(len(arguments)))
        types = [argument.type_oid for argument in arguments]
        query = b"SELECT " + self._name + b"(" + places + b")"
        connection.pgconn.send_prepare(self._name, query, param_types=types)
        await _result(connection)
        self._prepared.add(connection)


async def _result(connection: Connection) -> PGresult:
    results: list[PGresult] = await connection.wait(generators.execute(connection.pgconn))
    result = results[-1]
    if result.status in _FAILED:
        raise psycopg.errors.error_from_result(result)
    return result
