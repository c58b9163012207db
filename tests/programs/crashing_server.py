"""`oshaani up`, or any other role, that dies by SIGKILL at a place of the test's choice.

SIGUSR1 arms the point named in the file that CRASH_POINT_FILE names, and takes the file away: one life ends there, at
its first visit, however often it was told.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from domain import crash_points

FILE = "CRASH_POINT_FILE"
ARMED = "armed: "


def arm(*_: Any) -> None:
    """The test has written the name, and waits for ours."""
    file = Path(os.environ[FILE])
    try:
        point = file.read_text()
        file.unlink()
    except FileNotFoundError:
        return
    crash_points.arm(point)
    sys.stderr.write(f"{ARMED}{point}\n")
    sys.stderr.flush()


def main(arguments: Sequence[str]) -> None:
    """Run a role that can be armed."""
    signal.signal(signal.SIGUSR1, arm)
    from oshaani.cli import main as oshaani

    sys.argv = ["oshaani", *arguments]
    oshaani()


if __name__ == "__main__":
    main(sys.argv[1:] or ["up"])
