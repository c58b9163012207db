from __future__ import annotations

import logging
from typing import Any
from uuid import UUID

import orjson
import pytest
from aiohttp import web

from adapters.egress.client import DENIED_SENTENCE, EgressClient
from adapters.memory.vault import MemoryVault
from adapters.tools.custom_http import CustomHttpTool
from adapters.tools.json_schema import schema_fault
from domain.ports import Effect, ToolFailed
from tests.adapters.tools.calls import TENANT_ID, context, failure_of, result_of
from tests.peers.web import WebPeer

SECRET = 'sk-canary/12+34 "é'
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1},
        "tags": {"type": "array"},
    },
    "required": ["city"],
    "additionalProperties": False,
}


class Workshop:
    """Makes tools against the peer."""

    def __init__(self, egress: EgressClient, peer: WebPeer) -> None:
        self.egress, self.peer, self.vault = egress, peer, MemoryVault()
        peer.text("/weather/Rome", "sunny")

    def tool(self, **changes: Any) -> CustomHttpTool:
        definition = {
            "name": "weather",
            "description": "Weather of a city",
            "method": "GET",
            "url": self.peer.url("/weather/{city}"),
            "parameters": PARAMETERS,
        }
        return CustomHttpTool({**definition, **changes}, self.egress, self.vault)

    async def secret(self, secret: str = SECRET) -> dict[str, str]:
        return {"secret_ref": await self.vault.put(TENANT_ID, "weather:authorization", secret)}


@pytest.fixture
def workshop(egress: EgressClient, peer: WebPeer) -> Workshop:
    return Workshop(egress, peer)


async def test_arguments_fill_the_url_and_the_query_of_a_get(workshop: Workshop, peer: WebPeer) -> None:
    tool = workshop.tool(url=peer.url("/weather/{city}?unit=c"))
    assert (tool.name, tool.kind, tool.effect, tool.parameters) == (
        "weather",
        "custom",
        Effect.PURE,
        PARAMETERS,
    )
    assert await result_of(tool, city="Rome", days=2, tags=["a b", "c&d"]) == "HTTP 200 OK\n\nsunny"
    assert peer.seen[0].path == "/weather/Rome?unit=c&days=2&tags=a%20b&tags=c%26d"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
async def test_arguments_not_in_the_url_are_the_json_body(
    workshop: Workshop, peer: WebPeer, method: str
) -> None:
    tool = workshop.tool(method=method, headers={"X-Plain": "yes"})
    assert tool.effect is Effect.UNSAFE
    await result_of(tool, city="Rome", days=2)
    seen = peer.seen[0]
    assert (seen.method, seen.headers["content-type"], seen.headers["x-plain"]) == (
        method,
        "application/json",
        "yes",
    )
    assert orjson.loads(seen.body) == {"days": 2}
    assert "idempotency-key" not in seen.headers


async def test_an_idempotent_tool_sends_the_calls_key(workshop: Workshop, peer: WebPeer) -> None:
    tool = workshop.tool(method="DELETE", idempotent=True)
    assert tool.effect is Effect.IDEMPOTENT
    await result_of(tool, city="Rome")
    assert (peer.seen[0].method, peer.seen[0].headers["idempotency-key"]) == (
        "DELETE",
        context().idempotency_key,
    )


@pytest.mark.parametrize(
    ("city", "path"),
    [
        ("a/b", "/weather/a%2Fb"),
        ("?x=1#y", "/weather/%3Fx=1%23y"),
        ("%2e%2e", "/weather/%252e%252e"),
        ("São Paulo", "/weather/S%C3%A3o%20Paulo"),
        ("@evil.example", "/weather/@evil.example"),
    ],
)
async def test_an_argument_stays_one_part_of_the_path(
    workshop: Workshop, peer: WebPeer, city: str, path: str
) -> None:
    await failure_of(workshop.tool(), city=city)
    assert peer.seen[0].path == path


@pytest.mark.parametrize("city", [".", "..", ""])
async def test_an_argument_cannot_lead_to_another_path(workshop: Workshop, peer: WebPeer, city: str) -> None:
    assert (await failure_of(workshop.tool(), city=city)).error_class == "invalid_arguments"
    assert (
        await failure_of(workshop.tool(url=peer.url("/a/.{city}/b")), city=".")
    ).error_class == "invalid_arguments"
    assert peer.seen == []


@pytest.mark.parametrize(
    "arguments", [{}, {"city": 3}, {"city": "Rome", "days": 0}, {"city": "Rome", "country": "it"}]
)
async def test_arguments_are_checked_against_the_definition(
    workshop: Workshop, peer: WebPeer, arguments: dict[str, Any]
) -> None:
    tool = workshop.tool()
    sentence = tool.validate(arguments)
    assert sentence
    assert str(await failure_of(tool, **arguments)) == sentence
    assert peer.seen == []


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500])
async def test_an_error_is_told_with_its_status_and_the_servers_words(
    workshop: Workshop, peer: WebPeer, status: int
) -> None:
    peer.json("/weather/Rome", '{"error": "no such\\n city"}', status)
    failure = await failure_of(workshop.tool(), city="Rome")
    assert failure.error_class == f"http_{status}"
    assert str(status) in str(failure)
    assert "no such" in str(failure)


