"""`oshaani up` on a machine without a network: any attempt to leave it, or to look up a name, ends the process."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

LOCAL = ("127.", "::1", "localhost", "/", "@")


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook (PEP 578)."""
    if event == "socket.connect":
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else str(address)
    elif event == "socket.getaddrinfo":
        host = str(arguments[0])
    else:
        return
    if not str(host).startswith(LOCAL):
        sys.stderr.write(f"LEFT THE MACHINE: {event} {host!r}\n")
        sys.stderr.flush()
        os._exit(86)


if __name__ == "__main__":
    sys.addaudithook(refuse)
    if sys.argv[1:] == ["--try"]:
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    from oshaani.cli import main

    sys.argv = ["oshaani", "up"]
    main()
