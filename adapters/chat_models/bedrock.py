"""Chat models of AWS Bedrock, through Converse and ConverseStream.

boto3 blocks, so every call runs in a thread of the adapter's own, bounded pool. A cancelled call frees its caller at
once; its thread ends at the next frame of the stream, or when the read times out.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from typing import Any

import boto3
from botocore import exceptions as aws
from botocore.config import Config
from botocore.eventstream import ParserError
from botocore.parsers import ResponseParserError
from urllib3 import exceptions as urllib3

from adapters.chat_models.limits import (
    CARDS_MAX,
    CARDS_TIMEOUT_S,
    class_of_status,
    clean_text,
    fault,
    provider_words,
    retry_after_s,
    sent_arguments,
    wire_name,
)
from adapters.chat_models.reply import ReplyParts
from domain import ports

LABEL = "AWS Bedrock"
THREADS_MAX = 32
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 120.0
PROFILE_PAGES_MAX = 10
EMPTY = "(empty)"
"""Bedrock refuses blank text blocks."""

_FINISH_REASONS: dict[str, ports.FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "guardrail_intervened": "content_filter",
    "content_filtered": "content_filter",
}
_CLASSES = {
    "ThrottlingException": ports.ModelErrorClass.RATE_LIMITED,
    "TooManyRequestsException": ports.ModelErrorClass.RATE_LIMITED,
    "ServiceQuotaExceededException": ports.ModelErrorClass.RATE_LIMITED,
    "ModelNotReadyException": ports.ModelErrorClass.OVERLOADED,
    "ModelErrorException": ports.ModelErrorClass.OVERLOADED,
    "ModelStreamErrorException": ports.ModelErrorClass.OVERLOADED,
    "InternalServerException": ports.ModelErrorClass.OVERLOADED,
    "ServiceUnavailableException": ports.ModelErrorClass.OVERLOADED,
    "ModelTimeoutException": ports.ModelErrorClass.TIMEOUT,
    "ResourceNotFoundException": ports.ModelErrorClass.UNKNOWN_MODEL,
    "AccessDeniedException": ports.ModelErrorClass.UNAUTHORIZED,
    "UnrecognizedClientException": ports.ModelErrorClass.UNAUTHORIZED,
    "InvalidSignatureException": ports.ModelErrorClass.UNAUTHORIZED,
    "IncompleteSignatureException": ports.ModelErrorClass.UNAUTHORIZED,
    "MissingAuthenticationTokenException": ports.ModelErrorClass.UNAUTHORIZED,
    "ExpiredTokenException": ports.ModelErrorClass.UNAUTHORIZED,
}
# The API does not say which models take tools; these families do not ("Supported models and model features" in the
# Bedrock user guide), and newer ones do.
_WITHOUT_TOOLS = re.compile(
    r"amazon\.titan|anthropic\.claude-(?:v2|instant)|meta\.llama(?:2|3-)|mistral\.(?:mistral-7b|mixtral)"
    r"|cohere\.command-(?:text|light)|ai21\.(?:j2|jamba-instruct)|deepseek\.r1"
)
_NOT_FOR_CHAT = re.compile(r"embed|rerank|canvas|reel|sonic|stability\.")
# Other models refuse a request with a cache point.
_WITH_CACHE = re.compile(
    r"anthropic\.claude-(?:3-7|3-5-haiku|opus-|sonnet-|haiku-)|amazon\.nova-(?:micro|lite|pro|premier)"
)
# What to offer first where nobody chose: a model every account may use, that takes tools, and is cheap.
_FIRST = re.compile(r"amazon\.nova-(?:2-)?lite")
_CALL_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")


async def find_bedrock(region: str | None = None, endpoint_url: str | None = None) -> Bedrock | None:
    """Bedrock, if boto3's own chain has a region and credentials; None otherwise. May take seconds."""

    def look() -> Bedrock | None:
        session = boto3.Session(region_name=region)
        if not session.region_name or session.get_credentials() is None:
            return None
        found = Bedrock(session.region_name, endpoint_url, session=session)
        found.prepare()
        return found

    try:
        return await asyncio.to_thread(look)
    except aws.BotoCoreError:
        return None


