import asyncio
from collections.abc import Iterable

import uvicorn
from uvicorn.server import ServerState

from oshaani.http_protocol import Gathering, HttpProtocol

PATIENCE_S = 10


class Recorder(asyncio.Transport):
    """A transport that keeps what each call of the system would be given."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = asyncio.Event()

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.writes.append(data)

    def writelines(self, list_of_data: Iterable[bytes]) -> None:  # type: ignore[override]
        self.writes.append(b"".join(list_of_data))

    def is_closing(self) -> bool:
        return self.closed.is_set()

    def close(self) -> None:
        self.closed.set()


async def test_a_head_and_the_body_that_follows_it_are_one_write():
    recorder = Recorder()
    transport = Gathering(recorder)

    transport.write(b"head ")
    transport.write(b"body")

    assert recorder.writes == [b"head body"]


async def test_what_nothing_follows_is_written_by_the_end_of_the_step():
    recorder = Recorder()
    transport = Gathering(recorder)

    transport.write(b"head")
    assert recorder.writes == []
    await asyncio.sleep(0)

    assert recorder.writes == [b"head"]


async def test_everything_is_written_once_and_in_order_whatever_comes_between():
    recorder = Recorder()
    transport = Gathering(recorder)

    for number in range(7):
        transport.write(b"%d" % number)
        if number % 3 == 0:
            await asyncio.sleep(0)
    await asyncio.sleep(0)

    assert b"".join(recorder.writes) == b"0123456"


async def test_closing_writes_what_is_held_first():
    recorder = Recorder()
    transport = Gathering(recorder)

    transport.write(b"goodbye")
    transport.close()

    assert recorder.writes == [b"goodbye"]
    assert transport.is_closing()


async def test_an_answer_of_the_server_is_one_write():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    recorder = Recorder()
    config = uvicorn.Config(app, lifespan="off", log_config=None)
    config.load()
    protocol = HttpProtocol(config, ServerState(), {})
    protocol.connection_made(recorder)
    protocol.data_received(b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")

    async with asyncio.timeout(PATIENCE_S):
        await recorder.closed.wait()

    assert len(recorder.writes) == 1
    assert recorder.writes[0].startswith(b"HTTP/1.1 200 OK\r\n")
    assert recorder.writes[0].endswith(b"\r\n\r\nok")
