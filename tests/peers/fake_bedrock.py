"""A Bedrock on loopback, for the real boto3: Converse, ConverseStream and the lists of models.

`async with FakeBedrock() as peer: Bedrock("us-east-1", peer.base_url, session=credentials())`. Its event-stream
frames follow https://smithy.io/2.0/aws/amazon-eventstream.html; boto3's decoder checks their lengths and sums.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote
from zlib import crc32

import boto3
import orjson
from aiohttp import web

from tests.peers import CACHED_TOKENS, INPUT_TOKENS, OUTPUT_TOKENS, Scene, pieces_of
from tests.peers.model_server import Handler, ModelServer, ended, torn, value_of, whole

MODEL = "amazon.nova-lite-v1:0"
PROFILE = "us.anthropic.claude-sonnet-4-20250514-v1:0"
_ARN = "arn:aws:bedrock:us-east-1::foundation-model/"
_STRING = 7
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_CALL_ID = re.compile(r"[a-zA-Z0-9_.:-]{1,64}")
_STOP_REASONS = {
    "stop": "end_turn",
    "tool_calls": "tool_use",
    "length": "max_tokens",
    "content_filter": "guardrail_intervened",
}
_ERROR_TYPES = {
    400: "ValidationException",
    401: "UnrecognizedClientException",
    403: "AccessDeniedException",
    404: "ResourceNotFoundException",
    408: "ModelTimeoutException",
    424: "ModelErrorException",
    429: "ThrottlingException",
    500: "InternalServerException",
    503: "ServiceUnavailableException",
}


def _summary(
    name: str, inference: str, inputs: tuple[str, ...] = ("TEXT",), status: str = "ACTIVE"
) -> dict[str, Any]:
    return {
        "modelArn": _ARN + name,
        "modelId": name,
        "modelName": name.upper(),
        "inputModalities": inputs,
        "outputModalities": ["TEXT"],
        "inferenceTypesSupported": [inference],
        "modelLifecycle": {"status": status},
    }


MODELS = [
    _summary("amazon.titan-text-express-v1", "ON_DEMAND"),
    _summary(MODEL, "ON_DEMAND", ("TEXT", "IMAGE")),
    _summary(PROFILE.removeprefix("us."), "INFERENCE_PROFILE", ("TEXT", "IMAGE")),
    _summary("cohere.rerank-v3-5:0", "ON_DEMAND"),
    _summary("anthropic.claude-v2", "ON_DEMAND", status="LEGACY"),
]
PROFILES = [
    {
        "inferenceProfileName": "US Claude Sonnet 4",
        "inferenceProfileArn": f"arn:aws:bedrock:us-east-1:123456789012:inference-profile/{PROFILE}",
        "inferenceProfileId": PROFILE,
        "models": [{"modelArn": _ARN + PROFILE.removeprefix("us.")}],
        "status": "ACTIVE",
        "type": "SYSTEM_DEFINED",
    }
]


def credentials() -> boto3.Session:
    """A session with credentials that no account has."""
    return boto3.Session(aws_access_key_id="peer", aws_secret_access_key="peer", region_name="us-east-1")


def frame(name: str, payload: dict[str, Any], kind: str = "event") -> bytes:
    """One event-stream frame: lengths, their sum, headers, payload, sum of it all."""
    headers = b"".join(
        struct.pack(">B", len(key)) + key.encode() + struct.pack(">BH", _STRING, len(value)) + value.encode()
        for key, value in (
            (f":{kind}-type", name),
            (":content-type", "application/json"),
            (":message-type", kind),
        )
    )
    body = orjson.dumps(payload)
    prelude = struct.pack(">II", 16 + len(headers) + len(body), len(headers))
    message = prelude + struct.pack(">I", crc32(prelude)) + headers + body
    return message + struct.pack(">I", crc32(message))


class FakeBedrock(ModelServer):
    """The peer. `stop_reason` replaces every scene's own."""

    def __init__(self) -> None:
        super().__init__()
        self.stop_reason: str | None = None
        self.exception_frame: str | None = None

    def routes(self) -> Iterable[tuple[str, str, Handler]]:
        yield "GET", "/foundation-models", self._models
        yield "GET", "/inference-profiles", self._profiles
        yield "POST", "/model/{model}/{operation}", self.counted(self._play)

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"modelSummaries": MODELS})

    async def _profiles(self, _: web.Request) -> web.Response:
        return web.json_response({"inferenceProfileSummaries": PROFILES})

    async def _play(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() | {"modelId": unquote(request.match_info["model"])}
        self.requests.append(body)
        complaint = _complaint(body)
        scene = Scene(status=400, error=complaint) if complaint else self._scene(body["messages"])
        headers = {"x-amzn-ErrorType": _ERROR_TYPES.get(scene.status, "")}
        refused = await self.refused(scene, {"message": scene.error}, headers)
        if refused is not None:
            return refused
        if request.match_info["operation"] == "converse":
            return await self._whole(request, scene)
        return await self._stream(request, scene)

    def _scene(self, messages: list[dict[str, Any]]) -> Scene:
        blocks = [block for message in messages if message["role"] == "user" for block in message["content"]]
        last = max(at for at, block in enumerate(blocks) if "text" in block)
        text = blocks[last]["text"]
        results = ["".join(part["text"] for part in b["toolResult"]["content"]) for b in blocks[last + 1 :]]
        return self.scene(text, results)

    def _reason(self, scene: Scene) -> str:
        return self.stop_reason or _STOP_REASONS[scene.reason]

    async def _whole(self, request: web.Request, scene: Scene) -> web.StreamResponse:
        content: list[dict[str, Any]] = [{"text": scene.text}] if scene.text else []
        content += [
            {"toolUse": {"toolUseId": f"use_{at}", "name": name, "input": value_of(raw)}}
            for at, (name, raw) in enumerate(scene.tools)
        ]
        answer = {
            "output": {"message": {"role": "assistant", "content": content}},
            "stopReason": self._reason(scene),
            "metrics": {"latencyMs": 1},
        } | ({"usage": _USAGE} if scene.usage else {})
        body = scene.body or orjson.dumps(answer)
        return await whole(request, scene, body)

    async def _stream(self, request: web.Request, scene: Scene) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/vnd.amazon.eventstream"})
        await response.prepare(request)
        frames = [scene.body * 4] if scene.body else _frames(scene, self._reason(scene))
        for number, event in enumerate(frames):
            await torn(response, event)
            if scene.pause and number == 1:
                await self.resume.wait()
            if self.exception_frame and number == 2:
                await response.write(frame(self.exception_frame, {"message": "slow down"}, "exception"))
                break
            if scene.cut and number == 2:
                break
        return await ended(request, scene, response)


_USAGE = {
    "inputTokens": INPUT_TOKENS,
    "outputTokens": OUTPUT_TOKENS,
    "totalTokens": INPUT_TOKENS + OUTPUT_TOKENS + CACHED_TOKENS,
    "cacheReadInputTokens": CACHED_TOKENS,
    "cacheWriteInputTokens": 0,
}


def _frames(scene: Scene, stop_reason: str) -> list[bytes]:
    frames = [frame("messageStart", {"role": "assistant"})]
    for piece in pieces_of(scene.text):
        frames.append(frame("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": piece}}))
    if scene.text:
        frames.append(frame("contentBlockStop", {"contentBlockIndex": 0}))
    for at, (name, raw) in enumerate(scene.tools, start=1 if scene.text else 0):
        use = {"toolUse": {"toolUseId": f"use_{at}", "name": name}}
        frames.append(frame("contentBlockStart", {"contentBlockIndex": at, "start": use}))
        for half in (raw[: len(raw) // 2], raw[len(raw) // 2 :]):
            delta = {"toolUse": {"input": half}}
            frames.append(frame("contentBlockDelta", {"contentBlockIndex": at, "delta": delta}))
        frames.append(frame("contentBlockStop", {"contentBlockIndex": at}))
    frames.append(frame("messageStop", {"stopReason": stop_reason}))
    if scene.usage:
        frames.append(frame("metadata", {"usage": _USAGE, "metrics": {"latencyMs": 1}}))
    return frames


def _complaint(body: dict[str, Any]) -> str | None:
    """What Bedrock says of a request that boto3 lets through and Bedrock does not; None when it is fine."""
    messages = body["messages"]
    if [message["role"] for message in messages] != ["user", "assistant"] * (len(messages) // 2) + ["user"]:
        return (
            "A conversation must start with a user message. Roles must alternate between user and assistant."
        )
    blocks = [block for message in messages for block in message["content"]]
    if any("text" in block and not block["text"].strip() for block in blocks):
        return "The text field in the ContentBlock object is blank."
    uses = [block["toolUse"] for block in blocks if "toolUse" in block]
    results = [block["toolResult"] for block in blocks if "toolResult" in block]
    if (uses or results) and "toolConfig" not in body:
        return "The toolConfig field must be defined when using toolUse and toolResult content blocks."
    if not all(_TOOL_NAME.fullmatch(use["name"]) and _CALL_ID.fullmatch(use["toolUseId"]) for use in uses):
        return (
            "Value at 'toolUse' failed to satisfy constraint: Member must satisfy regular expression pattern."
        )
    if [use["toolUseId"] for use in uses] != [result["toolUseId"] for result in results]:
        return "Expected toolResult blocks for the toolUse blocks of the previous turn."
    return None
