"""A worker under a slot's name, as `oshaani processor` is one, with a handler whose effects can be counted."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import sys
from collections.abc import Mapping
from typing import Any
from uuid import UUID

import uvloop

from adapters.kafka.clients import KafkaConfig
from adapters.kafka.faust_consumer import WorkerKafka
from adapters.memory.key_ring import MemoryKeyRing
from adapters.memory.object_store import MemoryObjectStore
from adapters.postgres.event_log import PostgresEventLog
from adapters.postgres.leases import PostgresLeases
from adapters.postgres.parked_records import PostgresParkedRecords
from adapters.postgres.pool import open_pool
from commands.bus import Bus
from commands.credit_account import GrantCredits
from domain.credit_account import CreditAccount
from domain.ids import UserId, derived
from oshaani.process import Ending
from schemas.records import AnyRecord, Records
from stream_processors.faust_app import FaustHost, Names
from stream_processors.processor import Processor
from stream_processors.runner import Supplies
from stream_processors.slot import Slot
from tests.commands.write_side import rules
from tests.torture.effects import Effects

VARIABLE = "TORTURE"
BONUS_EVERY, BONUS_NCR = 20, 1
FAILS, SLOW, SLOW_S = 0.01, 0.005, 0.2  # shares of the records


async def main(told: Mapping[str, Any]) -> None:
    ending = Ending()
    worker = f"{told['slot']}/{os.getpid()}"
    async with open_pool(told["dsn"], 3) as pool:
        log = PostgresEventLog(told["dsn"])
        await log.open()
        # The accounts that are given credits have nothing personal in them, so nobody's keys are needed.
        records = Records(MemoryKeyRing(), MemoryObjectStore())
        bus = Bus(log, records, rules())
        effects = Effects(pool, worker)
        numbers = {UUID(stream): number for number, stream in enumerate(told["streams"])}
        owners = [UserId(UUID(owner)) for owner in told["owners"]]
        processor = Processor("torture")

        @processor.on(CreditAccount.PlanChanged)
        async def plan_changed(record: AnyRecord, work: Any) -> None:
            fate = random.random()
            if fate < FAILS:
                raise ZeroDivisionError("this time")
            if fate < FAILS + SLOW:
                await asyncio.sleep(SLOW_S)
            stream, seq = numbers[record.stream_id], record.stream_version
            if seq % BONUS_EVERY == 0:
                grant_id = derived(record.event_id, "bonus")
                grant = GrantCredits(
                    tenant_id=owners[stream % len(owners)],
                    grant_id=grant_id,
                    kind="promotion",
                    amount_ncr=BONUS_NCR,
                )
                await bus.execute(grant, by=f"worker:{worker}", command_id=derived(grant_id, "grant"))
            await effects.happen(stream, seq)

        work: Any = None
        supplies = Supplies(work, log, records, PostgresParkedRecords(pool))
        kafka = WorkerKafka(KafkaConfig.at(told["servers"]))
        slot = Slot(PostgresLeases(pool), told["slot"])
        host = FaustHost(processor, supplies, kafka, slot, Names(**told["names"]))
        async with ending.parts({"effects": effects.run(), "host": host.run()}):
            await ending.wait()
            await host.drain()
        await log.close()
    ending.check()


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s", level=logging.INFO)
    try:
        uvloop.run(main(json.loads(os.environ[VARIABLE])))
    except Exception:
        logging.exception("the worker ended")
        sys.exit(1)
