"""`oshaani up --kafka` whose processes die by SIGKILL at places of the test's choice; see `crashing_server`."""

from __future__ import annotations

import asyncio
import signal
import sys

from oshaani.cli import logs
from oshaani.settings import read_settings
from oshaani.supervisor import up_kafka
from tests.programs.crashing_server import main


def say(slot: str, text: str) -> None:
    sys.stderr.write(f"{slot:18} {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    # Inherited by every process until it can be armed: told earlier, it would end.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    logs.set_up("info")
    asyncio.run(up_kafka(read_settings(), say, lambda settings: say("layout", "ready"), main))
