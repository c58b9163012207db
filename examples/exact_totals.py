"""Exact totals of credits per account, from the public topic of credit events, whatever is repeated or killed.

    pip install confluent-kafka
    python exact_totals.py 127.0.0.1:9092 totals.sqlite

The totals, the last position of each account and the offsets are in one database and change in one transaction. So
what was read is counted once: after a kill, when the topic is read again from the beginning, when it is repeated.
"""

import json
import sqlite3
import sys
from decimal import Decimal

from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

TABLES = """
    CREATE TABLE IF NOT EXISTS place (partition INTEGER PRIMARY KEY, next INTEGER);
    CREATE TABLE IF NOT EXISTS total (account TEXT, book TEXT, credits TEXT, PRIMARY KEY (account, book));
    CREATE TABLE IF NOT EXISTS seen (account TEXT PRIMARY KEY, position INTEGER);
"""


def main(servers: str, file: str, topic: str = "oshaani.credit.events.v1", once: str = "") -> None:
    db = sqlite3.connect(file)
    db.executescript(TABLES)
    consumer = Consumer({"bootstrap.servers": servers, "group.id": "-", "enable.auto.commit": False})
    places = dict(db.execute("SELECT partition, next FROM place"))
    partitions = consumer.list_topics(topic, timeout=30).topics[topic].partitions
    consumer.assign([TopicPartition(topic, n, places.get(n, OFFSET_BEGINNING)) for n in partitions])
    while messages := consumer.consume(500, timeout=5.0 if once else 3600.0):
        with db:
            for message in messages:
                if message.error():
                    raise SystemExit(str(message.error()))
                count(db, message.key().decode(), dict(message.headers()), json.loads(message.value()))
                place = message.partition(), message.offset() + 1
                db.execute("INSERT OR REPLACE INTO place VALUES (?, ?)", place)


def count(db: sqlite3.Connection, account: str, headers: dict[str, bytes], event: dict) -> None:
    position = int(headers["ce_oshaaniposition"])
    (last,) = db.execute("SELECT max(position) FROM seen WHERE account = ?", (account,)).fetchone()
    if last is not None and position <= last:
        return  # it was counted before
    db.execute("INSERT OR REPLACE INTO seen VALUES (?, ?)", (account, position))
    for posting in event.get("postings", ()):
        row = account, posting["book"]
        known = db.execute("SELECT credits FROM total WHERE account = ? AND book = ?", row).fetchone()
        total = Decimal(known[0] if known else 0) + Decimal(posting["amount_credits"])
        db.execute("INSERT OR REPLACE INTO total VALUES (?, ?, ?)", (*row, str(total)))


if __name__ == "__main__":
    main(*sys.argv[1:])
