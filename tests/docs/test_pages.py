"""What the pages mention is there: files, anchors, settings, commands, routes; and their examples work."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI

from api.app import ROUTERS
from api.openapi import document_of
from oshaani.reference.commands import commands_page
from oshaani.settings import CONFIG_VARIABLE, TABLE

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FOLDERS = (
    "adapters|api|benchmarks|commands|deploy|docs|domain|oshaani|projections|schemas|stream_processors|tests"
)
NOT_SETTINGS = {CONFIG_VARIABLE, "OSHAANI_USER_PASSWORD"}  # of the settings themselves, and of one command

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FILE = re.compile(rf"`((?:{FOLDERS})/[\w./-]+\.(?:py|sql|md|sh|json))`")
_SETTING = re.compile(r"\b(?:OSHAANI|KAFKA|OPENAI|OLLAMA|AWS|FREE_CREDITS|DATABASE)_[A-Z_]*[A-Z]\b")
_COMMAND = re.compile(r"(?:^|`)oshaani ((?:[a-z-]+ ?)+)", re.MULTILINE)
_ROUTE = re.compile(
    r"(?:GET|POST|PATCH|PUT|DELETE) `?(/api/[\w/{}-]+)|\$BASE(/api/[\w/${}-]+)|:8080(/api/[\w/${}-]+)"
)
_PYTHON = re.compile(r"```python\n# ([\w/]+\.py)\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def routes() -> set[str]:
    app = FastAPI(openapi_url=None)
    for router in ROUTERS:
        app.include_router(router)
    return {_shape(path) for path in document_of(app, "http://127.0.0.1:8080")["paths"]}


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    page = ROOT / name
    broken = [link for link in _LINK.findall(_prose(page)) if not _leads_somewhere(page, link)]
    assert broken == []


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_is_named_exists(name: str) -> None:
    named = set(_FILE.findall((ROOT / name).read_text("utf-8"))) - set(_examples())
    assert [file for file in sorted(named) if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_that_is_named_exists(name: str) -> None:
    known = {name for setting in TABLE for name in setting.names} | NOT_SETTINGS
    assert set(_SETTING.findall((ROOT / name).read_text("utf-8"))) - known == set()


@pytest.mark.parametrize("name", NAMES)
def test_every_command_that_is_named_exists(name: str) -> None:
    known = re.findall(r"^## oshaani (.+)$", commands_page(), re.MULTILINE)
    named = {found.strip() for found in _COMMAND.findall((ROOT / name).read_text("utf-8"))}
    missing = {words for words in named if not any(f"{words} ".startswith(f"{each} ") for each in known)}
    assert missing == set()


@pytest.mark.parametrize("name", NAMES)
def test_every_route_that_is_named_exists(name: str, routes: set[str]) -> None:
    named = {"".join(found) for found in _ROUTE.findall((ROOT / name).read_text("utf-8"))}
    assert {path for path in named if _shape(path) not in routes} == set()


def test_the_example_of_a_tool_works_with_its_test(tmp_path: Path) -> None:
    examples = _examples()
    assert len(examples) == 2
    for file, text in examples.items():
        (tmp_path / Path(file).name).write_text(re.sub(r"adapters\.tools\.word_count", "word_count", text))
    test = tmp_path / "test_word_count.py"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "asyncio_mode=auto",
        "-p",
        "no:cacheprovider",
        str(test),
    ]
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout


def _examples() -> dict[str, str]:
    page = (ROOT / "docs" / "how-to" / "add-a-tool.md").read_text("utf-8")
    return dict(_PYTHON.findall(page))


def _prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)


def _leads_somewhere(page: Path, link: str) -> bool:
    if link.startswith(("http://", "https://", "mailto:")):
        return True
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists():
        return False
    return not anchor or target.suffix != ".md" or anchor in set(_anchors(target))


def _anchors(page: Path) -> Iterator[str]:
    for heading in re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE):
        yield re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _shape(path: str) -> str:
    """A path with its parameters all written alike."""
    return re.sub(r"(\{\w+\}|\$\w+)", "{}", path).rstrip("/")
