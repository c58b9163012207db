"""The tutorial works as it stands, and what it shows is what it gives."""

from __future__ import annotations

import base64
from pathlib import Path

from tests.docs.shell_page import TUTORIAL, blocks_of, run, server, steady


def test_every_command_of_the_tutorial_prints_what_the_page_shows(database_url: str, tmp_path: Path) -> None:
    blocks = blocks_of(TUTORIAL.read_text("utf-8"))
    given = {
        "DATABASE_URL": database_url,
        "OSHAANI_DATA_DIR": str(tmp_path / "data"),
        "OSHAANI_MASTER_KEY": base64.b64encode(bytes(32)).decode(),
    }
    with server(tmp_path, given) as environment:
        printed = run(blocks, environment, tmp_path)
    expected = [steady(block.shown) for block in blocks]
    assert [steady(output) for output in printed] == expected, "run `python -m tests.docs.shell_page`"
