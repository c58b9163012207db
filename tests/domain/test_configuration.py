from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.configuration import (
    CONFIGURATION_CHARS_MAX,
    DEPTH_MAX,
    KNOWN,
    SYSTEM_PROMPT_CHARS_MAX,
    TOOL_LIST_MAX,
    Settings,
    check,
    merged,
    offered,
    read,
)
from domain.errors import InvalidValue

TOOLS = ("web_search", "url_resolver", "text_to_image", "code_executor")


def objects_of(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from("abc"), values, max_size=3)


LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | objects_of(inner), max_leaves=10)
OBJECTS = objects_of(VALUES)


# --- tools (SOP §4.2.3 and its examples)


@pytest.mark.parametrize(
    ("configuration", "available"),
    [
        pytest.param({}, TOOLS, id="all without a list"),
        pytest.param({"enabled_tools": [], "disabled_tools": []}, TOOLS, id="all with empty lists"),
        pytest.param(
            {"enabled_tools": ["web_search", "url_resolver"]},
            ("web_search", "url_resolver"),
            id="SOP example 1",
        ),
        pytest.param(
            {"disabled_tools": ["text_to_image"]},
            ("web_search", "url_resolver", "code_executor"),
            id="SOP example 2",
        ),
        pytest.param(
            {"disabled_tools": ["code_executor"]},
            ("web_search", "url_resolver", "text_to_image"),
            id="SOP example 3",
        ),
        pytest.param(
            {"enabled_tools": ["web_search"], "disabled_tools": ["web_search", "url_resolver"]},
            ("web_search",),
            id="enabled wins over disabled",
        ),
        pytest.param({"tools_enabled": False}, (), id="none without tool calling"),
        pytest.param(
            {"tools_enabled": False, "enabled_tools": ["web_search"]}, (), id="none, whatever is enabled"
        ),
        pytest.param({"enabled_tools": ["unheard_of"]}, (), id="none of those there are"),
    ],
)
def test_which_tools_are_available(configuration, available):
    check(configuration)
    assert tuple(offered(read(configuration), TOOLS)) == available


# --- merging (RFC 7396, appendix A, as far as both are objects)


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
        ({"a": "foo"}, {"a": {"b": 1}}, {"a": {"b": 1}}),
    ],
)
def test_a_patch_is_merged_as_the_standard_says(target, patch, result):
    assert merged(target, patch) == result


@given(OBJECTS, OBJECTS)
def test_merging_changes_neither_side_and_once_is_enough(target, patch):
    before = repr((target, patch))
    after = merged(target, patch)
    assert merged(after, patch) == after
    assert repr((target, patch)) == before


@given(OBJECTS)
def test_an_empty_patch_changes_nothing(target):
    assert merged(target, {}) == target


# --- checking and reading


def test_an_empty_configuration_has_the_defaults_of_the_requirements():
    assert read({}) == Settings()
    assert (Settings().max_tool_iterations, Settings().max_history_messages) == (10, 50)
    assert (Settings().use_rag, Settings().rag_top_k, Settings().rag_threshold) == (False, 5, 0.7)


def test_known_keys_are_read_and_null_means_the_default():
    configuration = {
        "system_prompt": "Be kind.",
        "enabled_tools": ["ocr"],
        "rag_top_k": 3,
        "temperature": None,
    }
    assert read(configuration) == Settings(system_prompt="Be kind.", enabled_tools=("ocr",), rag_top_k=3)


def test_every_known_key_is_a_setting():
    assert sorted(KNOWN) == sorted(Settings.__slots__)


def test_unknown_keys_are_kept_and_reported():
    (warning,) = check({"sytem_prompt": "typo", "temperature": 1})
    assert "sytem_prompt" in warning


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("system_prompt", 1), ("system_prompt", "x" * (SYSTEM_PROMPT_CHARS_MAX + 1))),
        *(("enabled_tools", "web_search"), ("enabled_tools", [1]), ("enabled_tools", [""])),
        *(("disabled_tools", ["x" * 65]), ("disabled_tools", ["x"] * (TOOL_LIST_MAX + 1))),
        *(("use_rag", 1), ("use_rag", "true"), ("auto_apply", None)),
        *(("max_tool_iterations", -1), ("max_tool_iterations", 51), ("max_tool_iterations", 1.0)),
        *(
            ("max_tool_iterations", True),
            ("max_history_messages", 1001),
            ("rag_top_k", 0),
            ("rag_top_k", "5"),
        ),
        *(("rag_threshold", 1.01), ("rag_threshold", float("nan")), ("temperature", -0.1)),
        *(("temperature", float("inf")), ("max_output_tokens", 0), ("max_output_tokens", 200_001)),
    ],
)
def test_a_known_key_with_a_value_it_cannot_have_is_refused_by_name(key, value):
    with pytest.raises(InvalidValue) as refused:
        check({key: value})
    assert refused.value.facts["pointer"] == f"/configuration/{key}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("max_tool_iterations", 0), ("max_tool_iterations", 50), ("max_history_messages", 0)),
        *(("rag_threshold", 0), ("rag_threshold", 1), ("temperature", 2), ("temperature", 0.0)),
        *(("max_output_tokens", 1), ("enabled_tools", ["x" * 64]), ("system_prompt", "")),
    ],
)
def test_the_edges_of_what_is_allowed_are_allowed(key, value):
    assert check({key: value}) == []


@given(st.dictionaries(st.sampled_from(KNOWN), VALUES, max_size=5))
def test_what_passes_the_check_can_be_read(configuration):
    try:
        check(configuration)
    except InvalidValue:
        return
    read(configuration)


def test_a_configuration_has_a_limit_in_size_and_depth():
    with pytest.raises(InvalidValue) as refused:
        check({"extra": "x" * CONFIGURATION_CHARS_MAX})
    assert refused.value.facts["value_code"] == "too_long"
    nested: Any = 1
    for _ in range(DEPTH_MAX - 1):
        nested = {"a": nested}
    check({"a": [nested][0]["a"]})
    with pytest.raises(InvalidValue) as refused:
        check({"a": [nested]})
    assert refused.value.facts["value_code"] == "too_deep"
