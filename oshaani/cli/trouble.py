"""Trouble that is nobody's bug, and how each kind is said in one line."""

from __future__ import annotations

from oshaani.cli.show import plain
from oshaani.settings import SettingsInvalid

SENTENCE_CHARS_MAX = 600


class Failed(Exception):
    """A command could not do what it was asked; the text says why and what to do, in one line."""


def in_one_line(failure: Exception) -> str | None:
    """What to tell people; None for what nobody expected."""
    if isinstance(failure, SettingsInvalid):
        return str(failure)  # one line for each setting
    sentence = plain(str(failure), SENTENCE_CHARS_MAX) or type(failure).__name__
    return next((said.format(sentence) for kinds, said in _sayings() if isinstance(failure, kinds)), None)


def _sayings() -> tuple[tuple[tuple[type[Exception], ...], str], ...]:
    """What to say of each kind; `{}` is its own text. Imported here, because most commands never fail."""
    import psycopg
    from psycopg_pool import PoolTimeout

    from adapters.crypto import NotAuthentic, UnknownMasterKey
    from adapters.kafka.faults import KafkaFault
    from adapters.postgres.data_folder import EmbeddedPostgresFault
    from domain.errors import Refusal
    from domain.event_log import LogUnavailable
    from oshaani.process import PartLost
    from projections.read_side import ReadSideUnavailable
    from schemas.codec import UnknownEvent
    from schemas.records import ObjectMissing

    return (
        ((Failed, EmbeddedPostgresFault, KafkaFault, Refusal), "{}"),
        (
            (LogUnavailable, psycopg.OperationalError, PoolTimeout, TimeoutError),
            "the database cannot be used: {}; see `oshaani doctor`",
        ),
        (
            (UnknownMasterKey, NotAuthentic),
            "what is stored was sealed under another master key ({}); set the right OSHAANI_MASTER_KEY or "
            "OSHAANI_MASTER_KEY_FILE, or name the old one in OSHAANI_PREVIOUS_MASTER_KEYS",
        ),
        ((ReadSideUnavailable,), "the read models cannot be used: {}; see `oshaani doctor`"),
        ((PartLost,), "a part of this process ended by itself ({}); the log above says why"),
        ((UnknownEvent,), "the log was written by a newer version of this program ({}); install that one"),
        ((ObjectMissing,), "a part of an event is missing in the data folder ({}); restore its objects"),
    )