async def echo(request: web.Request) -> web.Response:
    """Repeats what it was sent in every form it can think of."""
    sent = request.headers["Authorization"]
    bare = sent.rpartition(" ")[2]
    return web.json_response(
        {"sent": sent, "bare": bare, "url": str(request.url.with_query(a=bare, b=sent))},
        status=int(request.match_info["path"]),
    )


@pytest.mark.parametrize("status", [200, 401])
@pytest.mark.parametrize(
    "secret", ["Bearer sk-canary-0123456789", "sk-canary/12+34==", 'sk-canary "quoted" \\']
)
async def test_a_secret_is_sent_and_never_seen_again(
    workshop: Workshop, peer: WebPeer, caplog: pytest.LogCaptureFixture, status: int, secret: str
) -> None:
    caplog.set_level(logging.DEBUG)
    peer.answers[f"/{status}"] = echo
    tool = workshop.tool(url=peer.url(f"/{status}"), headers={"authorization": await workshop.secret(secret)})
    seen_by_caller = repr(vars(tool))
    try:
        seen_by_caller += (await tool.run({"city": "Rome"}, context())).text
    except ToolFailed as failure:
        seen_by_caller += repr(failure) + repr(failure.__cause__) + repr(failure.__context__)
    assert peer.seen[0].headers["authorization"] == secret
    assert "canary" not in seen_by_caller
    assert "[secret]" in seen_by_caller
    assert "canary" not in caplog.text


async def test_a_secret_is_not_shown_to_where_the_server_sends_us(workshop: Workshop, peer: WebPeer) -> None:
    peer.redirect("/weather/Rome", peer.url("/elsewhere", host="localhost"))
    peer.text("/elsewhere", "moved")
    await workshop.tool(headers={"X-Key": await workshop.secret("sk-canary")}).run(
        {"city": "Rome"}, context()
    )
    assert [seen.headers.get("x-key") for seen in peer.seen] == ["sk-canary", None]


async def test_a_secret_of_another_tenant_or_a_removed_one_is_missing(
    workshop: Workshop, peer: WebPeer
) -> None:
    ref = await workshop.secret()
    tool = workshop.tool(headers={"X-Key": ref})
    with pytest.raises(ToolFailed, match="was removed"):
        await tool.run({"city": "Rome"}, context(tenant_id=UUID(int=99)))
    await workshop.vault.remove(TENANT_ID, ref["secret_ref"])
    assert (await failure_of(tool, city="Rome")).error_class == "secret_missing"
    assert peer.seen == []


async def test_a_secret_that_no_header_can_carry_fails_without_a_trace_of_it(
    workshop: Workshop, peer: WebPeer
) -> None:
    tool = workshop.tool(headers={"X-Key": await workshop.secret("canary\r\nX: y")})
    failure = await failure_of(tool, city="Rome")
    assert "canary" not in repr(failure)
    assert peer.seen == []


async def test_an_unsafe_call_that_fails_on_the_way_is_said_to_be_in_doubt(workshop: Workshop) -> None:
    private = {"url": "http://10.0.0.1/{city}"}
    assert str(await failure_of(workshop.tool(**private), city="Rome")) == f"weather: {DENIED_SENTENCE}"
    in_doubt = str(await failure_of(workshop.tool(**private, method="POST"), city="Rome"))
    assert in_doubt.endswith("Whether it was carried out is not known.")


async def test_a_slow_server_is_given_up_at_the_tools_own_limit(workshop: Workshop, peer: WebPeer) -> None:
    async def slow(_: web.Request) -> web.StreamResponse:
        import asyncio

        await asyncio.Event().wait()
        return web.Response()

    peer.answers["/weather/Rome"] = slow
    assert (await failure_of(workshop.tool(timeout_s=0.1), city="Rome")).error_class in (
        "timed_out",
        "unreachable",
    )


async def test_an_answer_without_text_is_refused_and_an_empty_one_is_not(
    workshop: Workshop, peer: WebPeer
) -> None:
    peer.bytes("/weather/Rome", b"\x89PNG\x00", {"content-type": "image/png"})
    assert (await failure_of(workshop.tool(), city="Rome")).error_class == "not_text"
    peer.bytes("/weather/Rome", b"", {}, 204)
    assert await result_of(workshop.tool(), city="Rome") == "HTTP 204 No Content"


def test_a_definition_that_was_not_checked_is_refused(workshop: Workshop) -> None:
    with pytest.raises(ValueError, match="/method"):
        workshop.tool(method="TRACE")


async def test_parameters_that_nobody_can_check_make_the_tool_unavailable(
    workshop: Workshop, peer: WebPeer
) -> None:
    tool = workshop.tool(parameters={**PARAMETERS, "patternProperties": {"(": {}}})
    missing = tool.missing()
    assert missing is not None
    assert missing.startswith("Change the tool's parameters")
    assert str(await failure_of(tool, city="Rome")) == missing
    assert workshop.tool().missing() is None
    assert peer.seen == []


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "http://127.0.0.1:9/schema"},
        {"$ref": "file:///etc/passwd"},
        {"type": "thing"},
        {"properties": {"a": {"pattern": "("}}},
    ],
)
def test_a_schema_that_cannot_be_checked_here_is_told(schema: dict[str, Any]) -> None:
    assert schema_fault({"type": "object"}) is None
    assert schema_fault(schema)
