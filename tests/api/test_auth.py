"""Signing up, logging in, and what browsers may do."""

from __future__ import annotations

import re
from http.cookies import SimpleCookie
from uuid import uuid4

from tests.api.client import Answer, Client, Person

PASSWORD = "correct horse battery staple"


def email() -> str:
    return f"{uuid4().hex}@example.com"


async def registered(client: Client, address: str) -> Answer:
    return await client.send(
        "POST", "/api/auth/register", {"email": address, "password": PASSWORD, "name": "Ada"}
    )


def browser(answer: Answer) -> dict[str, str]:
    """The headers that a browser with these cookies sends."""
    jar = SimpleCookie()
    for cookie in answer.headers.getall("Set-Cookie"):  # type: ignore[attr-defined]
        jar.load(cookie)
    return {
        "Cookie": "; ".join(f"{name}={morsel.value}" for name, morsel in jar.items()),
        "X-CSRF-Token": jar["oshaani_csrf"].value,
    }


async def test_who_registers_is_logged_in_with_the_free_credits(client: Client) -> None:
    answer = await registered(client, email())
    assert answer.status == 201, answer.raw
    headers = browser(answer)
    balance = await client.send("GET", "/api/billing/balance", headers=headers)
    assert balance.data["available"] == "200.00"
    me = await client.send("GET", "/api/auth/me", headers=headers)
    assert (me.data["name"], me.data["csrf_token"]) == ("Ada", headers["X-CSRF-Token"])
    made = await client.send("POST", "/api/api-keys/", {"name": "first"}, headers=headers)
    assert (await client.send("GET", "/api/agents/", key=made.data["key"])).status == 200


async def test_logging_in_again_gives_a_new_session_and_no_more_credits(client: Client) -> None:
    address = email()
    first = browser(await registered(client, address))
    answer = await client.send("POST", "/api/auth/login", {"email": address.upper(), "password": PASSWORD})
    assert answer.status == 200
    second = browser(answer)
    assert first["Cookie"] != second["Cookie"]
    balance = await client.send("GET", "/api/billing/balance", headers=second)
    assert balance.data["posted"] == "200.00"
    body = {"email": address, "password": PASSWORD}
    third = browser(await client.send("POST", "/api/auth/login", body, headers={"Cookie": second["Cookie"]}))
    assert (await client.send("GET", "/api/auth/me", headers=second)).status == 401
    assert (await client.send("GET", "/api/auth/me", headers=third)).status == 200


async def test_a_session_cookie_is_hidden_from_scripts_and_other_sites(client: Client) -> None:
    answer = await registered(client, email())
    session, csrf = answer.headers.getall("Set-Cookie")  # type: ignore[attr-defined]
    assert re.search(r"^oshaani_session=", session)
    assert "HttpOnly" in session and "samesite=lax" in session.lower() and "Path=/" in session
    assert "HttpOnly" not in csrf


async def test_a_wrong_password_and_an_unknown_address_are_told_alike(client: Client) -> None:
    address = email()
    await registered(client, address)
    wrong = await client.send("POST", "/api/auth/login", {"email": address, "password": "wrong password"})
    unknown = await client.send("POST", "/api/auth/login", {"email": email(), "password": PASSWORD})
    assert (wrong.status, unknown.status) == (401, 401)
    assert wrong.json["detail"] == unknown.json["detail"]


async def test_a_taken_address_cannot_be_registered_again(client: Client) -> None:
    address = email()
    await registered(client, address)
    again = await registered(client, address.upper())
    assert (again.status, again.json["code"]) == (409, "conflict")


async def test_logging_out_ends_the_session_at_once(client: Client) -> None:
    headers = browser(await registered(client, email()))
    assert (await client.send("POST", "/api/auth/logout", headers=headers)).status == 200
    assert (await client.send("GET", "/api/auth/me", headers=headers)).status == 401


async def test_what_another_site_makes_a_browser_send_is_refused(client: Client) -> None:
    headers = browser(await registered(client, email()))
    body = {"name": "k"}
    without = {"Cookie": headers["Cookie"]}
    for sent in (
        without,
        {**without, "X-CSRF-Token": "0" * 64},
        {**headers, "Origin": "https://evil.example"},
        {**headers, "Origin": "null"},
        {**headers, "Sec-Fetch-Site": "cross-site"},
        {**headers, "Sec-Fetch-Site": "same-site"},
    ):
        answer = await client.send("POST", "/api/api-keys/", body, headers=sent)
        assert (answer.status, answer.json["code"]) == (403, "csrf_failed"), sent
    own = {**headers, "Origin": client.base_url, "Sec-Fetch-Site": "same-origin"}
    assert (await client.send("POST", "/api/api-keys/", body, headers=own)).status == 201


async def test_a_bad_address_or_password_is_named(client: Client) -> None:
    for body, pointer in (
        ({"email": "nobody", "password": PASSWORD}, "/email"),
        ({"email": email(), "password": "short"}, "/password"),
        ({"email": email()}, "/password"),
    ):
        answer = await client.send("POST", "/api/auth/register", body)
        assert (answer.status, answer.json["errors"][0]["pointer"]) == (400, pointer)


async def test_guessing_is_slowed_down(client: Client) -> None:
    address = email()
    body = {"email": address, "password": "guess"}
    answers = [await client.send("POST", "/api/auth/login", body) for _ in range(11)]
    assert [answer.status for answer in answers] == [401] * 10 + [429]
    assert int(answers[-1].headers["Retry-After"]) > 0


async def test_a_revoked_user_key_is_refused_at_once(ada: Person, client: Client) -> None:
    made = (await ada.send("POST", "/api/api-keys/", {"name": "laptop"})).data
    assert (await client.send("GET", "/api/agents/", key=made["key"])).status == 200
    assert (await ada.send("DELETE", f"/api/api-keys/{made['id']}/")).status == 200
    refused = await client.send("GET", "/api/agents/", key=made["key"])
    assert (refused.status, refused.json["code"]) == (401, "key_revoked")
    assert "WWW-Authenticate" in refused.headers
