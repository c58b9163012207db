"""What a read model is made of: tables, handlers from events to changes of rows, and the changes themselves.

A handler is a plain function of one record; it reads nothing and no clock, so that the rows follow from the log alone.
Changes name rows by their primary key. Changes to the same row are folded before they reach the database, hence how
the log is cut into batches makes no difference to the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

from eventsourcing.domain import AggregateEvent

from schemas.codec import EventType, type_of
from schemas.records import AnyRecord

Columns = Mapping[str, Any]
Key = tuple[Any, ...]


class Insert(NamedTuple):
    """A new row; columns left out are NULL. There must be no row of its key."""

    table: str
    row: dict[str, Any]


class Update(NamedTuple):
    """Set columns of the row with this primary key; nothing happens when there is none."""

    table: str
    key: Key
    columns: dict[str, Any]


class Increment(NamedTuple):
    """Add to columns of the row with this primary key; nothing happens when there is none."""

    table: str
    key: Key
    columns: dict[str, int]


class Count(NamedTuple):
    """Add to columns of the row with this primary key, which begins at 0."""

    table: str
    key: Key
    columns: dict[str, int]


class Edit(NamedTuple):
    """Set columns computed from the row's columns. The only change that needs a read: for rare events."""

    table: str
    key: Key
    change: Callable[[Columns], dict[str, Any]]


class Delete(NamedTuple):
    """Remove the row with this primary key; nothing happens when there is none."""

    table: str
    key: Key


class Forget(NamedTuple):
    """Set columns of all rows of a tenant to NULL; the table has a column `tenant_id` with an index.

    The rows must become what they would be had the events come without their personal fields, as they do in a rebuild.
    For rare events, which mean nothing else. `where` may leave rows out whose texts are the program's own.
    """

    table: str
    tenant_id: UUID
    columns: tuple[str, ...]
    where: str = "true"


Change = Insert | Update | Increment | Count | Edit | Delete | Forget
Changes = Change | Iterable[Change] | None
Handler = Callable[[Any], Changes]
HandlerT = TypeVar("HandlerT", bound=Callable[..., Changes])


class Handled(NamedTuple):
    """How a projection handles an event type, and whether it looks at the event's personal fields."""

    handler: Handler
    personal: bool


class Projection:
    """A read model. Raise `version` with every change of tables or handlers: it is then rebuilt from the log.

    `tables` are plain CREATE TABLE statements, each with a primary key; `indexes` are made after a rebuild has filled
    the tables. Names are not qualified: a rebuild runs the same statements in a schema of its own.
    """

    def __init__(self, name: str, version: int, tables: str, indexes: str = "") -> None:
        self.name, self.version, self.tables, self.indexes = name, version, tables, indexes
        self.handled: dict[str, Handled] = {}

    def on(
        self, *event_classes: type[AggregateEvent], personal: bool | None = None
    ) -> Callable[[HandlerT], HandlerT]:
        """Declare the handler of event types.

        `personal=False` promises that the handler does not look at personal fields, which spares their decryption.
        """

        def declare(handler: HandlerT) -> HandlerT:
            for event_class in event_classes:
                kind: EventType = type_of(event_class)
                if kind.name in self.handled:
                    raise ValueError(f"two handlers of {kind.name!r} in projection {self.name!r}")
                needs = bool(kind.personal) if personal is None else personal and bool(kind.personal)
                self.handled[kind.name] = Handled(handler, needs)
            return handler

        return declare

    def changes(self, record: AnyRecord) -> list[Change]:
        """What a record of a handled type means for the rows."""
        found: Any = self.handled[record.type].handler(record)
        if found is None:
            return []
        return [found] if type(found) in _CHANGES else list(found)


_CHANGES = frozenset({Insert, Update, Increment, Count, Edit, Delete, Forget})
