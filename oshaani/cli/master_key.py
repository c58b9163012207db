"""`oshaani master-key`: replacing the key that wraps all others."""

from __future__ import annotations

import typer

from oshaani.cli import show
from oshaani.cli.session import open_core, run
from oshaani.cli.show import AsJson
from oshaani.cli.trouble import Failed
from oshaani.master_key import master_key

app = typer.Typer(help="The key that wraps all others.", no_args_is_help=True)


@app.command("rotate")
def rotate(as_json: AsJson = False) -> None:
    """Wrap all stored keys with the current master key instead of the previous ones, beside running processes.

    Every process must have been started with the current key and with OSHAANI_PREVIOUS_MASTER_KEYS before.
    """
    counts, left = run(_rotate())
    if as_json:
        show.document({"rewrapped": counts, "wrapped_by_others": left})
    else:
        for name, count in counts.items():
            show.line(f"{count} rewrapped in {name}")
        if not left:
            show.line("All keys are wrapped by the current master key; OSHAANI_PREVIOUS_MASTER_KEYS can go.")
    if left:
        raise Failed(f"{left} keys were wrapped by other master keys meanwhile; run it again")


async def _rotate() -> tuple[dict[str, int], int]:
    from adapters.postgres.server_secret import rotate, wrapped_by_others

    async with open_core() as core:
        key = master_key(core.settings)
        counts = await rotate(core.pool, key, core.settings.previous_master_keys)
        return counts, await wrapped_by_others(core.pool, key)