class Bedrock:
    """AWS Bedrock in one region; `session` brings the credentials, else boto3's own chain does."""

    provider = "bedrock"

    def __init__(
        self,
        region: str,
        endpoint_url: str | None = None,
        *,
        session: Any = None,
        threads: int = THREADS_MAX,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        self._region = region
        self._endpoint_url = endpoint_url
        self._session = session
        self._read_timeout_s = read_timeout_s
        self._threads = threads
        self._making = threading.Lock()
        self._clients: dict[str, Any] = {}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bedrock")
        # Apart, so that the list of models is there when every other thread is waiting for one.
        self._catalogue = ThreadPoolExecutor(1, thread_name_prefix="bedrock-catalogue")

    def prepare(self) -> None:
        """Make the clients now: boto3 reads megabytes of service descriptions for the first of each. Blocks."""
        self._client("bedrock-runtime")
        self._client("bedrock")

    def _client(self, service: str) -> Any:
        # Making a client is not thread-safe in boto3; using one is.
        with self._making:
            if service not in self._clients:
                session = self._session or boto3.Session(region_name=self._region)
                config = Config(
                    connect_timeout=CONNECT_TIMEOUT_S,
                    read_timeout=self._read_timeout_s if service == "bedrock-runtime" else CARDS_TIMEOUT_S,
                    retries={"total_max_attempts": 1},
                    max_pool_connections=self._threads,
                )
                self._clients[service] = session.client(
                    service, region_name=self._region, endpoint_url=self._endpoint_url, config=config
                )
            return self._clients[service]

    async def cards(self) -> Sequence[ports.ModelCard]:
        """The region's text models and inference profiles; empty when Bedrock does not answer in time."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CARDS_TIMEOUT_S):
                return await loop.run_in_executor(self._catalogue, self._list)
        except (TimeoutError, aws.BotoCoreError, aws.ClientError):
            return ()

    def _list(self) -> list[ports.ModelCard]:
        client = self._client("bedrock")
        listed = client.list_foundation_models(byOutputModality="TEXT").get("modelSummaries", ())
        models = {model["modelId"]: model for model in listed[:CARDS_MAX] if _can_chat(model)}
        cards = [
            _card(name, model.get("modelName") or name, model)
            for name, model in models.items()
            if "ON_DEMAND" in model.get("inferenceTypesSupported", ())
        ]
        for profile in self._profiles(client):
            arns = [member.get("modelArn", "") for member in profile.get("models", ())]
            model = next((models[name] for arn in arns if (name := arn.rpartition("/")[2]) in models), None)
            if model is not None and profile.get("status") == "ACTIVE":
                cards.append(_card(profile["inferenceProfileId"], profile["inferenceProfileName"], model))
        return sorted(cards, key=lambda card: (not _FIRST.search(card.name), card.name))

    def _profiles(self, client: Any) -> list[Any]:
        profiles: list[Any] = []
        token: dict[str, str] = {}
        try:
            for _ in range(PROFILE_PAGES_MAX):
                page = client.list_inference_profiles(typeEquals="SYSTEM_DEFINED", maxResults=100, **token)
                profiles += page.get("inferenceProfileSummaries", ())
                if not (following := page.get("nextToken")):
                    break
                token = {"nextToken": following}
        except aws.ClientError:
            # Listing profiles is a right of its own; without it the models themselves remain.
            return profiles
        return profiles

    async def complete(
        self, request: ports.ModelRequest, on_text: Callable[[str], None] | None = None
    ) -> ports.ModelReply:
        """Ask once; see `domain.ports.ChatModel.complete`."""
        loop = asyncio.get_running_loop()
        over = threading.Event()

        def deliver(piece: str) -> None:
            if on_text is not None and not over.is_set():
                on_text(piece)

        def hand_over(piece: str) -> None:
            # The loop runs what threads give it in order: every piece is delivered before the reply is.
            loop.call_soon_threadsafe(deliver, piece)

        parts = ReplyParts(request, LABEL, hand_over if on_text is not None else None)
        ask = partial(self._ask, request, parts, over if on_text is not None else None)
        try:
            async with asyncio.timeout(request.timeout_s):
                return await loop.run_in_executor(self._pool, ask)
        except TimeoutError as timeout:
            raise fault(ports.ModelErrorClass.TIMEOUT, LABEL) from timeout
        finally:
            over.set()

    def _ask(
        self, request: ports.ModelRequest, parts: ReplyParts, over: threading.Event | None
    ) -> ports.ModelReply:
        """In a thread: Converse, or ConverseStream until `over` is set."""
        try:
            client = self._client("bedrock-runtime")
            if over is None:
                return _read_whole(client.converse(**_arguments(request)), parts)
            stream = client.converse_stream(**_arguments(request))["stream"]
            try:
                return _read_stream(stream, parts, over)
            finally:
                stream.close()
        except ports.ModelFault:
            raise
        except Exception as error:
            # boto3's contract names no base class for what its HTTP library, parser and credentials raise.
            raise _fault_of(error, request) from error

    async def close(self) -> None:
        """Let go of threads and connections; a thread that is waiting for Bedrock ends by its timeout."""
        for pool in (self._pool, self._catalogue):
            pool.shutdown(wait=False, cancel_futures=True)
        for client in self._clients.values():
            client.close()


def _arguments(request: ports.ModelRequest) -> dict[str, Any]:
    """The keyword arguments of Converse."""
    arguments: dict[str, Any] = {
        "modelId": request.model,
        "messages": _wire_messages(request.messages, with_tools=bool(request.tools)),
    }
    if request.system.strip():
        arguments["system"] = [{"text": request.system}]
        if _WITH_CACHE.search(request.model):
            # Tools come before the system prompt in what is cached, so that one point covers both.
            arguments["system"].append({"cachePoint": {"type": "default"}})
    if request.tools:
        arguments["toolConfig"] = {
            "tools": [
                {
                    "toolSpec": {
                        "name": tool.name,
                        "description": tool.description or tool.name,
                        "inputSchema": {"json": dict(tool.parameters)},
                    }
                }
                for tool in request.tools
            ]
        }
    inference: dict[str, Any] = {}
    if request.max_output_tokens is not None:
        inference["maxTokens"] = request.max_output_tokens
    if request.temperature is not None:
        inference["temperature"] = request.temperature
    return arguments | ({"inferenceConfig": inference} if inference else {})


def _wire_messages(messages: Iterable[ports.Message], with_tools: bool) -> list[dict[str, Any]]:
    """The history as Bedrock wants it: the user first, roles in turn, no blank text."""
    names: dict[str, str] = {}
    wire: list[dict[str, Any]] = []
    for message in messages:
        role = "assistant" if message.role == "assistant" else "user"
        blocks = _blocks(message, names, with_tools)
        if wire and wire[-1]["role"] == role:
            wire[-1]["content"] += blocks
        else:
            wire.append({"role": role, "content": blocks})
    if not wire or wire[0]["role"] == "assistant":
        wire.insert(0, {"role": "user", "content": []})
    for entry in wire:
        entry["content"] = entry["content"] or [{"text": EMPTY}]
    return wire


def _blocks(message: ports.Message, names: dict[str, str], with_tools: bool) -> list[dict[str, Any]]:
    """A message's content blocks. Without a toolConfig Bedrock refuses tool blocks: then they are told as text."""
    text = message.content if message.content.strip() else ""
    if message.role == "tool":
        call_id = message.tool_call_id or ""
        if not with_tools:
            return [{"text": f"[Result of {names.get(call_id, 'a tool')}] {text or EMPTY}"}]
        return [{"toolResult": {"toolUseId": _wire_id(call_id), "content": [{"text": text or EMPTY}]}}]
    blocks: list[dict[str, Any]] = [{"text": text}] if text else []
    for asked in message.tool_requests:
        names[asked.id] = asked.name
        blocks.append(_tool_use(asked) if with_tools else {"text": f"[Asked for {asked.name}]"})
    return blocks


def _tool_use(asked: ports.ToolRequest) -> dict[str, Any]:
    return {
        "toolUse": {
            "toolUseId": _wire_id(asked.id),
            "name": wire_name(asked.name),
            "input": sent_arguments(asked),
        }
    }


def _wire_id(call_id: str) -> str:
    """The id as Bedrock accepts it; another provider may have given one that it does not."""
    if _CALL_ID.fullmatch(call_id):
        return call_id
    return "call_" + blake2b(call_id.encode(), digest_size=12).hexdigest()


def _read_whole(answer: dict[str, Any], parts: ReplyParts) -> ports.ModelReply:
    for block in answer["output"]["message"]["content"]:
        if "text" in block:
            parts.add_text(block["text"])
        elif "toolUse" in block:
            use = block["toolUse"]
            parts.add_tool(use["toolUseId"], use["name"], use["input"])
    return parts.finished(_reason_of(answer["stopReason"]), _usage_of(answer.get("usage")))


def _read_stream(
    stream: Iterable[dict[str, Any]], parts: ReplyParts, over: threading.Event
) -> ports.ModelReply:
    reason: ports.FinishReason | None = None
    usage: ports.TokenUsage | None = None
    for event in stream:
        if over.is_set():
            raise fault(ports.ModelErrorClass.TIMEOUT, LABEL)
        match event:
            case {"contentBlockStart": {"contentBlockIndex": int(index), "start": {"toolUse": use}}}:
                parts.add_tool_piece(index, use["toolUseId"], use["name"], "")
            case {"contentBlockDelta": {"delta": {"text": str(text)}}}:
                parts.add_text(text)
            case {
                "contentBlockDelta": {
                    "contentBlockIndex": int(index),
                    "delta": {"toolUse": {"input": str(raw)}},
                }
            }:
                parts.add_tool_piece(index, "", "", raw)
            case {"messageStop": {"stopReason": str(stop_reason)}}:
                reason = _reason_of(stop_reason)
            case {"metadata": {"usage": counts}}:
                usage = _usage_of(counts)
            case _:
                # Reasoning, citations, the ends of blocks and what does not exist yet: nothing of the reply.
                continue
    if reason is None:
        raise fault(ports.ModelErrorClass.GARBAGE, LABEL, "the stream ended before the reply did")
    return parts.finished(reason, usage)


def _reason_of(stop_reason: str) -> ports.FinishReason:
    """Ours for Bedrock's; one that does not exist yet is a stop."""
    if stop_reason.startswith("malformed_"):
        raise fault(ports.ModelErrorClass.GARBAGE, LABEL, "the model's output is malformed")
    return _FINISH_REASONS.get(stop_reason, "stop")


def _usage_of(counts: dict[str, int] | None) -> ports.TokenUsage | None:
    """Bedrock's five numbers; the total is the sum of the others, and input tokens leave out the cached ones."""
    if not counts or "inputTokens" not in counts:
        return None
    return ports.TokenUsage(
        input=counts["inputTokens"],
        output=counts.get("outputTokens", 0),
        cache_read=counts.get("cacheReadInputTokens", 0),
        cache_write=counts.get("cacheWriteInputTokens", 0),
    )


def _fault_of(error: Exception, request: ports.ModelRequest) -> ports.ModelFault:
    if isinstance(error, aws.ClientError):
        return _refusal(error, request)
    if isinstance(error, aws.ReadTimeoutError | urllib3.ReadTimeoutError):
        return fault(ports.ModelErrorClass.TIMEOUT, LABEL)
    if isinstance(error, aws.HTTPClientError | aws.ConnectionError | urllib3.HTTPError | OSError):
        return fault(ports.ModelErrorClass.UNREACHABLE, LABEL)
    if isinstance(error, aws.ParamValidationError):
        return fault(ports.ModelErrorClass.REFUSED, LABEL, "the request does not have the form it takes")
    if isinstance(error, ResponseParserError | ParserError | ValueError | LookupError):
        return fault(ports.ModelErrorClass.GARBAGE, LABEL)
    if isinstance(error, aws.BotoCoreError):
        # What is left of botocore's own are missing, partial and expired credentials.
        return fault(ports.ModelErrorClass.UNAUTHORIZED, LABEL)
    raise error


def _refusal(error: Any, request: ports.ModelRequest) -> ports.ModelFault:
    """The fault of an error answer or of an exception frame, which spells its first letter small."""
    said = error.response.get("Error", {})
    code, message = str(said.get("Code", "")), str(said.get("Message", ""))
    metadata = error.response.get("ResponseMetadata", {})
    name = code[:1].upper() + code[1:]
    error_class = _CLASSES.get(name) or class_of_status(
        int(metadata.get("HTTPStatusCode", 400)), code, message
    )
    if error_class is ports.ModelErrorClass.REFUSED and "model identifier is invalid" in message:
        error_class = ports.ModelErrorClass.UNKNOWN_MODEL
    headers = {key.title(): value for key, value in metadata.get("HTTPHeaders", {}).items()}
    return fault(error_class, LABEL, provider_words(message, request), retry_after_s(headers))


def _can_chat(model: dict[str, Any]) -> bool:
    return (
        "TEXT" in model.get("inputModalities", ())
        and model.get("modelLifecycle", {}).get("status", "ACTIVE") == "ACTIVE"
        and not _NOT_FOR_CHAT.search(model["modelId"])
    )


def _card(name: str, title: str, model: dict[str, Any]) -> ports.ModelCard:
    return ports.ModelCard(
        name=f"{Bedrock.provider}:{clean_text(name)}",
        provider=Bedrock.provider,
        display_name=clean_text(title),
        tools=not _WITHOUT_TOOLS.search(model["modelId"]),
        vision="IMAGE" in model.get("inputModalities", ()),
        context_tokens=None,
        price_class="paid",
    )
