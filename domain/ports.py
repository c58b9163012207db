"""Every outside need of the product, as interfaces on one page.

Adapters implement these; the domain and the processors know nothing else of the world.
All calls are asynchronous, may be cancelled at any await, and end within the deadline they are given.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, Protocol
from uuid import UUID

# --- chat models ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as the model sees it; `parameters` is a JSON Schema object."""

    name: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """A model's wish to run a tool. `arguments` is None when the model sent no valid JSON object; `raw` keeps what it sent."""

    id: str
    name: str
    arguments: dict[str, Any] | None
    raw: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One entry of the prompt. `tool_call_id` is set on role "tool" and answers the ToolRequest of that id."""

    role: Literal["user", "assistant", "tool"]
    content: str
    tool_requests: tuple[ToolRequest, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens of one model call. `source` says whether the provider counted them or we estimated them."""

    input: int
    output: int
    cache_read: int = 0
    cache_write: int = 0
    source: Literal["provider", "estimated"] = "provider"


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """What to ask a model. `idempotency_key` is the same on every attempt of the same call."""

    model: str
    system: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    max_output_tokens: int | None = None
    temperature: float | None = None
    timeout_s: float = 60.0
    idempotency_key: str = ""


FinishReason = Literal["stop", "tool_calls", "length", "content_filter"]


@dataclass(frozen=True, slots=True)
class ModelReply:
    """What a model answered. `ttft_ms`: time to the first token, when the call was streamed."""

    text: str
    tool_requests: tuple[ToolRequest, ...] = ()
    finish_reason: FinishReason = "stop"
    usage: TokenUsage = TokenUsage(0, 0, source="estimated")
    ttft_ms: int | None = None


class ModelErrorClass(StrEnum):
    """Why a model call gave no reply; `domain.turn` decides from it whether and when to ask again."""

    RATE_LIMITED = "rate_limited"  # 429 and throttling
    OVERLOADED = "overloaded"  # 5xx, 529, "model is loading"
    TIMEOUT = "timeout"  # no (complete) answer within timeout_s
    UNREACHABLE = "unreachable"  # connection refused, reset, DNS
    GARBAGE = "garbage"  # not the provider's wire format, invalid UTF-8, truncated stream
    TOO_LARGE = "too_large"  # a reply beyond the adapter's named limit
    CONTEXT_TOO_LONG = "context_too_long"  # the prompt does not fit the model
    REFUSED = "refused"  # 400-class: the provider will not serve this request as it stands
    UNAUTHORIZED = "unauthorized"  # 401/403: our credentials for the provider are wrong
    UNKNOWN_MODEL = "unknown_model"  # 404: the provider does not have this model
    WORKER_LOST = "worker_lost"  # the process that asked died before it recorded an answer


class ModelFault(Exception):
    """A model call failed. `str()` is a sentence a user understands, free of secrets and of prompt text."""

    def __init__(
        self, error_class: ModelErrorClass, sentence: str, retry_after_s: float | None = None
    ) -> None:
        super().__init__(sentence)
        self.error_class = error_class
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model this server can reach now. `name` is `provider:model`, unique on this server."""

    name: str
    provider: str
    display_name: str
    tools: bool
    vision: bool
    context_tokens: int | None
    price_class: Literal["free", "local", "paid"]


class ChatModel(Protocol):
    """A provider of chat models: Bedrock, Ollama, an OpenAI-compatible upstream, offline."""

    provider: str

    async def cards(self) -> Sequence[ModelCard]:
        """The models that can be reached now; empty when the provider does not answer (never raises)."""

    async def complete(
        self, request: ModelRequest, on_text: Callable[[str], None] | None = None
    ) -> ModelReply:
        """Ask once. With `on_text` the call is streamed and each piece of text is handed over as it comes.

        `request.model` is the part of the card's name after `provider:`. Never retries by itself.

        Raises:
            ModelFault: no reply; never anything else for what the provider did wrong.
        """

    async def close(self) -> None:
        """Let go of connections and threads."""


# --- tools ---------------------------------------------------------------------------------------------------


class Effect(StrEnum):
    """What running a tool twice would do. Only `UNSAFE` calls are never repeated by themselves after a crash."""

    PURE = "pure"
    IDEMPOTENT = "idempotent"
    UNSAFE = "unsafe"


ToolKind = Literal["builtin", "custom", "mcp", "connector"]


@dataclass(frozen=True, slots=True)
class ToolContext:
    """For whom and on whose clock a tool runs. `idempotency_key` is the same on every attempt of the call."""

    tenant_id: UUID
    agent_id: UUID
    tool_call_id: str
    idempotency_key: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool gave: text for the model (no U+0000), and metered units if it has its own meter."""

    text: str
    units: Mapping[str, int] = field(default_factory=dict)
    files: tuple[str, ...] = ()


