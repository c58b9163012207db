from __future__ import annotations

import base64
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from compose_spec import PyCompose

from oshaani.cli.entry import app
from oshaani.settings import TABLE, read_settings
from schemas.topics import PROCESSORS
from tests.deploy.compose import (
    EXAMPLE,
    FILE,
    FILLED_IN,
    ROOT,
    Missing,
    interpolated,
    ours,
    project,
    raw,
    services,
    variables_of,
    workers,
)
from tests.deploy.dockerfile import settings_of_the_image

SETTINGS = {name: setting for setting in TABLE for name in setting.names}
BOTO3 = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}
# What Compose alone uses: the image, ports on this machine, passwords of other programs.
COMPOSE_ONLY = {
    *("OSHAANI_IMAGE", "POSTGRES_PASSWORD", "MINIO_ROOT_PASSWORD"),
    *("PROMETHEUS_PORT", "GRAFANA_PORT", "MAILPIT_PORT"),
}
WORKER_PAGES = {"/healthz", "/readyz"}


def commands() -> set[tuple[str, ...]]:
    """Every command of the program, as words."""
    found: set[tuple[str, ...]] = set()

    def walk(command: object, words: tuple[str, ...]) -> None:
        for name, each in getattr(command, "commands", {}).items():
            walk(each, (*words, name))
        if not hasattr(command, "commands"):
            found.add(words)

    walk(typer.main.get_command(app), ())
    return found


def as_the_specification_has_it(whole: dict[str, Any]) -> str:
    """The file for the checker, which does not know Docker's word for the machine's own address."""
    return yaml.safe_dump(whole).replace(":host-gateway", ":127.0.0.1")


# --- how variables are filled in


def test_a_variable_its_default_and_a_dollar_sign_are_told_apart() -> None:
    text = "${A}-${B:-${C:-c}}-${D:-}-$$x"
    assert interpolated(text, {"A": "1"}) == "1-c--$x"
    assert interpolated(text, {"A": "1", "C": "2"}) == "1-2--$x"
    assert interpolated(text, {"A": "1", "B": "3"}) == "1-3--$x"


@pytest.mark.parametrize("name", sorted(FILLED_IN))
def test_what_a_user_forgot_to_fill_in_is_named_with_the_fix(name: str) -> None:
    with pytest.raises(Missing, match=rf"{name}: set it in \.env, see \.env\.example"):
        project({key: value for key, value in FILLED_IN.items() if key != name})


# --- the file


def test_the_file_keeps_to_the_compose_specification() -> None:
    PyCompose.from_yaml(as_the_specification_has_it(project()))


def test_a_misspelt_key_would_be_noticed() -> None:
    misspelt = project()
    misspelt["services"]["api"]["restrat"] = "always"
    with pytest.raises(ValueError, match="restrat"):
        PyCompose.from_yaml(as_the_specification_has_it(misspelt))


def test_what_is_referred_to_is_declared() -> None:
    whole = project()
    for name, service in services().items():
        for kind in ("networks", "secrets"):
            wanted = {each if isinstance(each, str) else each["source"] for each in service.get(kind, [])}
            assert wanted <= set(whole[kind]), (name, kind)
        volumes = {volume.partition(":")[0] for volume in service.get("volumes", [])}
        assert {each for each in volumes if not each.startswith("./")} <= set(whole["volumes"]), name
        assert all((ROOT / each).exists() for each in volumes - {"./secrets"} if each.startswith("./")), name
        assert set(service.get("depends_on", {})) <= set(services()), name
        assert service.get("deploy") or "setup" in service.get("profiles", []), f"{name} has no bound"
        assert service["image"].count(":") == 1, f"{name} is not pinned"
        assert not service["image"].endswith((":latest", ":main", ":edge")), name


def test_whatever_is_waited_for_can_be_well_or_come_to_its_end() -> None:
    for name, service in services().items():
        for other, how in service.get("depends_on", {}).items():
            needed = services()[other]
            if how["condition"] == "service_healthy":
                assert needed["healthcheck"]["test"], (name, other)
            else:
                assert how["condition"] == "service_completed_successfully", (name, other)
                assert needed["restart"] == "no", (name, other)


def test_one_version_of_kafka_is_used_everywhere() -> None:
    pom = ElementTree.parse(ROOT / "deploy" / "kafka" / "pom.xml")
    version = pom.findtext(".//{*}kafka.version")
    assert services()["kafka"]["image"] == f"apache/kafka:{version}"


