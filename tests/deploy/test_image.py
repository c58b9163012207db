"""The image's steps are run here as far as they go without an engine: in a copy of the build's context, with the
packages that are installed already."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from oshaani import __version__
from oshaani.settings import TABLE
from tests.deploy import dockerfile
from tests.deploy.dockerfile import ROOT

STEP_S = 90
IGNORED = ROOT / ".dockerignore"
IMAGE = ROOT / "deploy" / "image"


def context_of(folder: Path) -> Path:
    """What `COPY . .` copies."""
    for name in dockerfile.ignored_but(IGNORED.read_text("utf-8")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.py[cod]")
            )
        else:
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run_here(command: str, root: Path, cwd: Path) -> None:
    """A step of the Dockerfile, with its folders below `root` and this Python."""
    moved = re.sub(r"(?<![\w/])/opt/", f"{root}/opt/", command).replace(
        "python -m pip", f"{sys.executable} -m pip"
    )
    environment = {**os.environ, "PIP_NO_COMPILE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        ["sh", "-ec", moved],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=STEP_S,
        check=False,
    )
    assert done.returncode == 0, f"{moved}\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of an image without its dependencies: those are taken from where they are installed."""
    root = tmp_path_factory.mktemp("image")
    context = context_of(root / "context")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", root / "opt/oshaani"], timeout=STEP_S, check=True
    )
    for command in dockerfile.of("RUN", "program"):
        if "--requirement" not in command:
            run_here(command, root, context)
    return root


def ran(image: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The image's command, away from the repository."""
    program = image / "usr-local-bin-oshaani"
    program.write_text((IMAGE / "oshaani").read_text("utf-8").replace("/opt/", f"{image}/opt/"))
    program.chmod(0o755)
    # The installed packages are on the path as a folder, so that the link to this repository among them is not followed.
    packages = f"{image}/opt/app:{sysconfig.get_path('purelib')}"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(image), "PYTHONPATH": packages, **variables}
    return subprocess.run(
        [program, *arguments],
        cwd=image,
        env=environment,
        capture_output=True,
        text=True,
        timeout=STEP_S,
        check=False,
    )


def test_the_program_runs_from_what_the_image_holds(image: Path) -> None:
    done = ran(image, "version")
    assert (done.returncode, done.stdout.strip()) == (0, f"oshaani {__version__}"), done.stderr


