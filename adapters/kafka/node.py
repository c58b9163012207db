"""One Kafka node on this machine: what it is told, where it listens, and whether it serves."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from string import Template

import psutil

DEPLOY = Path(__file__).parents[2] / "deploy" / "kafka"  # The wheel carries it beside this layer too.
SERVER = "kafka.Kafka"  # the class that Java runs
ANSWER_TIMEOUT_S = 5.0
ANSWER_BYTES_MAX = 1024 * 1024
PORTS_FROM, PORTS_COUNT = 20_000, 12_000  # Linux hands out 32768 and above, macOS 49152 and above.
LOG_SETTINGS = """\
rootLogger.level=warn
rootLogger.appenderRef.console.ref=console
appender.console.type=Console
appender.console.name=console
appender.console.layout.type=PatternLayout
appender.console.layout.pattern=%d{ISO8601} %p %c{1} %m%n
"""


def write_settings(folder: Path, ports: tuple[int, int], settings: Mapping[str, str]) -> Path:
    """The broker's settings for `ports` (its own and its controller's); `settings` override those of deploy/kafka.

    `$port`, `$controller_port` and `$data` stand for what they say in both.
    """
    (folder / "tmp").mkdir(exist_ok=True)
    (folder / "log4j2.properties").write_text(LOG_SETTINGS, "ascii")
    base = (DEPLOY / "server.properties").read_text("utf-8")
    # The last line of a name counts.
    lines = [base, *(f"{name}={_as_property(value)}\n" for name, value in settings.items())]
    text = Template("".join(lines)).substitute(
        port=ports[0], controller_port=ports[1], data=_as_property(str(folder / "data"))
    )
    place = folder / "server.properties"
    place.write_text(text, "ascii")
    return place


def free_ports() -> tuple[int, int]:
    """Two ports that nobody listens on now.

    Not among those the system hands out for outgoing connections: a broker that was killed must get its port back.
    """
    found: list[int] = []
    while len(found) < 2:
        port = PORTS_FROM + int.from_bytes(os.urandom(4)) % PORTS_COUNT
        if port not in found and is_free(port):
            found.append(port)
    return found[0], found[1]


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of the loopback address now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def nodes_on(folder: Path) -> list[psutil.Process]:
    """The nodes that work on this folder, whichever process started them; known by their command lines."""
    settings = str(folder / "server.properties")
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [])[-2:] == [SERVER, settings]
    ]


def answers(port: int) -> bool:
    """Whether the broker at this port tells its clients of itself: it listens before it can serve anybody."""
    try:
        with socket.create_connection(("127.0.0.1", port), ANSWER_TIMEOUT_S) as connection:
            connection.sendall(struct.pack(">i", len(_METADATA_REQUEST)) + _METADATA_REQUEST)
            (size_bytes,) = struct.unpack(">i", _received(connection, 4))
            if not 12 <= size_bytes <= ANSWER_BYTES_MAX:
                return False
            _, _, broker_count = struct.unpack_from(">iii", _received(connection, size_bytes))
            return bool(broker_count > 0)
    except OSError:
        return False


# Metadata, version 4, of no topics; header version 1 with an empty client id (Kafka's protocol guide).
_METADATA_REQUEST = struct.pack(">hhihi?", 3, 4, 1, 0, 0, False)


def _received(connection: socket.socket, size_bytes: int) -> bytes:
    parts = bytearray()
    while len(parts) < size_bytes:
        part = connection.recv(size_bytes - len(parts))
        if not part:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        parts += part
    return bytes(parts)


def _as_property(text: str) -> str:
    """A value of a Java properties file, which is read as Latin-1 with escapes."""
    units = memoryview(text.encode("utf-16-be", "surrogatepass")).tobytes()
    codes = [int.from_bytes(units[at : at + 2]) for at in range(0, len(units), 2)]
    return "".join(
        "\\\\" if code == ord("\\") else chr(code) if 32 <= code < 127 else f"\\u{code:04x}" for code in codes
    )
