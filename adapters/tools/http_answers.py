"""What an HTTP answer means to a model: its text, or the sentence that says why there is none."""

from __future__ import annotations

import re
from email.message import Message
from http import HTTPStatus

from adapters.tools.texts import decoded
from domain.ports import Fetched, ToolFailed

_TEXT_TYPES = re.compile(
    r"text/.*|application/(.*\+)?(json|xml|yaml|x-yaml|javascript|x-javascript|graphql|x-ndjson|toml|sql|rtf)"
    r"|application/x-www-form-urlencoded|image/svg\+xml"
)
_META_CHARSET = re.compile(
    rb"<meta[^>]{0,200}charset\s{0,9}=\s{0,9}[\"']?([A-Za-z0-9_-]{1,40})", re.IGNORECASE
)
_SNIFFED_BYTES = 4_096


def status_text(status: int) -> str:
    """A status as people read it: `404 Not Found`."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def check_status(answer: Fetched, who: str, detail: str = "") -> None:
    """Accept 2xx only.

    Raises:
        ToolFailed: any other status, named with what may be done about it.
    """
    if 200 <= answer.status < 300:
        return
    hint = {401: "it wants credentials", 403: "it refuses access", 404: "there is nothing at this address"}
    hint |= {429: "too many requests, try again later"}
    reason = hint.get(answer.status, "it has a problem, try again later" if answer.status >= 500 else "")
    sentence = f"{who} answered {status_text(answer.status)}" + (f": {reason}" if reason else "")
    raise ToolFailed(sentence + "." + (f" {detail}" if detail else ""), f"http_{answer.status}")


def content_type_of(answer: Fetched) -> tuple[str, str | None]:
    """The media type in lower case, empty when unknown, and the character set if one is given."""
    message = Message()
    message["content-type"] = answer.headers.get("content-type", "")
    media_type = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    charset = message.get_content_charset()
    return media_type, charset


def is_html(answer: Fetched) -> bool:
    """Whether the body is an HTML page, by its type or, without one, by its beginning."""
    media_type, _ = content_type_of(answer)
    if media_type:
        return media_type in ("text/html", "application/xhtml+xml")
    return answer.body[:_SNIFFED_BYTES].lstrip().lower().startswith((b"<!doctype html", b"<html"))


def text_of(answer: Fetched, who: str) -> str:
    """The body as text.

    Raises:
        ToolFailed: it is a picture, an archive or another thing without text.
    """
    media_type, charset = content_type_of(answer)
    start = answer.body[:_SNIFFED_BYTES]
    wide = charset is not None and charset.startswith(("utf-16", "utf-32"))
    binary = not _TEXT_TYPES.fullmatch(media_type) if media_type else False
    if binary or (b"\x00" in start and not wide):
        what = media_type or "binary data"
        raise ToolFailed(
            f"{who} is {what} ({len(answer.body)} bytes), which has no text to read.", "not_text"
        )
    if charset is None and is_html(answer) and (declared := _META_CHARSET.search(start)):
        charset = declared[1].decode("ascii")
    return decoded(answer.body, charset)