class ToolFailed(Exception):
    """The tool gave no result; `str()` is a sentence the model can use. `error_class` is a short snake_case word."""

    def __init__(self, sentence: str, error_class: str = "tool_failed") -> None:
        super().__init__(sentence)
        self.error_class = error_class


class Tool(Protocol):
    """Something an agent can do besides talking."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    kind: ToolKind
    effect: Effect
    timeout_s: float

    def missing(self) -> str | None:
        """What this server lacks to run the tool, as a sentence with the fix; None when it can run."""

    def validate(self, arguments: Mapping[str, Any]) -> str | None:
        """Why these arguments do not fit, as one sentence naming the field; None when they do."""

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        """Run once, within `context.timeout_s`.

        Raises:
            ToolFailed: no result; never anything else for what the outside did wrong.
        """


# --- the one door out ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fetched:
    """An HTTP answer: final URL after redirects, status, lower-case headers, body within the limit."""

    url: str
    status: int
    headers: Mapping[str, str]
    body: bytes


class EgressDenied(Exception):
    """The request was denied or failed. One sentence for both, so that nobody can map a private network with it."""


class Egress(Protocol):
    """Every HTTP request to an address a user chose goes through here (SSRF guard; docs/reference/security)."""

    async def fetch(
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
        """Send one request, following at most five checked redirects, or answering with the first of them.

        Raises:
            EgressDenied: denied by policy, unreachable, too slow or too large.
        """


class WebhookSecrets(Protocol):
    """What messages to a caller's server are signed with, so that it knows them for ours."""

    def of(self, actor: str) -> bytes:
        """The secret of whoever made the request that a message answers: always the same, and nobody else's."""


# --- secrets and personal data -----------------------------------------------------------------------------------


class Vault(Protocol):
    """Keeps secrets: written once by ingress, named by reference ever after."""

    async def put(self, tenant_id: UUID, name: str, secret: str) -> str:
        """Store `secret` under `name` (replacing what was there) and return its `secret_ref`."""

    async def get(self, tenant_id: UUID, secret_ref: str) -> str | None:
        """The secret, or None when it was removed."""

    async def remove(self, tenant_id: UUID, secret_ref: str) -> None:
        """Forget it for ever."""

    async def remove_all(self, tenant_id: UUID) -> None:
        """Forget every secret of a tenant for ever, and what they were encrypted with."""


class SubjectErased(Exception):
    """The subject's key was destroyed: nothing new may be sealed for it."""


class KeyNotLoaded(Exception):
    """A bug of the caller: `KeyRing.ensure` was not asked for this subject before."""


class KeyRing(Protocol):
    """Data keys, one per subject; destroying one makes its subject's personal content unreadable for ever."""

    async def ensure(self, subject_ids: Sequence[UUID]) -> None:
        """Have a key at hand for each of the subjects; creates those that never existed."""

    def seal(self, subject_id: UUID, plaintext: bytes, aad: bytes) -> bytes:
        """Encrypt under the subject's key, which `ensure` has loaded.

        Raises:
            SubjectErased: the key was destroyed.
            KeyNotLoaded: `ensure` was not asked before.
        """

    def open(self, subject_id: UUID, sealed: bytes, aad: bytes) -> bytes | None:
        """Decrypt; None when the key was destroyed.

        Raises:
            KeyNotLoaded: `ensure` was not asked before.
        """

    async def destroy(self, subject_id: UUID) -> None:
        """Forget the key for ever, in this process and in the store."""


