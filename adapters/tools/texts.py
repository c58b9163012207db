"""Text from outside, made fit for a model: readable, bounded, without characters that nobody can store."""

from __future__ import annotations

import re

RESULT_TEXT_BYTES_MAX = 65_536
REPLACEMENT = "\ufffd"

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
# No codec that computes: only character sets (so not idna, punycode, unicode_escape).
_CHARSET = re.compile(
    r"utf-?(8|16|32)(-?[lb]e)?|(us-)?ascii|latin-?1|iso-?8859-\d{1,2}|(windows|cp)-?\d{3,4}|koi8-[ru]|shift[_-]jis"
    r"|euc-(jp|kr)|gb(2312|k|18030)|big5(-hkscs)?|iso-2022-jp",
    re.IGNORECASE,
)


def storable(text: str) -> str:
    """`text` with U+0000 and lone surrogates replaced."""
    return _UNSTORABLE.sub(REPLACEMENT, text)


def result_text(text: str) -> str:
    """`text` as a tool's result: storable, and cut with a note when it exceeds RESULT_TEXT_BYTES_MAX."""
    text = storable(text)
    content = text.encode()
    if len(content) <= RESULT_TEXT_BYTES_MAX:
        return text
    note = f"\n[cut: {len(content)} bytes, the first {RESULT_TEXT_BYTES_MAX} are shown]"
    return content[: RESULT_TEXT_BYTES_MAX - len(note)].decode(errors="ignore") + note


def decoded(content: bytes, charset: str | None) -> str:
    """`content` as text, in UTF-8 unless `charset` names another character set; wrong bytes are replaced."""
    known = charset if charset and _CHARSET.fullmatch(charset.strip()) else "utf-8"
    try:
        return content.decode(known.strip(), errors="replace").removeprefix("\ufeff")
    except LookupError:
        return content.decode(errors="replace").removeprefix("\ufeff")
