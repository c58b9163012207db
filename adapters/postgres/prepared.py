"""A statement whose parameters are bytes already, sent as they are.

psycopg's own execute looks up a dumper and a type for each parameter on every call; for the rows of an append that
costs more than encoding them. This uses psycopg.pq, its low level, and waits the way its cursors do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg import generators
from psycopg.pq import ExecStatus, Format
from psycopg.pq.abc import PGresult

Connection = psycopg.AsyncConnection[Any]
_FAILED = (ExecStatus.FATAL_ERROR, ExecStatus.BAD_RESPONSE)


class PreparedCall:
    """A call of a function by name on one connection, prepared at its first use.

    `types` are those of the parameters, 0 where the server shall know. Whoever calls sees to it that nobody else uses
    the connection meanwhile.
    """

    def __init__(self, connection: Connection, function: str, types: Sequence[int]) -> None:
        self._connection, self._name, self._types = connection, function.encode(), types
        self._formats = [Format.BINARY] * len(types)
        self._prepared = False

    async def __call__(self, arguments: Sequence[bytes | None]) -> bytes | None:
        """The function's result in its binary form.

        Raises:
            psycopg.Error: as a cursor would.
        """
        connection = self._connection
        if not self._prepared:
            await self._prepare()
        connection.pgconn.send_query_prepared(
            self._name, arguments, param_formats=self._formats, result_format=Format.BINARY
        )
        return (await _result(connection)).get_value(0, 0)

    async def _prepare(self) -> None:
        places = b", ".join(b"$%d" % (number + 1) for number in range(len(self._types)))
        query = b"SELECT " + self._name + b"(" + places + b")"
        self._connection.pgconn.send_prepare(self._name, query, param_types=self._types)
        await _result(self._connection)
        self._prepared = True


async def _result(connection: Connection) -> PGresult:
    results: list[PGresult] = await connection.wait(generators.execute(connection.pgconn))
    result = results[-1]
    if result.status in _FAILED:
        raise psycopg.errors.error_from_result(result)
    return result