def test_all_parts_of_the_program_are_in_the_image(image: Path) -> None:
    packed = image / "opt/app/oshaani"
    code = {
        path.relative_to(ROOT)
        for folder in ("adapters", "api", "commands", "domain", "projections", "schemas", "stream_processors")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert [str(path) for path in sorted(code) if not (packed / "_app" / path).exists()] == []
    assert (packed / "_app/deploy/kafka/pom.xml").exists()


def test_a_worker_in_a_container_is_named_after_it(image: Path) -> None:
    def slot(**variables: str) -> str:
        done = ran(image, "settings", "--json", OSHAANI_DATA_DIR=str(image / "data"), **variables)
        assert done.returncode == 0, done.stderr
        found = re.search(r'"OSHAANI_SLOT",\s*"value":\s*"([^"]*)"', done.stdout)
        assert found is not None, done.stdout
        return found[1]

    assert slot() == socket.gethostname()
    assert slot(OSHAANI_SLOT="agent_turns-7") == "agent_turns-7"


def test_every_install_is_from_hashes_and_compiles_nothing() -> None:
    for command in dockerfile.of("RUN"):
        if "pip" in command and " install " in command:
            assert "--require-hashes --only-binary :all:" in command or "--no-deps --no-index" in command, (
                command
            )
        assert not re.search(r"apt-get|curl|wget|chmod 777", command), command


@pytest.mark.parametrize("lock", ["requirements.lock", "deploy/build.lock"])
def test_the_locks_it_installs_are_there_and_name_hashes_only(lock: str) -> None:
    used = [command for command in dockerfile.of("RUN") if command.endswith(f"--requirement {lock}")]
    assert len(used) == 1
    text = (ROOT / lock).read_text("utf-8")
    pinned = re.findall(r"^[a-z0-9][^\s=]*==\S+.*$", text, re.MULTILINE | re.IGNORECASE)
    assert pinned
    assert all(line.endswith("\\") for line in pinned)
    assert "://" not in text


def test_the_wheel_is_built_with_what_is_declared() -> None:
    build = (ROOT / "deploy" / "build.lock").read_text("utf-8")
    tools = (ROOT / "requirements-dev.lock").read_text("utf-8")
    for pinned in re.findall(r"^\S+==\S+", build, re.MULTILINE):
        assert pinned in tools, f"{pinned}: run `make lock`"


def test_the_base_is_pinned_and_is_a_python_that_the_program_is_tested_with() -> None:
    bases = {base.partition(" AS ")[0] for base in dockerfile.of("FROM")}
    (image,) = {base for base in bases if ":" in base}
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", image)
    assert bases - {image} == {"dependencies"}


def test_nobody_is_root_in_the_image_and_nothing_but_its_folder_is_written() -> None:
    assert dockerfile.of("USER", "") == ["10001:10001"]
    image = dockerfile.settings_of_the_image()
    assert image["OSHAANI_DATA_DIR"] == image["HOME"] == dockerfile.of("WORKDIR", "")[0]
    assert image["PYTHONDONTWRITEBYTECODE"] == "1"


def test_what_the_image_sets_are_settings_and_its_ports_are_open() -> None:
    names = {name for setting in TABLE for name in setting.names}
    image = dockerfile.settings_of_the_image()
    assert {name for name in image if name.startswith("OSHAANI_")} <= names
    assert dockerfile.of("EXPOSE", "") == [f"{image['OSHAANI_PORT']} {image['OSHAANI_WORKER_PORT']}"]
    assert image["OSHAANI_PORT"] == next(each.default for each in TABLE if each.field == "port")


def test_the_context_holds_no_secret_and_nothing_that_is_not_needed() -> None:
    let_in = set(dockerfile.ignored_but(IGNORED.read_text("utf-8")))
    assert not let_in & {".env", "secrets", ".git", "tests", "docs", "dashboard"}
    assert all((ROOT / name).exists() for name in let_in)


# --- health


class Answering(BaseHTTPRequestHandler):
    """/healthz is well, everything else is not."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/healthz" else 503)
        self.end_headers()
        self.wfile.write(b"no database")

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def answering() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join(5)


def asked(*arguments: str, **ports: str) -> subprocess.CompletedProcess[str]:
    """The health check, run as the image runs it."""
    options = (IMAGE / "healthcheck").read_text("utf-8").splitlines()[0].partition(" ")[2]
    return subprocess.run(
        [sys.executable, options, IMAGE / "healthcheck", *arguments],
        env=ports,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def free_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def test_health_is_asked_of_a_worker_or_of_the_api(answering: int) -> None:
    ours, nobodys = str(answering), free_port()
    assert asked(OSHAANI_WORKER_PORT=ours, OSHAANI_PORT=nobodys).returncode == 0
    assert asked(OSHAANI_WORKER_PORT=nobodys, OSHAANI_PORT=ours).returncode == 0
    assert asked(OSHAANI_WORKER_PORT=nobodys, OSHAANI_PORT=nobodys).returncode == 1


def test_a_process_that_cannot_work_says_why(answering: int) -> None:
    done = asked("/readyz", OSHAANI_WORKER_PORT=str(answering))
    assert done.returncode == 1
    assert "/readyz says 503: no database" in done.stderr


def test_the_programs_of_the_image_may_be_executed() -> None:
    assert sorted(path.name for path in IMAGE.iterdir()) == ["healthcheck", "oshaani"]
    assert all(os.access(path, os.X_OK) for path in IMAGE.iterdir())
