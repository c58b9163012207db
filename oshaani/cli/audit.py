"""`oshaani billing reconcile` and `oshaani audit verify`: proofs on the live system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from oshaani.cli import show
from oshaani.cli.session import check_read_models, open_core, run
from oshaani.cli.show import AsJson

if TYPE_CHECKING:
    from oshaani.audit import Checked
    from projections.reconciliation import Violation

app = typer.Typer()
billing = typer.Typer(help="Credits: prove every balance from the log.", no_args_is_help=True)
audit = typer.Typer(help="The whole store: prove what must always be true.", no_args_is_help=True)
app.add_typer(billing, name="billing")
app.add_typer(audit, name="audit")


@billing.callback()
def _billing() -> None:
    """Have `reconcile` be a command of its own although it is the only one."""


@audit.callback()
def _audit() -> None:
    """Have `verify` be a command of its own although it is the only one."""


@billing.command()
def reconcile(as_json: AsJson = False) -> None:
    """Prove the laws of credits over the whole store; one line for each violation, exit 1 when there is one."""
    found = run(_reconcile())
    if as_json:
        show.document({"ok": not found, "violations": [asdict(each) for each in found]})
    elif found:
        _print_violations(found)
    else:
        show.line("Every balance follows from the log.")
    raise typer.Exit(1 if found else 0)


@audit.command()
def verify(
    wait: Annotated[
        float, typer.Option(min=0, max=600, help="Seconds that the read models get to follow the log.")
    ] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Prove that the log is whole, turns end, read models follow and credits add up; exit 1 when something is wrong."""
    checked = run(_verify(wait))
    failed = any(each.violations for each in checked)
    if as_json:
        show.document({"ok": not failed, "checks": [asdict(each) for each in checked]})
    else:
        for each in checked:
            show.line(
                f"{'fail' if each.violations else 'ok':<5}{each.law}", "red" if each.violations else None
            )
            _print_violations(each.violations)
    raise typer.Exit(1 if failed else 0)


async def _reconcile() -> list[Violation]:
    from projections.reconciliation import reconcile as prove

    async with open_core() as core:
        await check_read_models(core)
        return await prove(core.db)


async def _verify(wait_s: float) -> list[Checked]:
    from adapters.postgres.pool import deadline
    from oshaani.audit import verify as prove

    async with open_core() as core:
        await check_read_models(core)
        return await prove(core.log, core.pool, deadline, wait_s)


def _print_violations(found: Sequence[Violation]) -> None:
    for each in found:
        show.line(f"     {each.check}: {each.key}: {show.plain(each.detail)}")
