"""Everything that a role of the distributed layout imports; see `fork_server`."""

from __future__ import annotations

import gc
import importlib

MODULES = ("oshaani.roles", "oshaani.cli.entry", "uvloop", "oshaani.http_protocol")

for module in MODULES:
    importlib.import_module(module)
# Pages that nobody writes to are shared by all processes.
gc.collect()
gc.freeze()
