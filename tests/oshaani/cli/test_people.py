from __future__ import annotations

import pytest

from tests.oshaani.cli.conftest import Cli

ADA = "ada@example.com"


@pytest.fixture
def with_ada(on_database: Cli) -> Cli:
    assert on_database("user", "create", ADA, "--name", "Ada").code == 0
    return on_database


def test_a_created_user_gets_a_password_that_is_printed_once(on_database: Cli) -> None:
    made = on_database("user", "create", ADA, "--json").json
    assert made["email"] == ADA
    assert len(made["password"]) >= 16


def test_a_given_password_is_not_printed(on_database: Cli) -> None:
    ran = on_database("user", "create", ADA, OSHAANI_USER_PASSWORD="a long given password")
    assert ran.code == 0
    assert "given" not in ran.out


def test_an_address_is_taken_once_whatever_its_case(with_ada: Cli) -> None:
    ran = with_ada("user", "create", "ADA@example.com")
    assert ran.code == 1
    assert ran.err == "oshaani: there is already an account with the address 'ADA@example.com'\n"


def test_a_user_becomes_an_operator_and_an_ordinary_one_again(with_ada: Cli) -> None:
    assert with_ada("user", "promote", ADA, "--json").json["role"] == "operator"
    assert with_ada("user", "promote", ADA, "--role", "user").code == 0
    assert with_ada("user", "promote", ADA, "--role", "king").code == 1


def test_nobody_is_promoted_who_is_not_registered(with_ada: Cli) -> None:
    assert with_ada("user", "promote", "bob@example.com").err == (
        "oshaani: nobody is registered with the address 'bob@example.com'\n"
    )


def test_a_user_is_given_credits_on_top_of_the_free_ones(with_ada: Cli) -> None:
    made = with_ada("user", "grant", ADA, "12.5", "--json").json
    assert made == {"email": ADA, "granted_credits": "12.50", "balance_credits": "212.50"}
    paid = ("user", "grant", ADA, "5", "--payment", "pi_1", "--reason", "by transfer", "--json")
    assert [with_ada(*paid).json["balance_credits"] for _ in range(2)] == ["217.50", "217.50"]
    assert with_ada("user", "grant", ADA, "a lot").code == 1
    assert with_ada("user", "grant", ADA, "0").code == 1


def test_keys_are_issued_listed_and_revoked(with_ada: Cli) -> None:
    made = with_ada("keys", "create", ADA, "--name", "laptop", "--json").json
    assert made["key"].startswith(f"osh_user_{made['key_id']}_")
    (listed,) = with_ada("keys", "list", ADA, "--json").json
    assert (listed["key_id"], listed["name"], listed["revoked_at"]) == (made["key_id"], "laptop", None)
    assert made["key"] not in with_ada("keys", "list", ADA).out
    assert with_ada("keys", "revoke", ADA, made["key_id"]).code == 0
    assert with_ada("keys", "list", ADA, "--json").json[0]["revoked_at"] is not None
    assert with_ada("keys", "revoke", ADA, made["key_id"]).code == 1


def test_keys_of_agents_that_are_not_there_are_refused(with_ada: Cli) -> None:
    assert with_ada("keys", "list", "4711").err == "oshaani: there is no agent 4711\n"
    assert "neither an e-mail address nor" in with_ada("keys", "list", "guide").err


def test_what_operators_did_stands_in_the_log_without_personal_content(with_ada: Cli) -> None:
    ran = with_ada("events", "tail")
    assert "User.Registered" in ran.out
    assert "(email, name sealed)" in ran.out
    assert ADA not in ran.out
    assert ADA in with_ada("events", "tail", "--personal").out
