"""`oshaani quickstart`: from nothing to an agent that answers, over HTTP only, as any client would do it."""

from __future__ import annotations

import asyncio
import secrets
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from domain.money import credits, ncr
from oshaani.cli import show
from oshaani.cli.session import quiet_settings, run
from oshaani.cli.show import AsJson
from oshaani.cli.trouble import Failed

if TYPE_CHECKING:
    from oshaani.cli.http import Api

app = typer.Typer()

SETTLED_S = 10.0  # how long the charge may take to be in the ledger
LOOK_S = 0.1
AGENT_NAME = "Guide"
AGENT_DESCRIPTION = "Explains this server to newcomers."
SYSTEM_PROMPT = """\
You are the guide of a new Oshaani server. Answer newcomers' questions about it in at most four short sentences.
Oshaani keeps every message, tool call and charge as an event in a log, so that each answer can be explained later.
An agent has a system prompt, a model and the tools that its owner enables.
A published agent is asked with an agent API key; its owner pays in credits, and credits are set aside before work starts.
The file oshaani.toml or the environment holds the settings, and the command `oshaani doctor` checks them.
"""
MESSAGE = "Why does Oshaani keep every tool call in a log?"

Say = Callable[[str], None]


@app.command()
def quickstart(
    url: Annotated[
        str | None, typer.Option(help="Address of the server; by default OSHAANI_BASE_URL.")
    ] = None,
    email: Annotated[str | None, typer.Option(help="E-mail address of the new user.")] = None,
    message: Annotated[str, typer.Option(help="What to ask the new agent.")] = MESSAGE,
    as_json: AsJson = False,
) -> None:
    """Make a user, an agent and its keys on a running server, and ask the agent something."""
    base_url = url or quiet_settings().base_url
    address = email or f"quickstart-{secrets.token_hex(4)}@example.com"
    with _progress(not as_json) as say:
        found = run(_quickstart(base_url, address, message, say))
    if as_json:
        show.document(found)
    else:
        _print(found)


async def _quickstart(base_url: str, email: str, message: str, say: Say) -> dict[str, Any]:
    from oshaani.cli.http import api_at

    async with api_at(base_url) as api:
        say("making a user")
        password = secrets.token_urlsafe(15)
        user_key = await _user_key(api, email, password)
        as_user = {"Authorization": f"Bearer {user_key}"}
        say("making an agent")
        agent_id, agent_key = await _agent(api, as_user)
        say("asking the agent")
        as_agent = {"Authorization": f"ApiKey {agent_key}"}
        answer = await api.post("/api/v1/chat", {"message": message}, as_agent)
        say("waiting for the charge")
        lines = await _charges(api, as_user, str(answer["request_id"]))
        balance = _data(await api.get("/api/billing/balance", as_user))
        return {
            "base_url": api.base_url,
            "email": email,
            "password": password,
            "user_api_key": user_key,
            "agent_id": agent_id,
            "agent_api_key": agent_key,
            "conversation_id": answer["conversation_id"],
            "request_id": answer["request_id"],
            "message": message,
            "response": answer["response"],
            "model": await _model(api, as_user, str(answer["request_id"])),
            "charges": [{"meter": line["meter"], "credits": _positive(line["amount"])} for line in lines],
            "charged_credits": credits(-sum(ncr(str(line["amount"])) for line in lines)),
            "balance_credits": balance["posted"],
        }


async def _user_key(api: Api, email: str, password: str) -> str:
    """A new user's key. The login is a browser's: it is forgotten as soon as the key is there."""
    await api.post("/api/auth/register", {"email": email, "password": password, "name": "Quickstart"})
    await api.post("/api/auth/login", {"email": email, "password": password})
    key = str(_data(await api.post("/api/api-keys/", {"name": "quickstart"}))["key"])
    await api.post("/api/auth/logout", {})
    api.cookies.clear()
    return key


async def _agent(api: Api, as_user: dict[str, str]) -> tuple[int, str]:
    """The number of a new, published agent, and a key to it."""
    agent = {
        "name": AGENT_NAME,
        "description": AGENT_DESCRIPTION,
        "configuration": {"system_prompt": SYSTEM_PROMPT},
    }
    number = int(_data(await api.post("/api/agents/", agent, as_user))["id"])
    await api.post(f"/api/agents/{number}/publish/", {}, as_user)
    key = await api.post(f"/api/agents/{number}/api-keys/", {"name": "quickstart"}, as_user)
    return number, str(_data(key)["key"])


async def _charges(api: Api, as_user: dict[str, str], request_id: str) -> list[dict[str, Any]]:
    """Every charge of this user, oldest first, once that of the request is among them."""
    until_s = time.monotonic() + SETTLED_S
    while time.monotonic() < until_s:
        found = (await api.get("/api/billing/ledger", as_user))["data"]
        charges = [line for line in reversed(found) if line["kind"] == "charge"]
        if any(
            str(line["request_id"] or "").removeprefix("req-") == request_id.removeprefix("req-")
            for line in charges
        ):
            return charges
        await asyncio.sleep(LOOK_S)
    raise Failed(
        f"the charge of {request_id} is not in the ledger after {SETTLED_S:.0f} s; see `oshaani doctor`"
    )


async def _model(api: Api, as_user: dict[str, str], request_id: str) -> str:
    """The name of the model that answered."""
    return str(_data(await api.get(f"/api/requests/{request_id}", as_user))["model"])


def _data(answer: dict[str, Any]) -> dict[str, Any]:
    found = answer.get("data")
    if not isinstance(found, dict):
        raise Failed("the server answered in an unknown form; is it of the same version as this program?")
    return found


def _positive(amount: str) -> str:
    return credits(-ncr(amount))


@contextmanager
def _progress(wanted: bool) -> Iterator[Say]:
    """Say what is going on, on a terminal only."""
    console = Console(stderr=True, markup=False, highlight=False)
    if not (wanted and console.is_terminal):
        yield lambda text: None
        return
    with console.status("starting") as status:
        yield lambda text: status.update(f"{text} …")


def curl_of(found: dict[str, Any]) -> str:
    """A command that asks the agent again; works when pasted into a shell."""
    message = '{"message": "What can an agent do?"}'
    return (
        f"curl -s {shlex.quote(found['base_url'] + '/api/v1/chat')} -H 'Content-Type: application/json' "
        f"-H {shlex.quote('Authorization: ApiKey ' + found['agent_api_key'])} -d {shlex.quote(message)}"
    )


def _print(found: dict[str, Any]) -> None:
    show.line("Made for you; passwords and keys are shown this once:\n")
    for label, name in (
        ("e-mail", "email"),
        ("password", "password"),
        ("user key", "user_api_key"),
        ("agent", "agent_id"),
        ("agent key", "agent_api_key"),
    ):
        show.line(f"  {label:<10} {found[name]}")
    show.line(f"\n> {found['message']}", "bold")
    show.line(show.tamed(str(found["response"])))
    charges = ", ".join(f"{charge['meter']} {charge['credits']}" for charge in found["charges"])
    show.line(f"\n  model      {found['model']}")
    show.line(f"  charged    {found['charged_credits']} credits ({charges}); {found['balance_credits']} left")
    show.line("\nAsk it something else:\n")
    show.line(curl_of(found))
    show.line(f"\nWhat happened inside:  {_program()} turn show {found['request_id']}")


def _program() -> str:
    from oshaani.cli.serve import program

    return program()
