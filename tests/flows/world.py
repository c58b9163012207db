"""A server that is killed and started again, the model and the web page that it asks, and somebody who asks it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID, uuid4

import psycopg

from domain.ids import hold_of
from schemas.topics import LOG
from tests.flows.people import Person
from tests.flows.real_server import MASTER_KEY, ROOT, Answer, RealServer, free_ports, real_server

LAYOUT = str(ROOT / "tests" / "programs" / "crashing_layout.py")
CRASHING = str(ROOT / "tests" / "programs" / "crashing_server.py")
PATIENCE_S = 15.0
BEGIN_S = 60.0
POLL_S = 0.03
MESSAGE, TOOL = Decimal("3"), Decimal("0.15")
ENDS = ("Turn.Completed", "Turn.Failed", "Turn.TimedOut", "Turn.Cancelled")
UNLIMITED = json.dumps({"free": {"message": None, "api_call": None, "tool_call": None}})
T = TypeVar("T")


def until(ask: Callable[[], T], what: str, within_s: float = PATIENCE_S) -> T:
    """What `ask` answers as soon as that is true."""
    end = time.monotonic() + within_s
    while not (answer := ask()):
        assert time.monotonic() < end, f"waited {within_s} s for {what}"
        time.sleep(POLL_S)
    return answer


# --- what the server asks


class Page:
    """A web page that counts who asked for what."""

    def __init__(self) -> None:
        self.visits: Counter[str] = Counter()
        page = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                asked = self.path + self.rfile.read(length).decode()
                page.visits[asked] += 1
                body = b"42"
                self.send_response(200)
                self.send_header("Content-Type", "text/plain")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET  # noqa: N815 - the name that the library looks for

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port

    def visits_of(self, word: str) -> int:
        return sum(count for asked, count in self.visits.items() if word in asked)


@contextmanager
def page() -> Iterator[Page]:
    served = Page()
    thread = threading.Thread(target=served.server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield served
    finally:
        served.server.shutdown()
        served.server.server_close()
        thread.join()


@dataclass(frozen=True, slots=True)
class Model:
    """The peer that plays the model, in a process of its own."""

    base_url: str

    def counts(self) -> Mapping[str, int]:
        """Requests by idempotency key."""
        with urllib.request.urlopen(f"{self.base_url}/__count", timeout=5) as answer:
            counted: dict[str, int] = json.load(answer)["by_key"]
        return counted


@contextmanager
def model() -> Iterator[Model]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.peers.fake_openai"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield Model(process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# --- the server


@dataclass(slots=True)
class World:
    """One database, and one server after the other on it."""

    database_url: str
    folder: Path
    page: Page
    model: Model
    settings: Mapping[str, str] = field(default_factory=dict)
    _life: ExitStack = field(default_factory=ExitStack)
    _server: RealServer | None = None
    _person: Person | None = None

    @property
    def server(self) -> RealServer:
        """A running server: the one that runs, or a new one."""
        if self._server is None or self._server.process.poll() is not None:
            self.stop()
            settings = {
                "CRASH_POINT_FILE": str(self.folder / "point"),
                "OPENAI_BASE_URL": f"{self.model.base_url}/v1",
                "OPENAI_API_KEY": "peer",
                "OSHAANI_EGRESS_ALLOW": "127.0.0.0/8",
                "OSHAANI_EGRESS_PORTS": str(self.page.port),
                "OSHAANI_PLAN_LIMITS": UNLIMITED,
                "FREE_CREDITS_AMOUNT": "100000",
                **self.settings,
            }
            self._server = self._life.enter_context(self._started(settings))
        return self._server

    def _started(self, settings: Mapping[str, str]) -> AbstractContextManager[RealServer]:
        return real_server(self.database_url, self.folder, settings, (CRASHING,))

    @property
    def person(self) -> Person:
        """Somebody with an agent that has two tools of its own, as known to the running server."""
        if self._person is None:
            self._person = Person.register(self.server)
            for name, method in (("lookup", "GET"), ("order", "POST")):
                self._add_tool(self._person, name, method)
        return replace(self._person, server=self.server)

    def _add_tool(self, person: Person, name: str, method: str) -> None:
        url = f"http://127.0.0.1:{self.page.port}/{name}" + ("?q={q}" if method == "GET" else "")
        parameters = {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}
        tool = {
            "name": name,
            "description": "Finds out.",
            "method": method,
            "url": url,
            "parameters": parameters,
        }
        path = f"/api/agents/{person.agent_id}/custom-tools/"
        made = person.server.send("POST", path, tool, person.user)
        assert made.status == 201, made.text

    def stop(self) -> None:
        self._life.close()
        self._server = None

    def arm(self, point: str) -> None:
        """From now on the server dies when it comes there."""
        (self.folder / "point").write_text(point)
        server = self.server
        said = server.log.read_text().count(f"armed: {point}\n")
        server.process.send_signal(signal.SIGUSR1)
        until(lambda: server.log.read_text().count(f"armed: {point}\n") > said, f"{point} to be armed")

    def has_died(self) -> bool:
        return self._server is not None and self._server.process.poll() == -signal.SIGKILL

    # --- what is in the database

    def rows(self, query: str, *arguments: Any) -> list[Any]:
        with psycopg.connect(self.database_url, options="-c search_path=oshaani") as connection:
            return connection.execute(query, arguments).fetchall()

    def facts(self, event_type: str, stream_id: UUID) -> list[dict[str, Any]]:
        """The payloads of a stream's events of a type."""
        query = "SELECT payload FROM event WHERE type = %s AND stream_id = %s ORDER BY stream_version"
        return [json.loads(payload) for (payload,) in self.rows(query, event_type, stream_id)]

    def ends(self, turn_id: UUID) -> list[str]:
        query = "SELECT type FROM event WHERE stream_id = %s AND type = ANY (%s)"
        return [name for (name,) in self.rows(query, turn_id, list(ENDS))]

    def settlements(self, turn_id: UUID) -> int:
        query = """
            SELECT count(*) FROM event WHERE type IN ('CreditAccount.CreditsSettled', 'CreditAccount.HoldReleased')
               AND convert_from(payload, 'UTF8')::json ->> 'hold_id' = %s
        """
        return int(self.rows(query, str(hold_of(turn_id)))[0][0])

    def due(self, turn_ids: Sequence[UUID]) -> int:
        query = "SELECT count(*) FROM due WHERE stream_id = ANY (%s)"
        return int(self.rows(query, list(turn_ids))[0][0])


