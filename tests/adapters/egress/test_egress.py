"""The one door out lets nothing reach what is not public, and nobody hold it up."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from adapters.egress.addresses import is_public
from adapters.egress.client import ANY_PORT, DENIED_SENTENCE, REDIRECT_COUNT_MAX, EgressClient
from domain.ports import EgressDenied
from tests.peers.web import WebPeer, raw_peer, web_peer

HERE = "127.0.0.1/32"
NAMED = "peer.example"  # resolves to this machine in these tests
OTHER = "other.example"

GZIPPED = gzip.compress(b"x", mtime=0)


class Names:
    """A name server: gives each name its answers in turn, the last one for ever, and counts the questions."""

    def __init__(self, **answers: Sequence[Sequence[str]]) -> None:
        self.answers = {name.replace("_", "."): list(each) for name, each in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str) -> Sequence[str]:
        self.asked.append(host)
        answers = self.answers.get(host, [["127.0.0.1"]])
        return answers.pop(0) if len(answers) > 1 else answers[0]


@pytest.fixture
async def peer() -> AsyncIterator[WebPeer]:
    async with web_peer() as peer:
        peer.text("/", "hello")
        yield peer


@pytest.fixture
async def egress() -> AsyncIterator[EgressClient]:
    client = EgressClient(allow=[HERE], ports=ANY_PORT, resolve=Names())
    yield client
    await client.close()


async def denied(client: EgressClient, url: str, method: str = "GET", **more: object) -> None:
    with pytest.raises(EgressDenied) as refusal:
        await client.fetch(method, url, **more)  # type: ignore[arg-type]
    assert str(refusal.value) == DENIED_SENTENCE
    assert refusal.value.__cause__ is None


async def test_an_answer_comes_with_its_final_address_status_headers_and_body(
    egress: EgressClient, peer: WebPeer
) -> None:
    peer.bytes("/missing", b"no", {"X-Reason": "gone"}, 404)
    answer = await egress.fetch("GET", peer.url("/missing?q=1#part"))
    assert (answer.url, answer.status, answer.body) == (peer.url("/missing?q=1"), 404, b"no")
    assert answer.headers["x-reason"] == "gone"


async def test_body_and_headers_reach_the_other_side(egress: EgressClient, peer: WebPeer) -> None:
    await egress.fetch(
        "POST", peer.url(), headers={"X-API-Key": "k", "content-type": "text/x"}, body=b"\x00\xff"
    )
    seen = peer.seen[0]
    assert (seen.method, seen.body, seen.headers["x-api-key"]) == ("POST", b"\x00\xff", "k")
    assert seen.headers["content-type"] == "text/x"
    assert seen.headers["accept-encoding"] == "identity"
    assert "cookie" not in seen.headers


async def test_cookies_are_never_kept(egress: EgressClient, peer: WebPeer) -> None:
    peer.text("/", "hello", set_cookie="session=1; Path=/")
    await egress.fetch("GET", peer.url())
    await egress.fetch("GET", peer.url())
    assert "cookie" not in peer.seen[1].headers


# --- addresses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        *[
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.0.9",
            "169.254.169.254",
        ],
        *[
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.192",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.0.1",
            "198.18.0.1",
        ],
        *["198.51.100.7", "203.0.113.9", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"],
        *["100.100.100.200", "168.63.129.16", "192.31.196.1", "192.52.193.1", "192.175.48.1"],
        *["::", "::1", "::ffff:10.0.0.1", "::ffff:8.8.8.8", "::10.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::1"],
        *["100::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1", "5f00::1", "4000::1"],
        *["2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:2::1", "2001:20::1", "2001:db8::1"],
        *["2002:7f00:1::", "2002:a00:1::1", "2620:4f:8000::1", "3fff::1", "fe80::1%eth0"],
    ],
)
def test_no_special_address_is_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *["1.1.1.1", "8.8.8.8", "100.63.255.255", "100.128.0.1", "172.15.0.1", "172.32.0.1", "192.0.1.1"],
        *[
            "198.17.0.1",
            "198.20.0.1",
            "223.255.255.255",
            "2606:4700::1111",
            "2a00:1450::1",
            "2001:4860::8888",
        ],
    ],
)
def test_neighbours_of_special_addresses_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


HOSTILE_HOSTS = [
    *["127.0.0.1", "127.1", "127.0.1", "0", "0.0.0.0", "2130706433", "017700000001", "0x7f000001", "0x7f.1"],
    *[
        "0x7f.0x0.0x0.0x1",
        "0177.0.0.1",
        "127.0.0.01",
        "127.0.0.1.",
        "localhost.",
        "a..b",
        ".a",
        "-",
        "1.2.3.4.5",
    ],
    *[
        "１２７.０.０.１",
        "①②⑦.⓪.⓪.①",
        "127。0。0。1",
        "127.0.0.1%00.example",
        "a%2eb",
        "ex ample",
        "example.0x7f",
    ],
    *["[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]"],
    *["[2002:7f00:1::]", "[fe80::1%25lo]", "[fec0::1]", "[fd00::1]", "[ff02::1]", "[0:0:0:0:0:0:0:1]"],
    *[
        "localhost",
        "peer.example",
        "a" * 64 + ".example",
        "xn--",
        "user@peer.example",
        "user:pw@127.0.0.1",
        "@a",
    ],
]


@pytest.mark.parametrize("host", HOSTILE_HOSTS)
async def test_this_machine_is_not_reached_by_any_notation(peer: WebPeer, host: str) -> None:
    client = EgressClient(ports=ANY_PORT, resolve=Names())
    await denied(client, f"http://{host}:{peer.port}/", timeout_s=2.0)
    assert peer.seen == []
    await client.close()


@pytest.mark.parametrize(
    "host", ["127.1", "2130706433", "0x7f.1", "0177.0.0.1", "127.0.0.1.", "[::ffff:127.0.0.1]"]
)
async def test_an_opened_range_is_opened_for_plain_notation_only(
    egress: EgressClient, peer: WebPeer, host: str
) -> None:
    await denied(egress, f"http://{host}:{peer.port}/")
    assert peer.seen == []


@pytest.mark.parametrize(
    "url",
    [
        *[
            "",
            "/",
            "//",
            "http:",
            "http://",
            "http:///path",
            "peer.example",
            "//peer.example/",
            "http:peer.example",
        ],
        *[
            "ftp://peer.example/",
            "file:///etc/passwd",
            "gopher://peer.example/",
            "javascript:alert(1)",
            "ws://peer.example",
        ],
        *["http://peer.example\\@other.example/", "http://peer.example\r\nX: y", "http://peer.example/\x00"],
        *[
            "http://peer.example:0/",
            "http://peer.example:65536/",
            "http://peer.example:-1/",
            "http://peer.example:x/",
        ],
        *[
            "http://user@peer.example/",
            "http://:@peer.example/",
            " http://peer.example/",
            "http://[::1/",
            "http://]/",
        ],
        "http://peer.example/" + "a" * 9_000,
    ],
)
async def test_a_url_that_can_be_misread_is_refused_before_any_name_is_asked(url: str) -> None:
    names = Names()
    client = EgressClient(allow=[HERE], ports=ANY_PORT, resolve=names)
    await denied(client, url)
    assert names.asked == []
    await client.close()


async def test_only_the_usual_ports_are_open_unless_the_operator_says_so(peer: WebPeer) -> None:
    client = EgressClient(allow=[HERE], resolve=Names())
    await denied(client, peer.url())
    await denied(client, peer.url(host=NAMED))
    assert peer.seen == []
    await client.close()


async def test_one_private_answer_among_public_ones_denies_the_name(peer: WebPeer) -> None:
    names = Names(peer_example=[["127.0.0.1", "10.0.0.1"]], other_example=[["127.0.0.1", "::1"]])
    client = EgressClient(allow=[HERE], ports=ANY_PORT, resolve=names)
    await denied(client, peer.url(host=NAMED))
    await denied(client, peer.url(host=OTHER))
    assert peer.seen == []
    await client.close()


@pytest.mark.parametrize("answer", [[], ["not an address"], ["127.0.0.1\n"], ["fe80::1%lo"]])
async def test_a_resolver_that_answers_nonsense_denies_the_name(peer: WebPeer, answer: list[str]) -> None:
    client = EgressClient(allow=[HERE], ports=ANY_PORT, resolve=Names(peer_example=[answer]))
    await denied(client, peer.url(host=NAMED))
    await client.close()


async def test_a_name_is_resolved_once_and_the_checked_address_is_the_one_connected_to(peer: WebPeer) -> None:
    names = Names(peer_example=[["127.0.0.1"], ["10.0.0.1"]])
    client = EgressClient(allow=[HERE], ports=ANY_PORT, resolve=names)
    assert (await client.fetch("GET", peer.url(host=NAMED))).body == b"hello"
    assert names.asked == [NAMED]
    assert peer.seen[0].headers["host"] == f"{NAMED}:{peer.port}"
    await denied(client, peer.url(host=NAMED))
    await client.close()


async def test_a_name_that_changes_its_address_between_redirects_is_checked_again(peer: WebPeer) -> None:
    names = Names(peer_example=[["127.0.0.1"], ["169.254.169.254"]])
    client = EgressClient(allow=[HERE], ports=ANY_PORT, resolve=names)
    peer.redirect("/to", "/")
    await denied(client, peer.url("/to", host=NAMED))
    assert [seen.path for seen in peer.seen] == ["/to"]
    await client.close()


async def test_a_slow_resolver_does_not_hold_the_caller_up(peer: WebPeer) -> None:
    async def never(_: str) -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    client = EgressClient(allow=[HERE], ports=ANY_PORT, resolve=never)
    start = time.monotonic()
    await denied(client, peer.url(host=NAMED), timeout_s=0.2)
    assert time.monotonic() - start < 2
    await client.close()


async def test_the_systems_own_resolver_knows_this_machine(peer: WebPeer) -> None:
    client = EgressClient(allow=["127.0.0.0/8", "::1/128"], ports=ANY_PORT)
    assert (await client.fetch("GET", peer.url(host="localhost"))).body == b"hello"
    await client.close()


# --- redirects ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    [
        *[
            "http://10.0.0.1/",
            "http://169.254.169.254/latest/meta-data/",
            "http://[::1]/",
            "http://2130706433/",
        ],
        *[
            "file:///etc/passwd",
            "ftp://peer.example/",
            "http://user:pw@peer.example/",
            "//10.0.0.1/",
        ],
        *[
            "http://peer.example\\@other.example/",
            "gopher://peer.example:70/_x",
            "javascript:1",
            "http://a b/",
        ],
    ],
)
async def test_a_redirect_is_checked_like_a_first_request(
    egress: EgressClient, peer: WebPeer, location: str
) -> None:
    peer.redirect("/to", location)
    await denied(egress, peer.url("/to"))
    assert len(peer.seen) == 1


async def test_five_redirects_are_followed_and_six_are_not(egress: EgressClient, peer: WebPeer) -> None:
    for step in range(REDIRECT_COUNT_MAX + 1):
        peer.redirect(f"/{step}", f"/{step + 1}")
    peer.text(f"/{REDIRECT_COUNT_MAX + 1}", "arrived")
    answer = await egress.fetch("GET", peer.url("/1"))
    assert (answer.body, answer.url) == (b"arrived", peer.url("/6"))
    await denied(egress, peer.url("/0"))


async def test_a_redirect_loop_ends(egress: EgressClient, peer: WebPeer) -> None:
    peer.redirect("/loop", "/loop")
    await denied(egress, peer.url("/loop"))
    assert len(peer.seen) == REDIRECT_COUNT_MAX + 1


SECRETS = {
    "Authorization": "Bearer s",
    "Cookie": "s=1",
    "X-API-Key": "s",
    "X-Custom-Auth": "s",
    "Accept": "a/b",
}


async def test_what_may_be_a_secret_is_never_shown_to_another_origin(
    egress: EgressClient, peer: WebPeer
) -> None:
    peer.redirect("/away", peer.url("/back", host=OTHER), 307)
    peer.redirect("/back", peer.url("/", host=NAMED), 307)
    await egress.fetch("GET", peer.url("/away", host=NAMED), headers=SECRETS)
    first, second, third = peer.seen
    assert first.headers["authorization"] == "Bearer s"
    for seen in (second, third):
        assert {"authorization", "cookie", "x-api-key", "x-custom-auth"}.isdisjoint(seen.headers)
        assert seen.headers["accept"] == "a/b"


async def test_secrets_stay_with_a_redirect_within_the_origin(egress: EgressClient, peer: WebPeer) -> None:
    peer.redirect("/to", "/?q=1")
    await egress.fetch("GET", peer.url("/to"), headers=SECRETS)
    assert peer.seen[1].headers["x-custom-auth"] == "s"
    assert peer.seen[1].path == "/?q=1"


@pytest.mark.parametrize(
    ("status", "method", "then"),
    [
        *[(301, "POST", "GET"), (302, "POST", "GET"), (303, "POST", "GET"), (303, "PUT", "GET")],
        *[
            (307, "POST", "POST"),
            (308, "POST", "POST"),
            (301, "PUT", "PUT"),
            (302, "HEAD", "HEAD"),
            (303, "HEAD", "HEAD"),
        ],
    ],
)
async def test_the_method_after_a_redirect(
    egress: EgressClient, peer: WebPeer, status: int, method: str, then: str
) -> None:
    peer.redirect("/to", "/", status)
    await egress.fetch(method, peer.url("/to"), body=None if method == "HEAD" else b"content")
    assert peer.seen[1].method == then
    assert peer.seen[1].body == (b"content" if then in ("POST", "PUT") else b"")


# --- headers and methods -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        *[
            {"Host": "other.example"},
            {"hOST": "x"},
            {"Content-Length": "1"},
            {"Transfer-Encoding": "chunked"},
        ],
        *[
            {"Connection": "x"},
            {"Accept-Encoding": "gzip"},
            {"Proxy-Authorization": "x"},
            {"Expect": "100-continue"},
        ],
        *[
            {"X": "a\r\nY: b"},
            {"X": "a\nb"},
            {"X": "a\x00"},
            {"X\r\nY": "a"},
            {"X Y": "a"},
            {"": "a"},
            {"X:": "a"},
        ],
        *[{"X": "ž"}, {"X": "a" * 9_000}, {f"X-{n}": "" for n in range(65)}],
    ],
)
async def test_headers_that_would_change_the_request_itself_are_refused(
    egress: EgressClient, peer: WebPeer, headers: dict[str, str]
) -> None:
    await denied(egress, peer.url(), headers=headers)
    assert peer.seen == []


@pytest.mark.parametrize("method", ["", "get", "CONNECT", "TRACE", "GET / HTTP/1.1\r\nX: y\r\n\r\nGET"])
async def test_unusual_methods_are_refused(egress: EgressClient, peer: WebPeer, method: str) -> None:
    await denied(egress, peer.url(), method)
    assert peer.seen == []


async def test_the_environments_proxy_is_not_used(
    egress: EgressClient, peer: WebPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert (await egress.fetch("GET", peer.url())).status == 200


# --- time and size -----------------------------------------------------------------------------------------


async def test_a_body_up_to_the_limit_is_read_and_one_byte_more_is_not(
    egress: EgressClient, peer: WebPeer
) -> None:
    peer.bytes("/big", b"x" * 100_000, {})
    assert len((await egress.fetch("GET", peer.url("/big"), size_bytes_max=100_000)).body) == 100_000
    await denied(egress, peer.url("/big"), size_bytes_max=99_999)


async def test_an_endless_body_is_cut_at_the_limit(egress: EgressClient, peer: WebPeer) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 65_536)

    peer.answers["/endless"] = endless
    await denied(egress, peer.url("/endless"), size_bytes_max=1_000_000)


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress])
async def test_a_decompression_bomb_is_cut_at_the_limit(
    egress: EgressClient, peer: WebPeer, compress: Callable[[bytes], bytes]
) -> None:
    coding = "gzip" if compress is gzip.compress else "deflate"
    bomb = compress(bytes(50_000_000))
    assert len(bomb) < 100_000
    peer.bytes("/bomb", bomb, {"content-encoding": coding})
    await denied(egress, peer.url("/bomb"), size_bytes_max=1_000_000)
    peer.bytes("/fine", compress(b"fine" * 1_000), {"content-encoding": coding})
    answer = await egress.fetch("GET", peer.url("/fine"), size_bytes_max=4_000)
    assert answer.body == b"fine" * 1_000
    assert "content-encoding" not in answer.headers


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "compress", "identity, gzip"])
async def test_encodings_without_a_limit_are_refused(
    egress: EgressClient, peer: WebPeer, coding: str
) -> None:
    peer.bytes("/coded", gzip.compress(b"x"), {"content-encoding": coding})
    await denied(egress, peer.url("/coded"))


@pytest.mark.parametrize("body", [b"not gzip", GZIPPED[:-4], GZIPPED + b"more"], ids=["none", "cut", "more"])
async def test_a_body_that_is_not_what_its_encoding_says_is_refused(
    egress: EgressClient, peer: WebPeer, body: bytes
) -> None:
    peer.bytes("/coded", body, {"content-encoding": "gzip"})
    await denied(egress, peer.url("/coded"))


@pytest.mark.parametrize(
    "start", [b"", b"HTTP/1.1 200 OK\r\nX: y", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"]
)
async def test_an_answer_that_never_ends_is_given_up_at_the_deadline(
    egress: EgressClient, start: bytes
) -> None:
    async with raw_peer(start, hold=True) as port:
        began = time.monotonic()
        await denied(egress, f"http://127.0.0.1:{port}/", timeout_s=0.3)
        assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "answer",
    [
        *[
            b"",
            b"\x00\xff" * 50,
            b"SSH-2.0-OpenSSH_9\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        ],
        *[b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1_000 + b"\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"y" * 20_000],
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://[\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_refused_like_everything_else(egress: EgressClient, answer: bytes) -> None:
    async with raw_peer(answer) as port:
        await denied(egress, f"http://127.0.0.1:{port}/", timeout_s=2.0)


async def test_a_closed_port_is_refused_like_everything_else(egress: EgressClient, peer: WebPeer) -> None:
    async with raw_peer(b"") as port:
        pass
    await denied(egress, f"http://127.0.0.1:{port}/")


async def test_a_caller_that_gives_up_is_not_told_of_a_denial(egress: EgressClient) -> None:
    async with raw_peer(b"", hold=True) as port:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await egress.fetch("GET", f"http://127.0.0.1:{port}/")


# --- TLS ---------------------------------------------------------------------------------------------------


def self_signed(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's TLS with a certificate for `name`, and a client's that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    file = folder / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + pem)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(file)
    return server, ssl.create_default_context(cadata=pem.decode())


async def test_a_certificate_must_name_the_host_that_was_asked_for(tmp_path: Path) -> None:
    server, trusting = self_signed(tmp_path, NAMED)
    client = EgressClient(allow=[HERE], ports=ANY_PORT, resolve=Names(), ssl_context=trusting)
    untrusting = EgressClient(allow=[HERE], ports=ANY_PORT, resolve=Names())
    async with web_peer(server) as peer:
        peer.text("/", "secret")
        assert (await client.fetch("GET", peer.url(host=NAMED))).body == b"secret"
        await denied(client, peer.url(host=OTHER))
        await denied(client, peer.url())
        await denied(untrusting, peer.url(host=NAMED))
        assert len(peer.seen) == 1
    await client.close()
    await untrusting.close()