def test_the_broker_makes_no_topic_by_itself_and_is_reached_by_its_name() -> None:
    kafka = services()["kafka"]["environment"]
    assert kafka["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"
    assert kafka["KAFKA_ADVERTISED_LISTENERS"] == "PLAINTEXT://kafka:9092"
    assert len(base64.urlsafe_b64decode(kafka["CLUSTER_ID"] + "==")) == 16
    assert ours()["relay"]["environment"]["KAFKA_BOOTSTRAP_SERVERS"] == "kafka:9092"
    assert services()["kafka"]["volumes"] == [f"kafka:{kafka['KAFKA_LOG_DIRS']}"]


# --- our processes


def test_every_role_and_every_processor_has_a_service() -> None:
    said = {tuple(service["command"]) for service in workers().values()}
    assert said == {("api",), ("relay",), ("projector",), *(("processor", name) for name in PROCESSORS)}


def test_every_command_is_one_of_the_program() -> None:
    known = commands()
    for name, service in ours().items():
        words = tuple(service["command"])
        assert words in known or words[:1] in known, name


def test_every_variable_of_our_processes_is_a_setting() -> None:
    for name, service in ours().items():
        assert set(service["environment"]) - BOTO3 <= set(SETTINGS), name


def test_every_variable_in_the_file_is_a_setting_or_composes_own() -> None:
    text = FILE.read_text("utf-8") + EXAMPLE.read_text("utf-8")
    named = set(re.findall(r"\$\{([A-Z_0-9]+)", text)) | set(
        re.findall(r"^#?([A-Z_0-9]+)=", text, re.MULTILINE)
    )
    assert named - set(SETTINGS) - BOTO3 - COMPOSE_ONLY == set()


def test_every_required_variable_is_asked_for_in_the_example() -> None:
    required = set(re.findall(r"\$\{([A-Z_0-9]+):\?", FILE.read_text("utf-8")))
    assert required == set(FILLED_IN)
    assert required <= set(variables_of(EXAMPLE.read_text("utf-8")))


def test_the_program_accepts_the_settings_of_each_process() -> None:
    image = settings_of_the_image()
    for name, service in ours().items():
        said = read_settings(image | {key: str(value) for key, value in service["environment"].items()})
        assert said.database_url is not None, name
        assert said.kafka_bootstrap_servers == ("kafka:9092",), name
        assert said.base_url == "http://127.0.0.1:8080", name
        assert said.metrics_token, name


def test_defaults_are_those_of_the_program() -> None:
    changed = {
        *("DATABASE_URL", "KAFKA_BOOTSTRAP_SERVERS", "OLLAMA_HOST", "OSHAANI_BASE_URL"),
        *("OSHAANI_MASTER_KEY_FILE", "OSHAANI_METRICS_TOKEN"),
    }
    for name, service in ours().items():
        for variable, value in service["environment"].items():
            if variable in SETTINGS and variable not in changed and value:
                assert str(value) == SETTINGS[variable].default, (name, variable)


def test_the_api_alone_is_published_and_on_this_machine_only() -> None:
    published = {name: service["ports"] for name, service in services().items() if "ports" in service}
    optional = {name for name in published if services()[name].get("profiles")}
    assert published.keys() - optional == {"api"}
    assert published["api"] == [f"127.0.0.1:8080:{settings_of_the_image()['OSHAANI_PORT']}"]
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert project()["networks"]["inside"] == {"internal": True}
    assert all("inside" in service["networks"] for service in services().values() if "networks" in service)


def test_health_is_asked_for_where_the_program_answers() -> None:
    from oshaani.worker_http import worker_app

    pages = {route.path for route in worker_app("", "", None, None, None).routes}  # type: ignore[arg-type, attr-defined]
    for name, service in workers().items():
        program, path = service["healthcheck"]["test"][1:]
        assert (ROOT / "deploy" / "image" / program).exists(), name
        assert path in pages & WORKER_PAGES, name


def test_our_processes_have_no_more_rights_than_they_need() -> None:
    for name, service in ours().items():
        assert service["user"] == "10001:10001", name
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name


def test_only_processes_that_talk_to_the_world_can_reach_it() -> None:
    reaching = {name for name, service in workers().items() if "outside" in service["networks"]}
    assert reaching == {"api", "agent_turns", "tool_calls", "notifications"}


def test_all_that_read_the_log_share_large_parts_and_the_key() -> None:
    for name, service in ours().items():
        assert service["volumes"] == ["data:/var/lib/oshaani"], name
        assert service["secrets"] == ["master_key"], name


def test_a_process_gets_the_time_that_it_takes_to_end() -> None:
    from oshaani.roles.life import DRAIN_S

    for name, service in workers().items():
        assert int(service["stop_grace_period"].removesuffix("s")) >= DRAIN_S + 10, name


# --- secrets


def test_no_secret_is_in_the_files() -> None:
    secret = [name for name, setting in SETTINGS.items() if setting.is_secret] + ["POSTGRES_PASSWORD"]
    example = variables_of(EXAMPLE.read_text("utf-8"))
    assert [name for name in secret if example.get(name)] == []
    for name, service in raw()["services"].items():
        for variable, value in (service.get("environment") or {}).items():
            if variable in secret or re.search(r"PASSWORD$|SECRET|TOKEN|_KEY$", variable):
                assert re.fullmatch(r"\$\{\w+:[-?].*\}", str(value)), (name, variable)
                if variable != "DATABASE_URL":
                    assert re.fullmatch(r"\$\{\w+:(-|\?.+)\}", str(value)), (name, variable)


def test_git_ignores_what_a_user_fills_in() -> None:
    done = subprocess.run(
        ["git", "check-ignore", ".env", "secrets/master_key"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.stdout.split() == [".env", "secrets/master_key"]


def test_the_master_key_is_made_once_and_is_one_the_program_takes(tmp_path: Path) -> None:
    from oshaani.shapes import key_of

    service = services()["master-key"]
    (script,) = service["command"]
    assert service["entrypoint"] == ["sh", "-ec"]
    assert service["network_mode"] == "none"
    # As somebody who may give files away would; here nobody is given anything.
    script = script.replace("/secrets", str(tmp_path)).replace("chown", ": chown")
    keys = []
    for _ in range(2):
        subprocess.run(["sh", "-ec", script], timeout=20, check=True, capture_output=True)
        keys.append(key_of((tmp_path / "master_key").read_text()))
    assert keys[0] == keys[1]
    assert (tmp_path / "master_key").stat().st_mode & 0o077 == 0
