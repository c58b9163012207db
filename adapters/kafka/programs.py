"""What the development broker runs on: Java, and Apache Kafka's jars, fetched once by Maven and made quick to start.

`python -m adapters.kafka.programs` fetches them, as `make test` does before any test needs a broker.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from adapters.kafka.faults import EmbeddedKafkaFault, KafkaProgramsMissing
from adapters.kafka.node import DEPLOY, SERVER, answers, free_ports, nodes_on, write_settings

ROOT_CACHE = Path("/var/cache/oshaani")
JAVA_MIN = 17
FETCH_TIMEOUT_S = 900.0
JAVA_TIMEOUT_S = 20.0
TRAINING_TIMEOUT_S = 120.0
POLL_S = 0.1
SAY_EVERY_S = 5.0

STORAGE_TOOL = "kafka.tools.StorageTool"
OPTIONS = (
    "-Xms96m",
    "-Xmx512m",
    # One small server on a machine that does other work: it must start quickly and stay small.
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:-UsePerfData",
    "-Djava.awt.headless=true",
)
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class KafkaPrograms:
    """Java and Kafka, ready to run. `archive` holds the classes as Java keeps them in memory, where it could be made."""

    java: Path
    jars: tuple[Path, ...]
    archive: Path
    bootstrap: Path
    """The first records of a new cluster, as `kafka-storage format` writes them."""

    def command(self, folder: Path, *options: str) -> list[str]:
        """Java with Kafka's classes, working in `folder`; the class to run comes behind it."""
        if not any("ArchiveClassesAtExit" in option for option in options) and self.archive.exists():
            options = (*options, f"-XX:SharedArchiveFile={self.archive}")
        return [
            str(self.java),
            *OPTIONS,
            *options,
            # The libraries unpack their native parts there; it may be cleared by nobody else.
            f"-Djava.io.tmpdir={folder / 'tmp'}",
            f"-Dlog4j2.configurationFile={folder / 'log4j2.properties'}",
            "-cp",
            os.pathsep.join(map(str, self.jars)),
        ]


def kafka_programs(say: Say | None = None) -> KafkaPrograms:
    """Java and Kafka; what is missing of Kafka is fetched and prepared, once for all data folders of this user.

    `say` hears what takes long. Blocks for as long as another process fetches, at most `FETCH_TIMEOUT_S`.

    Raises:
        KafkaProgramsMissing: naming what is missing and how to get it.
    """
    say = say or to_stderr
    java, java_says = _java()
    place = _place(java_says)
    if not (place / "ready").exists():
        try:
            place.mkdir(parents=True, exist_ok=True)
            with _alone(place, say):
                if not (place / "ready").exists():
                    _fetch(place, say)
                    _train(_programs_in(place, java), place, say)
                    (place / "ready").touch()
        except OSError as fault:
            raise KafkaProgramsMissing(
                f"cannot keep Apache Kafka in {str(place)!r}: {fault.strerror or fault}; "
                "make it a folder this user may write, or set XDG_CACHE_HOME to another"
            ) from fault
    return _programs_in(place, java)


def to_stderr(sentence: str) -> None:
    """Tell whoever waits in front of the terminal."""
    sys.stderr.write(f"oshaani: {sentence}\n")
    sys.stderr.flush()


