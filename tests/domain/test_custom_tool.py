from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.custom_tool import (
    DEFAULT_TOOL_NAMES,
    HEADER_COUNT_MAX,
    PARAMETER_COUNT_MAX,
    placeholders,
    secret_refs,
    validate_definition,
)

REF = "vault:00000000-0000-0000-0000-000000000001"
DEFINITION: dict[str, Any] = {
    "name": "weather",
    "description": "Weather of a city",
    "method": "POST",
    "url": "https://api.example/v1/{city}?days={days}",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"type": "string"}},
        "required": ["city", "days"],
    },
    "headers": {"Accept": "application/json", "Authorization": {"secret_ref": REF}},
    "timeout_s": 10,
    "idempotent": True,
}


def faults(**changes: Any) -> list[tuple[str, str]]:
    return [(fault.pointer, fault.code) for fault in validate_definition({**DEFINITION, **changes})]


def test_a_whole_definition_and_the_smallest_one_are_accepted() -> None:
    assert faults() == []
    assert (
        validate_definition(
            {key: DEFINITION[key] for key in ("name", "description", "method")} | {"url": "http://a"}
        )
        == []
    )


def test_nothing_is_refused_with_everything_that_it_lacks() -> None:
    assert [fault.pointer for fault in validate_definition({})] == [
        "/name",
        "/description",
        "/method",
        "/url",
    ]


def test_placeholders_and_secrets_are_found() -> None:
    assert placeholders(DEFINITION["url"]) == ["city", "days"]
    assert secret_refs(DEFINITION) == {"Authorization": REF}
    assert secret_refs({"headers": None}) == {}


WRONG_SCHEMAS: list[Any] = [{}, [], "x", {"type": "array"}]
WRONG_HEADERS: list[Any] = [[], "x", {f"X{n}": "" for n in range(HEADER_COUNT_MAX + 1)}]
deep: dict[str, Any] = {"type": "object"}
for _ in range(50_000):
    deep = {"type": "object", "a": deep}


@pytest.mark.parametrize(
    ("field", "value", "pointer", "code"),
    [
        *[
            ("name", name, "/name", "invalid_name")
            for name in ("", "Weather", "1a", "a-b", "a" * 65, "é", 3, None, "a\n")
        ],
        *[("name", name, "/name", "reserved_name") for name in (*DEFAULT_TOOL_NAMES, "mcp_a_b")],
        *[
            ("description", text, "/description", "invalid_description")
            for text in ("", "  ", "x" * 1_025, None)
        ],
        *[
            ("method", method, "/method", "invalid_method")
            for method in ("get", "HEAD", "TRACE", None, ["GET"])
        ],
        ("idempotent", "yes", "/idempotent", "invalid_type"),
        *[
            ("url", url, "/url", "invalid_url")
            for url in (
                *(
                    "",
                    "api.example",
                    "ftp://api.example",
                    "https://",
                    "https:///a",
                    "https://a b",
                    "https://a\\b",
                    None,
                ),
                *("https://a\r\nb", "https://[", "https://a:99999", "https://a/" + "x" * 2_000),
            )
        ],
        ("url", "https://user:pw@api.example/", "/url", "credentials_in_url"),
        ("url", "https://{city}.example/", "/url", "placeholder_in_host"),
        ("url", "https://api.example:{days}/", "/url", "invalid_url"),
        ("url", "https://api.example/{unit}", "/url", "unknown_placeholder"),
        *[
            ("url", f"https://api.example/{part}", "/url", "invalid_placeholder")
            for part in ("{", "}", "{}", "{{city}}", "{a/b}", "#{city}")
        ],
        *[("parameters", schema, "/parameters", "invalid_parameters") for schema in WRONG_SCHEMAS],
        ("parameters", deep, "/parameters", "too_deep"),
        ("parameters", {**DEFINITION["parameters"], "description": "x" * 20_000}, "/parameters", "too_large"),
        (
            "parameters",
            {"type": "object", "properties": {f"p{n}": {} for n in range(PARAMETER_COUNT_MAX + 1)}},
            "/parameters/properties",
            "invalid_properties",
        ),
        (
            "parameters",
            {**DEFINITION["parameters"], "properties": {"a/b~": {}, "city": {}, "days": {}}},
            "/parameters/properties/a~1b~0",
            "invalid_parameter_name",
        ),
        (
            "parameters",
            {**DEFINITION["parameters"], "required": ["city", "days", "x"]},
            "/parameters/required",
            "unknown_parameter",
        ),
        *[("headers", headers, "/headers", "invalid_headers") for headers in WRONG_HEADERS],
        *[
            ("headers", {name: "x"}, f"/headers/{name}", "invalid_header_name")
            for name in ("", "X Y", "X:", "é", "X\r\n")
        ],
        *[
            ("headers", {name: "x"}, f"/headers/{name}", "reserved_header")
            for name in (
                "Host",
                "content-length",
                "Proxy-Authorization",
                "Transfer-Encoding",
                "Idempotency-Key",
            )
        ],
        ("headers", {"X": "a", "x": "b"}, "/headers/x", "duplicate_header"),
        *[
            ("headers", {"X": value}, "/headers/X", "invalid_header_value")
            for value in ("a\r\nb", "ž", 3, None, "x" * 4_001)
        ],
        *[
            ("headers", {"X": value}, "/headers/X", "invalid_secret_ref")
            for value in (
                {},
                {"secret_ref": "x"},
                {"secret_ref": REF, "more": 1},
                {"secret": "x"},
                {"secret_ref": REF + "\n"},
            )
        ],
        *[
            ("timeout_s", value, "/timeout_s", "invalid_timeout")
            for value in (0, -1, 31, "5", True, None, float("nan"))
        ],
        ("color", "red", "/color", "unknown_field"),
    ],
)
def test_each_fault_is_told_at_its_place(field: str, value: Any, pointer: str, code: str) -> None:
    assert (pointer, code) in faults(**{field: value})


def test_no_message_repeats_a_header_value() -> None:
    told = validate_definition(
        {**DEFINITION, "headers": {"X": "canary\n", "Y": {"secret_ref": "canary"}, "Host": "canary"}}
    )
    assert len(told) == 3
    assert "canary" not in repr(told)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(DEFINITION)) | st.text(max_size=4), json_values))
def test_any_json_object_is_judged_without_an_accident(definition: dict[str, Any]) -> None:
    for pointer, code, message in validate_definition({**DEFINITION, **definition}):
        assert pointer.startswith("/")
        assert code
        assert message.endswith(".")
