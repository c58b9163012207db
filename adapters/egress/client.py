"""The client of the one door: checked addresses, checked redirects, and a limit on everything."""

from __future__ import annotations

import asyncio
import io
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from adapters.egress import rules
from adapters.egress.addresses import AddressPolicy, Network
from adapters.egress.bodies import read_body
from adapters.egress.rules import Refused
from domain.ports import EgressDenied, Fetched

REDIRECT_COUNT_MAX = 5
CONNECT_TIMEOUT_S = 3.0
CONNECTION_COUNT_MAX = 200
CONNECTION_COUNT_PER_HOST_MAX = 32
RESOLVER_THREAD_COUNT = 16
ADDRESS_COUNT_MAX = 16
PORTS = frozenset({80, 443})
ANY_PORT = range(1, 65_536)
USER_AGENT = "Oshaani/1.0"
DENIED_SENTENCE = "The address is not allowed, does not answer, or answers too slowly or with too much."

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_DECODED = frozenset({"content-encoding", "content-length", "transfer-encoding"})

Resolve = Callable[[str], Awaitable[Sequence[str]]]

log = logging.getLogger(__name__)


class AddressDenied(OSError):
    """A name or an address that leads where the policy does not."""


@dataclass(frozen=True, slots=True)
class _Hop:
    """One request on the way to the final answer."""

    method: str
    url: URL
    headers: Mapping[str, str]
    body: bytes | None


class EgressClient:
    """Implements `Egress`. Each request has a connection of its own: nothing is ever sent twice by itself.

    `allow` opens ranges that are not public. `resolve` gives the addresses of a name; `ssl_context` decides which
    certificates are trusted.
    """

    def __init__(
        self,
        *,
        allow: Sequence[Network | str] = (),
        ports: Container[int] = PORTS,
        resolve: Resolve | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._policy = AddressPolicy(allow)
        self._ports = ports
        self._system_resolver = None if resolve else SystemResolver()
        self._resolve: Resolve = resolve or SystemResolver.resolve.__get__(self._system_resolver)
        self._ssl = ssl_context
        self._session: aiohttp.ClientSession | None = None

    async def fetch(  # noqa: PLR0913 - the port has it so
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        timeout_s: float = 15.0,
        size_bytes_max: int = 5_000_000,
        follow_redirects: bool = True,
    ) -> Fetched:
        try:
            hop = _Hop(
                rules.checked_method(method),
                rules.checked_url(url),
                rules.checked_headers(headers or {}),
                rules.checked_body(body),
            )
            async with asyncio.timeout(timeout_s):
                return await self._follow(hop, size_bytes_max, follow_redirects)
        except (Refused, aiohttp.ClientError, OSError, ValueError) as error:
            # TimeoutError is an OSError. The reason is for operators; a caller could map a network with it.
            log.debug("egress refused or failed", extra={"reason": type(error).__name__})
            raise EgressDenied(DENIED_SENTENCE) from None

    async def close(self) -> None:
        """Cut what is under way and let the threads go."""
        if self._session is not None:
            await self._session.close()
            self._session = None
        if self._system_resolver is not None:
            self._system_resolver.close()

    async def _follow(self, hop: _Hop, size_bytes_max: int, follow_redirects: bool) -> Fetched:
        for _ in range(REDIRECT_COUNT_MAX + 1):
            answer = await self._send(hop, size_bytes_max, follow_redirects)
            if isinstance(answer, Fetched):
                return answer
            hop = answer
        raise Refused("too many redirects")

    async def _send(self, hop: _Hop, size_bytes_max: int, follow_redirects: bool) -> Fetched | _Hop:
        self._check_target(hop.url)
        response = await self._open_session().request(
            hop.method,
            hop.url,
            headers={"User-Agent": USER_AGENT, **hop.headers, "Accept-Encoding": "identity"},
            data=None if hop.body is None else io.BytesIO(hop.body),
            allow_redirects=False,
        )
        try:
            location = response.headers.get("Location")
            if follow_redirects and response.status in _REDIRECTS and location is not None:
                return _next_hop(hop, response.status, location)
            encoding = (
                "" if hop.method == "HEAD" else ",".join(response.headers.getall("Content-Encoding", []))
            )
            body = await read_body(response.content, encoding, size_bytes_max)
            return Fetched(str(hop.url), response.status, _answered_headers(response), body)
        finally:
            response.close()

    def _check_target(self, url: URL) -> None:
        if url.port not in self._ports:
            raise Refused("port")
        host = url.raw_host or ""
        # A name is checked when it is resolved; an address never is, so it is checked here.
        if (":" in host or host.replace(".", "").isdecimal()) and not self._policy.permits(host):
            raise Refused("address")

    def _open_session(self) -> aiohttp.ClientSession:
        # Opened by the first request: a session belongs to the loop that it was made in.
        if self._session is None:
            connector = aiohttp.TCPConnector(
                resolver=_CheckedResolver(self._resolve, self._policy),
                use_dns_cache=False,
                force_close=True,
                limit=CONNECTION_COUNT_MAX,
                limit_per_host=CONNECTION_COUNT_PER_HOST_MAX,
                socket_factory=self._open_socket,
                ssl=self._ssl or True,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
                auto_decompress=False,
                trust_env=False,
            )
        return self._session

    def _open_socket(self, addr_info: aiohttp.AddrInfoType) -> socket.socket:
        """The last gate: no socket is made for an address that was not checked."""
        family, kind, protocol, _, (address, port, *_) = addr_info
        assert isinstance(address, str)
        if not self._policy.permits(address) or port not in self._ports:
            raise AddressDenied("address denied")
        return socket.socket(family, kind, protocol)


class SystemResolver:
    """The operating system's resolver, in threads of its own: slow name servers hold up nothing else."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(RESOLVER_THREAD_COUNT, thread_name_prefix="egress-resolver")

    async def resolve(self, host: str) -> Sequence[str]:
        """The addresses of `host`, best first."""
        loop = asyncio.get_running_loop()
        infos = await loop.run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        )
        return [str(info[4][0]) for info in infos]

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class _CheckedResolver(AbstractResolver):
    """Gives the connector addresses to connect to, all of them checked: it asks nobody again afterwards."""

    def __init__(self, resolve: Resolve, policy: AddressPolicy) -> None:
        self._resolve = resolve
        self._policy = policy

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            addresses = list(dict.fromkeys(await self._resolve(host)))
        if not addresses or not all(self._policy.permits(address) for address in addresses):
            raise AddressDenied("address denied")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses[:ADDRESS_COUNT_MAX]
        ]

    async def close(self) -> None:
        """Nothing to let go."""


def _next_hop(hop: _Hop, status: int, location: str) -> _Hop:
    url = rules.joined(hop.url, location)
    following = replace(hop, url=url)
    if not rules.same_origin(hop.url, url):
        following = replace(following, headers=rules.harmless(hop.headers))
    # 303 asks for another look with GET; clients have always taken 301 and 302 after POST the same way.
    if (status == 303 and hop.method != "HEAD") or (status in (301, 302) and hop.method == "POST"):
        headers = {name: value for name, value in following.headers.items() if name.lower() != "content-type"}
        following = replace(following, method="GET", body=None, headers=headers)
    return following


def _answered_headers(response: aiohttp.ClientResponse) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, value in response.headers.items():
        key = name.lower()
        if key not in _DECODED:
            headers[key] = f"{headers[key]}, {value}" if key in headers else value
    return headers
