"""What every long-running process of ours has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from oshaani.process import BACKGROUND_NICE

STEPS_BACK = """
import os
from oshaani.process import AUTOGROUP, step_back
os.setsid()
step_back()
print(os.getpriority(os.PRIO_PROCESS, 0))
print(AUTOGROUP.read_text().strip() if AUTOGROUP.exists() else "")
"""
PATIENCE_S = 30


def stepped_back() -> list[str]:
    ran = subprocess.run(
        [sys.executable, "-c", STEPS_BACK], capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    return ran.stdout.splitlines()


def test_a_process_that_steps_back_is_nicer_than_others():
    assert int(stepped_back()[0]) == os.getpriority(os.PRIO_PROCESS, 0) + BACKGROUND_NICE


def test_so_is_its_session_where_the_kernel_shares_among_sessions():
    said = stepped_back()[1]
    if not said:
        pytest.skip("this kernel does not group by session")
    assert said.endswith(f"nice {BACKGROUND_NICE}")
