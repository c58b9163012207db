"""`oshaani up` and `oshaani migrate`: run the platform, prepare its database."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from domain.ports import ModelCard
from domain.prices import API_CALL, rate_card_at
from oshaani import __version__
from oshaani.cli import logs, show
from oshaani.cli.session import open_database, quiet_settings, run
from oshaani.cli.show import AsJson
from oshaani.cli.trouble import Failed
from oshaani.settings import Settings, read_settings

app = typer.Typer()

FREE_CALLS = (
    "chat calls on /api/v1 cost 0 credits while {model} costs money: give every agent key a spend cap, "
    "or set OSHAANI_DEFAULT_MODEL to a free model"
)


@app.command()
def up(
    kafka: Annotated[
        bool, typer.Option("--kafka", help="One process a role around Apache Kafka, supervised.")
    ] = False,
) -> None:
    """Run everything in one process: database, API, processors and read models. Ctrl-C ends it."""
    logs.set_up("info")
    settings = read_settings()
    logs.set_up(settings.log_level)
    run(_up_kafka(settings) if kafka else _up(settings))
    # All is closed and saved; a thread that still waits for a slow provider must not keep the process for its time limit.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


@app.command()
def migrate(as_json: AsJson = False) -> None:
    """Create or bring up to date the tables in the database; safe to run again."""
    run(_migrate(quiet_settings()))
    if as_json:
        show.document({"migrated": True})
    else:
        show.line("The database is up to date.")


async def _up(settings: Settings) -> None:
    from oshaani.process import PortTaken
    from oshaani.up import up as run_platform

    model = asyncio.create_task(default_model(settings))
    shown: list[asyncio.Task[None]] = []
    try:
        await run_platform(settings, lambda ready: shown.append(asyncio.create_task(_announce(ready, model))))
    except PortTaken as taken:
        raise Failed(str(taken)) from taken
    finally:
        for task in (model, *shown):
            task.cancel()


async def _up_kafka(settings: Settings) -> None:
    from oshaani.process import PortTaken
    from oshaani.supervisor import up_kafka

    model = asyncio.create_task(default_model(settings))
    shown: list[asyncio.Task[None]] = []
    try:
        await up_kafka(
            settings, _said, lambda ready: shown.append(asyncio.create_task(_announce(ready, model)))
        )
    except PortTaken as taken:
        raise Failed(str(taken)) from taken
    finally:
        for task in (model, *shown):
            task.cancel()


def _said(slot: str, text: str) -> None:
    show.line(f"{slot:18} {text}")


async def _announce(settings: Settings, model: asyncio.Task[ModelCard | None]) -> None:
    """Say where it is and what to do next; the model when its provider has answered."""
    show.line(f"\nOshaani {__version__} is ready at {settings.base_url}", "bold")
    database = "embedded Postgres" if settings.is_embedded else "DATABASE_URL"
    show.line(f"  data   {settings.data_dir} ({database})")
    card = await model
    show.line(f"  model  {described(card)}")
    show.line(f"  next   {program()} quickstart{_url_option(settings)}   in another terminal")
    show.line("  stop   Ctrl-C\n")
    if card is not None and is_given_away(card):
        show.line(f"warning: {FREE_CALLS.format(model=card.name)}", "yellow")


async def _migrate(settings: Settings) -> None:
    from oshaani.wiring import migrate as prepare

    async with open_database(settings, may_create=True) as dsn:
        await prepare(dsn)


async def default_model(settings: Settings) -> ModelCard | None:
    """The model that agents talk through when they name none."""
    from oshaani.models import model_registry

    registry = await model_registry(settings)
    try:
        return await registry.resolve(1)
    finally:
        await registry.close()


def described(card: ModelCard | None) -> str:
    """A model in a few words."""
    if card is None:
        return "none answers; see `oshaani doctor`"
    if card.provider == "offline":
        return f"{card.name}, which only quotes; start Ollama or set OPENAI_API_KEY for a real one"
    return f"{card.name} ({card.price_class})"


def is_given_away(card: ModelCard) -> bool:
    """Whether calls to a model that costs money are free for some callers."""
    from oshaani.wiring import utc_now

    return card.price_class == "paid" and rate_card_at(utc_now()).price_ncr(API_CALL) == 0


def program() -> str:
    """How this program is called from here: by its name where the shell finds it, else by its path."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return f"{os.path.relpath(sys.executable)} -m oshaani"
    if started.name != "oshaani" or shutil.which("oshaani"):
        return "oshaani"
    return os.path.relpath(started)


def _url_option(settings: Settings) -> str:
    return "" if settings.port == 8080 and settings.host == "127.0.0.1" else f" --url {settings.base_url}"
