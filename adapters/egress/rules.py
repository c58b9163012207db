"""What may be asked for: the form of URLs, methods and headers, before any name is resolved."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping

from yarl import URL

from domain.custom_tool import is_reserved_header

URL_CHARS_MAX = 8_192
HEADER_COUNT_MAX = 64
HEADER_CHARS_MAX = 8_000
BODY_BYTES_MAX = 10_000_000
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# The only headers that follow a redirect to another origin: any other one may carry a secret.
_HEADERS_HARMLESS = frozenset({"accept", "accept-language", "content-type", "user-agent"})

_HOST_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*")
_ENDS_IN_A_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,200}")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_FORBIDDEN_IN_URL = re.compile(r"[\x00-\x20\x7f\\]")


class Refused(Exception):
    """The request may not be sent; the message is for operators, never for the caller."""


def checked_method(method: str) -> str:
    """One of METHODS."""
    if method not in METHODS:
        raise Refused("method")
    return method


def checked_url(text: str | URL) -> URL:
    """An http or https URL of a host in plain notation, without user information and fragment.

    Raises:
        Refused: anything that two readers might understand differently.
    """
    if isinstance(text, str):
        if len(text) > URL_CHARS_MAX or _FORBIDDEN_IN_URL.search(text):
            raise Refused("characters of the URL")
        try:
            text = URL(text)
        except ValueError as error:
            raise Refused("form of the URL") from error
    if text.scheme not in ("http", "https") or text.raw_user is not None or text.raw_password is not None:
        raise Refused("scheme or user information")
    if len(str(text)) > URL_CHARS_MAX or text.port is None:
        raise Refused("length or port of the URL")
    _check_host(text.raw_host or "")
    return text.with_fragment(None)


def joined(base: URL, location: str) -> URL:
    """The target of a redirect."""
    if len(location) > URL_CHARS_MAX or _FORBIDDEN_IN_URL.search(location):
        raise Refused("characters of the redirect")
    try:
        return checked_url(base.join(URL(location)))
    except ValueError as error:
        raise Refused("form of the redirect") from error


def checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers that cannot break out of their line, nor contradict those that the door sets."""
    if len(headers) > HEADER_COUNT_MAX or sum(map(len, headers.values())) > HEADER_CHARS_MAX:
        raise Refused("size of the headers")
    for name, value in headers.items():
        if header_fault(name, value) is not None:
            raise Refused("form of a header")
    return dict(headers)


def checked_body(body: bytes | None) -> bytes | None:
    """A body of a size that may be sent."""
    if body is not None and len(body) > BODY_BYTES_MAX:
        raise Refused("size of the body")
    return body


def header_fault(name: str, value: str) -> str | None:
    """Why a header may not be sent, None when it may."""
    if not _HEADER_NAME.fullmatch(name):
        return "is not the name of an HTTP header"
    if is_reserved_header(
        name
    ):  # A caller's value would change whom we talk to or how the message is framed.
        return "is set by the server itself"
    if not _HEADER_VALUE.fullmatch(value):
        return "has a value with line breaks or characters that HTTP does not carry"
    return None


def same_origin(before: URL, after: URL) -> bool:
    """Whether what was sent to `before` may be sent to `after`: also from http to https of the same host."""
    if before.origin() == after.origin():
        return True
    to_https = (before.scheme, before.port, after.scheme, after.port) == ("http", 80, "https", 443)
    return to_https and before.raw_host == after.raw_host


def harmless(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that may be shown to another origin."""
    return {name: value for name, value in headers.items() if name.lower() in _HEADERS_HARMLESS}


def _check_host(host: str) -> None:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        # Resolvers take 127.1, 0x7f.1, 017700000001 and 2130706433 for addresses (WHATWG URL, "ends in a number").
        if not _HOST_NAME.fullmatch(host) or _ENDS_IN_A_NUMBER.fullmatch(host):
            raise Refused("form of the host") from None
