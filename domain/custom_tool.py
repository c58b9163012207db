"""Tools that users define themselves: one HTTP request each (SOP §4.1, at most 10 an agent).

A definition is a JSON object: `name`, `description`, `method`, `url` (with {placeholders} in path and query),
`parameters` (a JSON Schema object), `headers` (name to text, or to {"secret_ref": "vault:…"}), `timeout_s` and
`idempotent`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

# SOP §3.3, in its order. A custom tool cannot take one of these names.
DEFAULT_TOOL_NAMES = (
    *("web_search", "url_resolver", "code_executor", "transcription", "text_to_image", "text_to_video"),
    *("image_to_video", "text_to_speech", "combine_video_audio", "svg_diagram", "ocr", "summarization"),
    *("question_answering", "translation", "read_file", "write_file"),
)
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
DESCRIPTION_CHARS_MAX = 1_024
URL_CHARS_MAX = 2_000
HEADER_COUNT_MAX = 20
HEADER_VALUE_CHARS_MAX = 4_000
TIMEOUT_S_DEFAULT = 15
TIMEOUT_S_MAX = 30
PARAMETERS_CHARS_MAX = 16_384
PARAMETERS_DEPTH_MAX = 12
PARAMETER_COUNT_MAX = 40

_FIELDS = ("name", "description", "method", "url", "parameters", "headers", "timeout_s", "idempotent")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_PARAMETER_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_.-]{0,63})\}")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_SECRET_REF = re.compile(r"vault:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_URL_CHARS = re.compile(r"[^\x00-\x20\x7f\\<>\"]+")
# They frame the message or name the other side; no user sets them.
HEADERS_RESERVED = frozenset(
    {
        *(
            "host",
            "content-length",
            "transfer-encoding",
            "connection",
            "keep-alive",
            "te",
            "trailer",
            "upgrade",
        ),
        *("expect", "accept-encoding", "http2-settings", "forwarded", "via"),
    }
)
_IDEMPOTENCY_KEY = "idempotency-key"  # Follows from `idempotent`.


class Fault(NamedTuple):
    """What is wrong with a definition: a JSON pointer to the place, a stable code, a sentence."""

    pointer: str
    code: str
    message: str


def validate_definition(definition: Mapping[str, Any]) -> list[Fault]:
    """Everything that is wrong with the definition; empty when an agent may have it."""
    return [
        *(
            Fault(f"/{_escaped(key)}", "unknown_field", f"{key!r} is not a field of a tool.")
            for key in definition
            if key not in _FIELDS
        ),
        *_name_faults(definition.get("name")),
        *_description_faults(definition.get("description")),
        *_method_faults(definition),
        *_url_faults(definition.get("url"), definition.get("parameters")),
        *_parameters_faults(definition.get("parameters", {"type": "object"})),
        *_headers_faults(definition.get("headers", {})),
        *_timeout_faults(definition.get("timeout_s", TIMEOUT_S_DEFAULT)),
    ]


def placeholders(url: str) -> list[str]:
    """The names of the arguments that the URL takes, in order of appearance."""
    return _PLACEHOLDER.findall(url)


def is_reserved_header(name: str) -> bool:
    """Whether only the server itself may set the header."""
    return name.lower() in HEADERS_RESERVED or name.lower().startswith("proxy-")


def secret_refs(definition: Mapping[str, Any]) -> dict[str, str]:
    """The vault references of the secret headers, by header name."""
    headers: Mapping[str, Any] = definition.get("headers") or {}
    return {name: value["secret_ref"] for name, value in headers.items() if isinstance(value, Mapping)}


def _name_faults(name: Any) -> Iterator[Fault]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        yield Fault(
            "/name", "invalid_name", "A name is 1 to 64 characters a-z, 0-9 and _, beginning with a letter."
        )
    elif name in DEFAULT_TOOL_NAMES or name.startswith("mcp_"):
        yield Fault("/name", "reserved_name", f"{name!r} is the name of another kind of tool.")


def _description_faults(description: Any) -> Iterator[Fault]:
    if not isinstance(description, str) or not 0 < len(description.strip()) <= DESCRIPTION_CHARS_MAX:
        message = f"Describe in 1 to {DESCRIPTION_CHARS_MAX} characters when the model should use the tool."
        yield Fault("/description", "invalid_description", message)


def _method_faults(definition: Mapping[str, Any]) -> Iterator[Fault]:
    if definition.get("method") not in METHODS:
        yield Fault("/method", "invalid_method", f"The method is one of {', '.join(METHODS)}.")
    if not isinstance(definition.get("idempotent", False), bool):
        yield Fault("/idempotent", "invalid_type", "idempotent is true or false.")


def _url_faults(url: Any, parameters: Any) -> Iterator[Fault]:
    if not isinstance(url, str) or len(url) > URL_CHARS_MAX or not _URL_CHARS.fullmatch(url):
        yield Fault("/url", "invalid_url", f"The URL has up to {URL_CHARS_MAX} characters and no spaces.")
        return
    parts = _split(url)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        yield Fault("/url", "invalid_url", "The URL begins with http:// or https:// and a host.")
        return
    if "@" in parts.netloc:
        yield Fault(
            "/url", "credentials_in_url", "Credentials belong in a header, where they are kept secret."
        )
    if "{" in parts.netloc or "}" in parts.netloc:
        yield Fault(
            "/url", "placeholder_in_host", "A placeholder may be in the path and the query, not in the host."
        )
    if "{" in parts.fragment or re.search(r"[{}]", _PLACEHOLDER.sub("", url)):
        yield Fault(
            "/url", "invalid_placeholder", "A placeholder is the name of a parameter in braces: {city}."
        )
    required = parameters.get("required", []) if isinstance(parameters, Mapping) else []
    for name in placeholders(url):
        if not isinstance(required, list) or name not in required:
            message = f"The URL needs {name!r}, which is not among the required parameters."
            yield Fault("/url", "unknown_placeholder", message)


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return parts


def _parameters_faults(parameters: Any) -> Iterator[Fault]:
    if not isinstance(parameters, Mapping) or parameters.get("type") != "object":
        yield Fault(
            "/parameters", "invalid_parameters", 'The parameters are a JSON Schema with "type": "object".'
        )
        return
    if _depth(parameters) > PARAMETERS_DEPTH_MAX:
        yield Fault("/parameters", "too_deep", f"The parameters nest at most {PARAMETERS_DEPTH_MAX} deep.")
        return
    if len(json.dumps(parameters, default=str)) > PARAMETERS_CHARS_MAX:
        yield Fault(
            "/parameters", "too_large", f"The parameters have at most {PARAMETERS_CHARS_MAX} characters."
        )
    properties = parameters.get("properties", {})
    if not isinstance(properties, Mapping) or len(properties) > PARAMETER_COUNT_MAX:
        yield Fault(
            "/parameters/properties", "invalid_properties", f"At most {PARAMETER_COUNT_MAX} named properties."
        )
        return
    for name in properties:
        if not isinstance(name, str) or not _PARAMETER_NAME.fullmatch(name):
            message = f"{str(name)[:80]!r} is not letters, digits, _ - and . beginning with a letter or _."
            yield Fault(f"/parameters/properties/{_escaped(name)}", "invalid_parameter_name", message)
    required = parameters.get("required", [])
    if not isinstance(required, list) or not all(
        isinstance(name, str) and name in properties for name in required
    ):
        yield Fault("/parameters/required", "unknown_parameter", "required lists names of properties.")


def _headers_faults(headers: Any) -> Iterator[Fault]:
    if not isinstance(headers, Mapping) or len(headers) > HEADER_COUNT_MAX:
        yield Fault(
            "/headers", "invalid_headers", f"Headers are an object with at most {HEADER_COUNT_MAX} names."
        )
        return
    seen: set[str] = set()
    for name, value in headers.items():
        pointer = f"/headers/{_escaped(name)}"
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            yield Fault(pointer, "invalid_header_name", "This is not the name of an HTTP header.")
            continue
        if is_reserved_header(name) or name.lower() == _IDEMPOTENCY_KEY:
            yield Fault(pointer, "reserved_header", f"{name} is set by the server itself.")
        if name.lower() in seen:
            yield Fault(pointer, "duplicate_header", f"{name} is there twice.")
        seen.add(name.lower())
        yield from _header_value_faults(pointer, value)


def _header_value_faults(pointer: str, value: Any) -> Iterator[Fault]:
    # No message repeats a value: it may be a secret.
    if isinstance(value, Mapping):
        ref = value.get("secret_ref")
        if set(value) != {"secret_ref"} or not isinstance(ref, str) or not _SECRET_REF.fullmatch(ref):
            yield Fault(pointer, "invalid_secret_ref", 'A secret header is {"secret_ref": "vault:…"}.')
    elif (
        not isinstance(value, str)
        or len(value) > HEADER_VALUE_CHARS_MAX
        or not _HEADER_VALUE.fullmatch(value)
    ):
        message = f"A value is text on one line of at most {HEADER_VALUE_CHARS_MAX} Latin-1 characters."
        yield Fault(pointer, "invalid_header_value", message)


def _timeout_faults(timeout_s: Any) -> Iterator[Fault]:
    number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    if not number or not 0 < timeout_s <= TIMEOUT_S_MAX:
        yield Fault(
            "/timeout_s", "invalid_timeout", f"The time limit is more than 0 and at most {TIMEOUT_S_MAX} s."
        )


def _depth(value: Any) -> int:
    """How deep the value nests, as far as it matters; without recursion, since the value is a stranger's."""
    level: list[Any] = [value]
    for depth in range(PARAMETERS_DEPTH_MAX + 1):
        level = [
            child
            for each in level
            if isinstance(each, Mapping | list)
            for child in (each.values() if isinstance(each, Mapping) else each)
        ]
        if not level:
            return depth
    return PARAMETERS_DEPTH_MAX + 1


def _escaped(key: Any) -> str:
    """A key as a part of a JSON pointer (RFC 6901 §3)."""
    return str(key)[:80].replace("~", "~0").replace("/", "~1")
