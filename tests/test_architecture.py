"""The arrows that import-linter cannot draw, and the list of layers that must be the same everywhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LAYERS = {"domain", "commands", "projections", "stream_processors", "api", "schemas", "adapters", "oshaani"}
OPTIONAL = {"mcp", "qdrant_client"}  # The extras of pyproject.toml.
DOMAIN_MAY_IMPORT = {"eventsourcing.domain"}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def imported_modules(folder: str) -> Iterator[tuple[str, str]]:
    """Each file of a layer with each module it imports, also inside functions and type-checking blocks."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield str(path.relative_to(ROOT)), alias.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield str(path.relative_to(ROOT)), node.module


def test_the_domain_imports_only_the_standard_library_and_the_event_sourcing_domain():
    foreign = [
        (path, module)
        for path, module in imported_modules("domain")
        if module.split(".")[0] not in sys.stdlib_module_names | {"domain"}
        and module not in DOMAIN_MAY_IMPORT
    ]
    assert foreign == []


def test_every_layer_is_linted_typed_and_packed():
    tools = project()["tool"]
    wheel = tools["hatch"]["build"]["targets"]["wheel"]
    assert set(tools["importlinter"]["root_packages"]) == LAYERS
    assert set(tools["mypy"]["packages"]) == LAYERS
    assert set(wheel["only-include"]) == LAYERS
    assert wheel["sources"] == {layer: f"oshaani/_app/{layer}" for layer in LAYERS - {"oshaani"}}


def test_every_folder_of_a_layer_is_a_package():
    bare = {
        str(path.parent.relative_to(ROOT))
        for layer in LAYERS
        for path in (ROOT / layer).rglob("*.py")
        if not (path.parent / "__init__.py").exists()
    }
    assert bare == set()


def test_no_installed_distribution_claims_the_name_of_a_layer():
    claimed = {
        name: sorted(set(distributions) - {"oshaani"})
        for name, distributions in packages_distributions().items()
        if name in LAYERS
    }
    assert not any(claimed.values()), claimed


def test_everything_the_program_imports_is_in_its_lock():
    locked = {
        name.lower()
        for name in re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text("utf-8"), re.M)
    }
    providers = packages_distributions()
    unlocked = {
        (path, module)
        for layer in LAYERS
        for path, module in imported_modules(layer)
        if (name := module.split(".")[0]) not in sys.stdlib_module_names | LAYERS | OPTIONAL
        and locked.isdisjoint(
            distribution.lower().replace("_", "-") for distribution in providers.get(name, [])
        )
    }
    assert unlocked == set()


def test_the_embedded_mode_starts_without_the_clients_of_kafka():
    loaded = "import oshaani.cli, oshaani.up, sys; print(*{name.split('.')[0] for name in sys.modules})"
    ran = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"aiokafka", "faust", "mode"}.isdisjoint(ran.stdout.split())


def test_dependencies_are_bounded_above():
    declared = project()["project"]
    groups = [*declared["optional-dependencies"].values(), *project()["dependency-groups"].values()]
    everything = [*declared["dependencies"], *(requirement for group in groups for requirement in group)]
    assert [requirement for requirement in everything if "<" not in requirement] == []


def test_the_locks_name_hashes_and_no_address():
    for lock in ("requirements.lock", "requirements-dev.lock"):
        text = (ROOT / lock).read_text("utf-8")
        assert re.findall(r"[a-z]+://\S+", text) == [], lock
        pinned = re.findall(r"^[a-z0-9][^\s=]*==\S+.*$", text, re.MULTILINE | re.IGNORECASE)
        assert pinned
        assert [line for line in pinned if not line.endswith("\\")] == [], lock


def test_the_tools_lock_holds_the_programs_lock_at_the_same_versions():
    runtime, tools = (
        set(re.findall(r"^[a-zA-Z0-9][^\s=]*==\S+", (ROOT / lock).read_text("utf-8"), re.MULTILINE))
        for lock in ("requirements.lock", "requirements-dev.lock")
    )
    assert runtime - tools == set()


# Who may open connections of which kind. Addresses that users choose are only ever reached through adapters/egress;
# the others reach what the operator configured, or this machine.
REACHING_OUT = {
    "adapters/egress/client.py": {"aiohttp", "socket", "ssl"},
    "adapters/egress/bodies.py": {"aiohttp"},
    "adapters/chat_models/http.py": {"aiohttp"},
    "adapters/chat_models/ollama.py": {"aiohttp"},
    "adapters/chat_models/openai_wire.py": {"aiohttp"},
    "adapters/chat_models/bedrock.py": {"urllib3"},
}
HTTP_CLIENTS = {"aiohttp", "httpx", "requests", "urllib3", "urllib.request", "http.client", "pycurl"}
HTTP_OF_THE_SHELL = "oshaani/"  # talks to its own processes
CODE_FROM_DATA = {"pickle", "marshal", "shelve", "dill"}
RUNNING_PROGRAMS = {"subprocess", "pty"}
PROGRAM_RUNNERS = ("adapters/postgres/", "adapters/kafka/", "oshaani/")


def test_addresses_that_users_choose_are_reached_through_one_door():
    strangers = {
        (path, module)
        for layer in LAYERS
        for path, module in imported_modules(layer)
        if any(module == client or module.startswith(f"{client}.") for client in HTTP_CLIENTS)
        and module.split(".")[0] not in REACHING_OUT.get(path, set())
        and not path.startswith(HTTP_OF_THE_SHELL)
    }
    assert strangers == set()


def test_no_data_is_run_as_code_and_only_few_run_programs():
    dangerous = {
        (path, module)
        for layer in LAYERS
        for path, module in imported_modules(layer)
        if module.split(".")[0] in CODE_FROM_DATA
        or (module.split(".")[0] in RUNNING_PROGRAMS and not path.startswith(PROGRAM_RUNNERS))
    }
    assert dangerous == set()
    called = {
        (str(path.relative_to(ROOT)), node.func.id)
        for layer in LAYERS
        for path in (ROOT / layer).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id in {"eval", "exec", "compile", "__import__"}
    }
    assert called == set()


# A key is found by its id, before it is known whose it is.
QUERIES_OF_ALL_TENANTS = {"find_key"}


def test_every_query_of_a_read_model_is_told_whose_rows_it_may_see():
    untold = [
        f"{path.name}: {node.name}"
        for path in sorted((ROOT / "projections").glob("*.py"))
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.AsyncFunctionDef) and _takes_the_read_side(node)
        if not {"tenant_id", "user_id"} & {argument.arg for argument in node.args.args}
        and node.name not in QUERIES_OF_ALL_TENANTS
    ]
    assert untold == []


def _takes_the_read_side(function: ast.AsyncFunctionDef) -> bool:
    first = function.args.args[0] if function.args.args else None
    return first is not None and first.annotation is not None and ast.unparse(first.annotation) == "ReadSide"