def _java() -> tuple[Path, str]:
    """Java and what it says of its version."""
    found = ""
    homes = [Path(home) / "bin" / "java" for home in (os.environ.get("JAVA_HOME"),) if home]
    for candidate in (*homes, Path(shutil.which("java") or "java")):
        try:
            ran = subprocess.run(
                [str(candidate), "-version"],
                capture_output=True,
                text=True,
                timeout=JAVA_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        version = re.search(r'version "(?:1\.)?(\d+)', ran.stderr)
        if version is not None and int(version[1]) >= JAVA_MIN:
            return candidate, ran.stderr
        found = f", and {str(candidate)!r} is Java {version[1]}" if version is not None else found
    raise KafkaProgramsMissing(
        f"Apache Kafka needs Java {JAVA_MIN} or newer{found or ', and there is none'}; install it (Debian, Ubuntu: "
        "apt-get install openjdk-17-jre-headless; macOS: brew install openjdk@17), or name it: JAVA_HOME"
    )


def _place(java_says: str) -> Path:
    """One folder for each list of jars and each Java: a class archive serves the Java that wrote it only."""
    pom = (DEPLOY / "pom.xml").read_bytes()
    digest = hashlib.sha256(b"\0".join((pom, java_says.encode(), "\n".join(OPTIONS).encode()))).hexdigest()[
        :12
    ]
    return _cache() / f"kafka-{digest}"


def _cache() -> Path:
    """The XDG base directory specification's cache home: an absolute path, or `~/.cache`."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named / "oshaani"
    if os.geteuid() == 0:
        return ROOT_CACHE
    try:
        return Path.home() / ".cache" / "oshaani"
    except RuntimeError:
        raise KafkaProgramsMissing(
            "there is no home folder to keep Apache Kafka in; for example XDG_CACHE_HOME=/var/tmp/cache"
        ) from None


@contextmanager
def _alone(place: Path, say: Say) -> Iterator[None]:
    """Keep other processes from fetching into `place`; the system frees the lock of a process that dies."""
    deadline_s, told = time.monotonic() + FETCH_TIMEOUT_S, False
    with (place / "lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise KafkaProgramsMissing(
                        f"another process has been fetching Apache Kafka into {str(place)!r} for "
                        f"{FETCH_TIMEOUT_S:.0f} s; end it and start again"
                    ) from None
            if not told:
                told = True
                say("another process fetches Apache Kafka; waiting for it")
            time.sleep(POLL_S)
        yield


def _programs_in(place: Path, java: Path) -> KafkaPrograms:
    # The order is part of what a class archive is checked against.
    jars = tuple(sorted((place / "jars").glob("*.jar")))
    return KafkaPrograms(java, jars, place / "classes.jsa", place / "bootstrap.checkpoint")


def _fetch(place: Path, say: Say) -> None:
    """Kafka's jars into `place`, all of them or none."""
    maven = shutil.which("mvn")
    if maven is None:
        raise KafkaProgramsMissing(
            "Apache Kafka is fetched by Maven, and there is none; install it (Debian, Ubuntu: apt-get install maven; "
            "macOS: brew install maven)"
        )
    say(f"fetching Apache Kafka with Maven into {str(place)!r} (43 MB, once)")
    unfinished, log_file = place / "new", place / "maven.log"
    shutil.rmtree(unfinished, ignore_errors=True)
    arguments = [
        *(maven, "--batch-mode", "--strict-checksums", "--file", str(DEPLOY / "pom.xml")),
        *("dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={unfinished}"),
    ]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            arguments, cwd=place, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _watch(process, log_file, say)
        finally:
            _end_group(process)
    if process.returncode != 0 or not any(unfinished.glob("kafka_*.jar")):
        raise KafkaProgramsMissing(
            f"Maven could not fetch Apache Kafka: {_last_words(log_file)} (all of it: {str(log_file)!r}); "
            "mend that (network, proxy and mirrors are set in ~/.m2/settings.xml) and start again"
        )
    shutil.rmtree(place / "jars", ignore_errors=True)
    unfinished.rename(place / "jars")


def _watch(process: subprocess.Popen[bytes], log_file: Path, say: Say) -> None:
    deadline_s = time.monotonic() + FETCH_TIMEOUT_S
    say_at_s, said_count = time.monotonic() + SAY_EVERY_S, 0
    while process.poll() is None and time.monotonic() < deadline_s:
        if time.monotonic() > say_at_s:
            say_at_s += SAY_EVERY_S
            count = log_file.read_bytes().count(b"Downloaded from")
            if count > said_count:
                said_count = count
                say(f"{count} files so far")
        time.sleep(POLL_S)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """`mvn` is a script; what it started ends with it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(JAVA_TIMEOUT_S)


def _last_words(log_file: Path) -> str:
    lines = [line.strip() for line in log_file.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line.removeprefix("[ERROR]").strip() for line in lines if line.startswith("[ERROR]")]
    return (errors or lines[-1:] or ["it said nothing"])[0]


def _train(programs: KafkaPrograms, place: Path, say: Say) -> None:
    """Run a broker once, so that Java can keep its classes and a new cluster's first records can be kept.

    Without a class archive a start takes twice as long; where Java makes none, brokers start without.
    """
    say("preparing Apache Kafka for quick starts (once)")
    folder = place / "training"
    for left_over in nodes_on(folder):
        left_over.kill()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    ports = free_ports()
    settings = str(write_settings(folder, ports, {}))
    _format(programs, folder, settings)
    archive = folder / "classes.jsa"
    command = [*programs.command(folder, f"-XX:ArchiveClassesAtExit={archive}"), SERVER, settings]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, **_run_in(folder, log)) as process:
        try:
            deadline_s = time.monotonic() + TRAINING_TIMEOUT_S
            while process.poll() is None and not answers(ports[0]) and time.monotonic() < deadline_s:
                time.sleep(POLL_S)
            process.terminate()
            process.wait(TRAINING_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            say("Java made no archive of classes; brokers start without")
        finally:
            process.kill()
    if archive.exists():
        archive.rename(programs.archive)
    shutil.rmtree(folder, ignore_errors=True)


def _format(programs: KafkaPrograms, folder: Path, settings: str) -> None:
    """Have a cluster's first records written, and keep them."""
    log_file = folder / "format.log"
    options = ("format", "--cluster-id", "AAAAAAAAAAAAAAAAAAAAAA", "--config", settings)
    with log_file.open("wb") as log:
        done = subprocess.run(
            [*programs.command(folder), STORAGE_TOOL, *options],
            timeout=TRAINING_TIMEOUT_S,
            check=False,
            **_run_in(folder, log),
        )
    first = folder / "data" / "bootstrap.checkpoint"
    if done.returncode != 0 or not first.exists():
        raise KafkaProgramsMissing(f"Apache Kafka does not run: {_last_words(log_file)}")
    shutil.copyfile(first, programs.bootstrap)


def _run_in(folder: Path, log: BinaryIO) -> dict[str, Any]:
    return {
        "cwd": folder,
        "stdin": subprocess.DEVNULL,
        "stdout": log,
        "stderr": log,
        "start_new_session": True,
    }


def main() -> None:
    """Fetch and prepare what is missing; say nothing when nothing is."""
    try:
        kafka_programs()
    except EmbeddedKafkaFault as fault:
        to_stderr(str(fault))
        sys.exit(1)


if __name__ == "__main__":
    main()
