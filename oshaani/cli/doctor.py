"""`oshaani doctor`: everything that must be in order, looked at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict

import typer

from oshaani.cli import logs, show
from oshaani.cli.findings import Finding, fail, looked_at, print_findings, warn
from oshaani.cli.session import open_database, run
from oshaani.cli.show import AsJson
from oshaani.cli.trouble import Failed, in_one_line
from oshaani.settings import Settings, SettingsInvalid, read_settings

app = typer.Typer()


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Examine this machine, the settings, the database, the server and the models; exit 1 when something fails."""
    logs.set_up("critical")
    found = run(_examine())
    failed = any(each.status == "fail" for each in found)
    if as_json:
        show.document({"ok": not failed, "findings": [asdict(each) for each in found]})
    else:
        print_findings(found)
    raise typer.Exit(1 if failed else 0)


async def _examine() -> list[Finding]:
    from oshaani.cli import doctor_host, doctor_services

    found = [doctor_host.python()]
    try:
        settings = read_settings()
    except SettingsInvalid as invalid:
        return found + [fail("settings", fault, "see `oshaani settings`") for fault in invalid.faults]
    found += [doctor_host.settings_source(settings), *doctor_host.data_folder(settings)]
    found += [doctor_host.master_key_file(settings), doctor_host.listening(settings)]
    server = await looked_at("server", lambda: doctor_services.server(settings))
    is_running = bool(server) and server[0].status == "ok"
    found += [*await _database(settings, is_running), *server, *await _kafka(settings, is_running)]
    found += await looked_at("models", lambda: doctor_services.models(settings))
    return found + doctor_services.tools(settings)


async def _kafka(settings: Settings, is_running: bool) -> Sequence[Finding]:
    """What is to be said of Kafka, if there is any to speak of."""
    from oshaani.cli import doctor_kafka, topics

    config = topics.known(settings)
    if config is None:
        return ()
    found = await looked_at("kafka", lambda: doctor_kafka.examine(config, settings, is_running))
    async with AsyncExitStack() as stack:
        dsn = await stack.enter_async_context(open_database(settings))
        roles = await looked_at("roles", lambda: doctor_kafka.examine_roles(dsn, is_running))
    return [*found, *roles]


async def _database(settings: Settings, is_running: bool) -> list[Finding]:
    """What the database says; its absence is a finding too."""
    from oshaani.cli import doctor_database, doctor_host, topics

    try:
        async with AsyncExitStack() as stack:
            dsn = await stack.enter_async_context(open_database(settings))
            is_embedded = topics.known(settings) is None
            key = doctor_host.readable_key(settings)
            return await doctor_database.examine(dsn, is_running, key, is_embedded=is_embedded)
    except Failed as missing:
        return [warn("database", str(missing), "the first `oshaani up` makes it")]
    except Exception as failure:
        sentence = in_one_line(failure) or repr(failure)
        return [fail("database", sentence, "start it, or mend DATABASE_URL or OSHAANI_DATA_DIR")]