class Busy(Exception):
    """As much of this work as may wait is waiting already; it was not begun, and may be asked again soon."""


class Passwords(Protocol):
    """Turns passwords into hashes that are slow to guess from. Each call is a twentieth of a second of work."""

    async def hash(self, password: str) -> str:
        """A hash to store.

        Raises:
            Busy: too many are waiting.
        """

    async def verify(self, password_hash: str | None, password: str) -> bool:
        """Whether the password is the one hashed; takes as long for None, the hash of nobody.

        Raises:
            Busy: too many are waiting.
        """


class ObjectStore(Protocol):
    """Large immutable bytes by the name given; writing the same name twice is harmless."""

    async def put(self, key: str, content: bytes) -> None:
        """Store durably before returning."""

    async def get(self, key: str) -> bytes | None:
        """The bytes, or None."""

    async def delete(self, key: str) -> None:
        """Remove; deleting what is not there is harmless."""


# --- what others may read ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PublicMessage:
    """A message for a public topic. Those with the same topic and key keep their order; `value` None deletes the key."""

    topic: str
    key: str
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()


class Publisher(Protocol):
    """Hands messages to a broker, each at least once, in the order in which they were given."""

    async def send(self, messages: Sequence[PublicMessage]) -> Awaitable[None]:
        """Take the messages; returns at once, or when there is room for them again.

        What it returns can be awaited: it ends when the broker has acknowledged them all. It takes as long as the
        broker is away; whoever stops waiting leaves it open whether they were published.
        """


# --- time ------------------------------------------------------------------------------------------------------

Clock = Callable[[], datetime]

# --- who is calling ----------------------------------------------------------------------------------------------

KeyKind = Literal["user", "agent"]


class ApiKeys(Protocol):
    """Makes API keys and recognises them; knows the secret that their digests are made with."""

    def mint(self, kind: KeyKind) -> tuple[str, str]:
        """A new key id, and the whole key, which is shown once."""

    def parse(self, text: str) -> tuple[KeyKind, str, str] | None:
        """Kind, key id and secret, or None for anything that `mint` cannot have given."""

    def digest(self, key: str) -> str:
        """What is stored of a key, as hex."""

    def matches(self, key: str, stored_digest: str | None) -> bool:
        """Whether the digest is the key's; takes as long for None, the digest of nobody."""


@dataclass(frozen=True, slots=True)
class Login:
    """How a person logs in. The address is not kept here in the clear."""

    user_id: UUID
    password_hash: str


class Logins(Protocol):
    """Addresses and password hashes: outside the log, because they change and must be forgotten."""

    async def reserve(self, email: str, login: Login) -> Login:
        """Take the address for this person; returns who has it, which is somebody else when it was taken."""

    async def find(self, email: str) -> Login | None:
        """Who logs in with this address, upper and lower case being the same."""

    async def change_password(self, user_id: UUID, password_hash: str) -> None:
        """Another password from now on."""

    async def forget(self, user_id: UUID) -> None:
        """Free the address."""


@dataclass(frozen=True, slots=True)
class Session:
    """A browser that is logged in. `digest` is that of its token, which nobody keeps."""

    digest: bytes
    user_id: UUID
    expires_at: datetime


class Sessions(Protocol):
    """Who is logged in, by the SHA-256 of the token in the cookie."""

    async def begin(self, session: Session) -> None:
        """Note a login."""

    async def find(self, digest: bytes, now: datetime) -> Session | None:
        """The session, unless it has ended."""

    async def end(self, digest: bytes) -> None:
        """Log out; ending what has ended is harmless."""

    async def end_all(self, user_id: UUID) -> None:
        """Log a person out everywhere."""


class KeyUses(Protocol):
    """When API keys were last used, to the minute."""

    async def note(self, used_at: Mapping[str, datetime]) -> None:
        """Note the last use of each key id; an earlier one than is known changes nothing."""

    async def last(self, key_ids: Sequence[str]) -> dict[str, datetime]:
        """The last use of each, of those that were ever used."""
