"""What an agent's free-form configuration means: known keys are checked, unknown ones kept and reported.

Source: SOP §4.2–4.3. PATCH merges by RFC 7396, recursively.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from domain.errors import InvalidValue

SYSTEM_PROMPT_CHARS_MAX = 100_000
CONFIGURATION_CHARS_MAX = 200_000
TOOL_LIST_MAX = 500
DEPTH_MAX = 20


@dataclass(frozen=True, slots=True)
class Settings:
    """The known keys with the requirements' defaults."""

    system_prompt: str = ""
    enabled_tools: tuple[str, ...] = ()
    disabled_tools: tuple[str, ...] = ()
    tools_enabled: bool = True
    max_tool_iterations: int = 10
    use_memory: bool = True
    max_history_messages: int = 50
    use_rag: bool = False
    rag_top_k: int = 5
    rag_threshold: float = 0.7
    temperature: float | None = None
    max_output_tokens: int | None = None
    auto_apply: bool = True

    def offers(self, tool: str) -> bool:
        """Whether a tool may be used (SOP §4.2.3): a non-empty `enabled_tools` is the whole list and beats `disabled_tools`."""
        if not self.tools_enabled:
            return False
        return tool in self.enabled_tools if self.enabled_tools else tool not in self.disabled_tools


_RANGES: dict[str, tuple[float, float]] = {
    "max_tool_iterations": (0, 50),
    "max_history_messages": (0, 1000),
    "rag_top_k": (1, 50),
    "rag_threshold": (0, 1),
    "temperature": (0, 2),
    "max_output_tokens": (1, 200_000),
}
_FLAGS = ("tools_enabled", "use_memory", "use_rag", "auto_apply")
_TOOL_LISTS = ("enabled_tools", "disabled_tools")
_WHOLE = ("max_tool_iterations", "max_history_messages", "rag_top_k", "max_output_tokens")
KNOWN = ("system_prompt", *_TOOL_LISTS, *_FLAGS, *_RANGES)


def merged(target: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """The target with an RFC 7396 merge patch applied: objects merge, arrays replace, null deletes."""
    result = dict(target)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            before = result.get(key)
            result[key] = merged(before if isinstance(before, Mapping) else {}, value)
        else:
            result[key] = value
    return result


def read(configuration: Mapping[str, Any]) -> Settings:
    """The known keys of a checked configuration."""
    known = {key: configuration[key] for key in KNOWN if configuration.get(key) is not None}
    for key in _TOOL_LISTS:
        if key in known:
            known[key] = tuple(known[key])
    return Settings(**known)


def check(configuration: Mapping[str, Any]) -> list[str]:
    """Warnings about unknown keys.

    Raises:
        InvalidValue: a known key has a value of the wrong shape; the pointer names it.
    """
    check_depth(configuration)
    if len(repr(configuration)) > CONFIGURATION_CHARS_MAX:
        raise InvalidValue(
            "/configuration", f"The configuration exceeds {CONFIGURATION_CHARS_MAX} characters.", "too_long"
        )
    for key, value in configuration.items():
        _check_key(key, value)
    return [
        f"configuration.{key} is not a known key; it is kept but has no effect"
        for key in configuration
        if key not in KNOWN
    ]


def check_depth(configuration: Mapping[str, Any]) -> None:
    """Refuse what nests too deep to be merged, written and replayed by functions that call themselves."""
    level: list[Any] = [configuration]
    for _ in range(DEPTH_MAX):
        level = [child for each in level for child in _children(each)]
    if level:
        raise InvalidValue(
            "/configuration", f"The configuration nests more than {DEPTH_MAX} deep.", "too_deep"
        )


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


def _check_key(key: str, value: Any) -> None:
    pointer = f"/configuration/{key}"
    if key == "system_prompt":
        if not isinstance(value, str) or len(value) > SYSTEM_PROMPT_CHARS_MAX:
            raise InvalidValue(
                pointer, f"system_prompt must be text of at most {SYSTEM_PROMPT_CHARS_MAX} characters."
            )
    elif key in _TOOL_LISTS:
        _check_tool_list(pointer, key, value)
    elif key in _FLAGS:
        if not isinstance(value, bool):
            raise InvalidValue(pointer, f"{key} must be true or false.")
    elif key in _RANGES:
        low, high = _RANGES[key]
        number = isinstance(value, int if key in _WHOLE else (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            kind = "a whole number" if key in _WHOLE else "a number"
            raise InvalidValue(pointer, f"{key} must be {kind} from {low:g} to {high:g}.")


def _check_tool_list(pointer: str, key: str, value: Any) -> None:
    fits = isinstance(value, list) and len(value) <= TOOL_LIST_MAX
    if not fits or not all(isinstance(name, str) and 0 < len(name) <= 64 for name in value):
        raise InvalidValue(pointer, f"{key} must be a list of at most {TOOL_LIST_MAX} tool names.")


def offered(settings: Settings, tools: Iterable[str]) -> list[str]:
    """The tools of a list that the settings allow, in the list's order."""
    return [tool for tool in tools if settings.offers(tool)]
