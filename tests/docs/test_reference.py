"""The reference says what the program says."""

from __future__ import annotations

import pytest

from oshaani.reference.pages import FOLDER, written

PAGES = written()


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_generated_page_is_what_the_program_says(name: str) -> None:
    assert (FOLDER / name).read_text("utf-8") == PAGES[name], "run `python -m oshaani.reference`"
