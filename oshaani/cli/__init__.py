"""The command line `oshaani`: one file for each family of commands.

Exit codes: 0 fine, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

from oshaani.cli.entry import main

__all__ = ["main"]
