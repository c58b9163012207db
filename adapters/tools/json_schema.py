"""Checks arguments against a JSON Schema that somebody else wrote.

Patterns run in linear time, references are never fetched, and the values checked are in no message.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jsonschema_rs

_PATTERN_BYTES_MAX = 1_000_000


class BadSchema(ValueError):
    """Not a JSON Schema that can be checked here."""


def schema_fault(schema: Mapping[str, Any]) -> str | None:
    """Why arguments cannot be checked against the schema, None when they can."""
    try:
        ArgumentsSchema(schema)
    except BadSchema as error:
        return str(error)
    return None


class ArgumentsSchema:
    """A compiled schema of an object of arguments."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        try:
            self._validator = jsonschema_rs.validator_for(
                dict(schema),
                pattern_options=jsonschema_rs.RegexOptions(size_limit=_PATTERN_BYTES_MAX),
                mask="the value",
                offline=True,
            )
        except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError) as error:
            raise BadSchema(f"not a usable JSON Schema: {error}".splitlines()[0][:300]) from None

    def fault(self, arguments: Mapping[str, Any]) -> str | None:
        """Why the arguments do not fit, as one sentence naming the field; None when they do."""
        error = next(iter(self._validator.iter_errors(dict(arguments))), None)
        if error is None:
            return None
        field = ".".join(str(part) for part in error.instance_path)
        subject = f"The argument {field!r} does not fit" if field else "The arguments do not fit"
        return f"{subject}: {error.message[:300]}."