@dataclass(slots=True)
class Layout(World):
    """The same, with one process a role around a broker; a role that dies is started again by its supervisor."""

    broker: str = ""

    def _started(self, settings: Mapping[str, str]) -> AbstractContextManager[RealServer]:
        base_port = free_ports(20)
        cluster = {"KAFKA_BOOTSTRAP_SERVERS": self.broker, "OSHAANI_PORT": str(base_port)}
        return real_server(self.database_url, self.folder, {**settings, **cluster}, (LAYOUT,), self._end)

    def _end(self, server: RealServer) -> None:
        server.process.terminate()
        server.process.wait(PATIENCE_S)

    def pid_of(self, slot: str) -> int:
        """The process that has the slot now."""
        file = self.folder / "data" / "run" / f"{slot}.pid"

        def read() -> int:
            with suppress(OSError, ValueError):
                return int(file.read_text().split()[0])
            return 0

        return until(read, f"{slot} to run")

    def arm_role(self, slot: str, point: str) -> None:
        """From now on that process dies when it comes there; the one that follows it does not."""
        (self.folder / "point").write_text(point)
        line = f"{slot:18} armed: {point}\n"
        said = self.server.log.read_text().count(line)

        def armed() -> bool:
            if self.server.log.read_text().count(line) > said:
                return True
            with suppress(ProcessLookupError):  # the one before it has just ended
                os.kill(self.pid_of(slot), signal.SIGUSR1)
            return False

        until(armed, f"{point} to be armed in {slot}")

    def begin(self) -> None:
        """Wait until processors take part in their groups, which takes longer than the API's first answer."""
        turn_id = turn_of(Asked("[[say begun]]").insist(self.person, BEGIN_S))
        until(lambda: self.settlements(turn_id), "the first settlement", BEGIN_S)

    def deaths_of(self, slot: str) -> int:
        """How often the supervisor has seen the role end."""
        return self.server.log.read_text().count(f"{slot:18} ended ")


@contextmanager
def layout(database_url: str, folder: Path, broker: str, **settings: str) -> Iterator[Layout]:
    with page() as the_page, model() as the_model:
        built = Layout(database_url, folder, the_page, the_model, settings, broker=broker)
        try:
            built.begin()
            yield built
        finally:
            built.stop()


@contextmanager
def world(database_url: str, folder: Path, **settings: str) -> Iterator[World]:
    with page() as the_page, model() as the_model:
        built = World(database_url, folder, the_page, the_model, settings)
        try:
            yield built
        finally:
            built.stop()


def command(world: Layout, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`oshaani …` beside the running layout."""
    return subprocess.run(
        [sys.executable, "-m", "oshaani", *arguments],
        cwd=world.folder,
        env=environment_of(world),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def environment_of(world: Layout, **more: str) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("OSHAANI", "OPENAI"))},
        "DATABASE_URL": world.database_url,
        "KAFKA_BOOTSTRAP_SERVERS": world.broker,
        "OSHAANI_DATA_DIR": str(world.folder / "data"),
        "OSHAANI_MASTER_KEY": MASTER_KEY,
        "OPENAI_BASE_URL": f"{world.model.base_url}/v1",
        "OPENAI_API_KEY": "peer",
        "PYTHONPATH": str(ROOT),
        **more,
    }


def topic_is_the_log(world: Layout, topic: str = LOG.name) -> bool:
    return command(world, "relay", "--verify", "--topic", topic).returncode == 0


# --- asking


@dataclass(frozen=True, slots=True)
class Asked:
    """A message that may be sent again: the key makes it the same one."""

    text: str
    key: str = field(default_factory=lambda: uuid4().hex)

    def send(self, person: Person) -> Answer | None:
        """The answer; None when the server went away."""
        headers = {**person.agent, "Idempotency-Key": self.key}
        path = f"/api/agents/{person.agent_id}/chat/"
        try:
            return person.server.send("POST", path, {"message": self.text}, headers)
        except OSError:
            return None

    def insist(self, person: Person, within_s: float = PATIENCE_S) -> Answer:
        """Send it until it is answered."""

        def answered() -> Answer | None:
            answer = self.send(person)
            return answer if answer is not None and answer.status == 200 else None

        return until(answered, f"an answer to {self.text!r}", within_s)


def turn_of(answer: Answer) -> UUID:
    """The turn behind an answer."""
    return UUID(answer.json["request_id"].partition("-")[2])


def balance(person: Person) -> tuple[Decimal, Decimal]:
    """What is available, and what is held; asked again while the server says that it cannot know."""

    def asked() -> Answer | None:
        answer = person.server.send("GET", "/api/billing/balance", headers=person.user)
        return None if answer.status == 503 else answer

    found = until(asked, "a balance").json["data"]
    return Decimal(found["available"]), Decimal(found["held"])


def kill(process_id: int) -> None:
    os.kill(process_id, signal.SIGKILL)
