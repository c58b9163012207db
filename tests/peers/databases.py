"""Databases on the run's server that live longer than one test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import psycopg
from psycopg import sql


@contextmanager
def new_database(dsn: str) -> Iterator[str]:
    """An empty database on a server, gone with the block."""
    name = f"oshaani_test_{uuid4().hex}"
    identifier = sql.Identifier(name)
    with psycopg.connect(dsn, autocommit=True) as admin:
        # Copies files; the default writes every page of the template to the log.
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0 STRATEGY file_copy").format(identifier))
        yield urlunsplit(urlsplit(dsn)._replace(path=f"/{name}"))
        admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(identifier))
