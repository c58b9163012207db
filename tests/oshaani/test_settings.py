"""Settings: where they come from, how wrong ones are reported, how the master key is kept."""

from __future__ import annotations

import base64
import os
import threading
from ipaddress import ip_network
from pathlib import Path

import pytest

from domain.plans import DEFAULT_PLANS
from oshaani.master_key import master_key
from oshaani.settings import (
    ROOT_DATA_DIR,
    TABLE,
    Settings,
    SettingsInvalid,
    describe,
    read_settings,
)

KEY = bytes(range(32))
KEY_TEXT = base64.b64encode(KEY).decode("ascii")
DATABASE = "postgresql://oshaani:s3cret@db.internal:5432/oshaani?sslpassword=pem&sslmode=require"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def read(**environment: str) -> Settings:
    return read_settings({"HOME": "/home/ada", **environment})


def faults(**environment: str) -> tuple[str, ...]:
    with pytest.raises(SettingsInvalid) as refused:
        read(**environment)
    return refused.value.faults


def shown(settings: Settings) -> dict[str, tuple[str, str]]:
    return {line.name: (line.value_masked, line.source) for line in describe(settings)}


def test_without_any_setting_the_program_runs_embedded_on_this_machine():
    settings = read()
    assert settings.is_embedded
    assert (settings.host, settings.port, settings.base_url) == ("127.0.0.1", 8080, "http://127.0.0.1:8080")
    assert settings.kafka_bootstrap_servers == ()
    assert (settings.kafka_security_protocol, settings.kafka_sasl_password) == ("PLAINTEXT", None)
    assert settings.kafka_partitions == 8
    assert settings.ollama_url == "http://127.0.0.1:11434"
    assert settings.free_credits_ncr == 200 * 10**9
    assert settings.egress_allow == ()
    assert settings.egress_ports == (80, 443)
    assert settings.plans == DEFAULT_PLANS
    assert (settings.turn_deadline_s, settings.model_timeout_s, settings.session_days) == (300, 60, 14)
    assert settings.master_key_file == settings.data_dir / "master.key"


def test_every_setting_is_read_in_its_own_type():
    settings = read(
        OSHAANI_PORT="9000",
        OSHAANI_BASE_URL="https://oshaani.example.com/",
        OSHAANI_DATA_DIR="/srv/oshaani",
        DATABASE_URL=DATABASE,
        KAFKA_BOOTSTRAP_SERVERS="one:9092, two:9092",
        OPENAI_BASE_URL="http://127.0.0.1:8000/v1",
        AWS_DEFAULT_REGION="eu-central-1",
        OSHAANI_DEFAULT_MODEL="ollama:llama3.2:3b",
        OSHAANI_EGRESS_ALLOW="10.1.0.0/16,fd00::/8",
        OSHAANI_EGRESS_PORTS="443, 8443",
        FREE_CREDITS_AMOUNT="12.5",
        OSHAANI_MASTER_KEY=KEY_TEXT,
        OSHAANI_PLAN_LIMITS='{"free": {"message": 100}}',
        OSHAANI_LOG_LEVEL="DEBUG",
        OSHAANI_TURN_DEADLINE_S="90.5",
    )
    assert settings.port == 9000
    assert settings.base_url == "https://oshaani.example.com"
    assert settings.data_dir == Path("/srv/oshaani")
    assert settings.database_url == DATABASE
    assert settings.kafka_bootstrap_servers == ("one:9092", "two:9092")
    assert settings.aws_region == "eu-central-1"
    assert settings.default_model == "ollama:llama3.2:3b"
    assert settings.egress_allow == (ip_network("10.1.0.0/16"), ip_network("fd00::/8"))
    assert settings.egress_ports == (443, 8443)
    assert settings.free_credits_ncr == 12_500_000_000
    assert settings.plans["free"]["message"] == 100
    assert settings.log_level == "debug"
    assert settings.turn_deadline_s == 90.5
    assert master_key(settings) == KEY


def test_the_environment_goes_before_the_file_and_the_file_before_the_default():
    Path("oshaani.toml").write_text(
        'OSHAANI_PORT = 9001\nOSHAANI_HOST = "0.0.0.0"\nOSHAANI_EGRESS_PORTS = [443, 444]\n'
    )
    settings = read(OSHAANI_PORT="9002")
    assert (settings.host, settings.port, settings.egress_ports) == ("0.0.0.0", 9002, (443, 444))
    assert shown(settings)["OSHAANI_PORT"] == ("9002", "environment")
    assert shown(settings)["OSHAANI_HOST"] == ("0.0.0.0", "oshaani.toml")
    assert shown(settings)["OSHAANI_LOG_LEVEL"] == ("info", "default")
    assert shown(settings)["OSHAANI_BASE_URL"] == ("http://127.0.0.1:9002", "derived")
    assert shown(settings)["DATABASE_URL"] == ("", "not set")


def test_the_file_may_lie_elsewhere_and_may_hold_tables(tmp_path: Path):
    file = tmp_path / "other.toml"
    file.write_text("[OSHAANI_PLAN_LIMITS.free]\nmessage = 7\n")
    assert read(OSHAANI_CONFIG=str(file)).plans["free"]["message"] == 7


def test_a_named_file_must_exist_and_be_toml_and_name_known_settings(tmp_path: Path):
    [fault] = faults(OSHAANI_CONFIG="missing.toml")
    assert "does not exist" in fault
    Path("oshaani.toml").write_text("OSHAANI_PORT = = 1\n")
    [fault] = faults()
    assert "must be a readable TOML file" in fault
    Path("oshaani.toml").write_text("OSHAANI_PROT = 1\n")
    [fault] = faults()
    assert fault.startswith("OSHAANI_PROT (oshaani.toml) is not a setting")


def test_an_empty_variable_counts_as_not_set():
    settings = read(OSHAANI_PORT="", DATABASE_URL=" ", OPENAI_API_KEY="")
    assert (settings.port, settings.is_embedded, settings.openai_api_key) == (8080, True, None)


WRONG = {
    "OSHAANI_HOST": "two words",
    "OSHAANI_PORT": "65536",
    "OSHAANI_BASE_URL": "oshaani.example.com",
    "DATABASE_URL": "mysql://root@db/oshaani",
    "KAFKA_BOOTSTRAP_SERVERS": "one",
    "OLLAMA_HOST": "http://",
    "OPENAI_BASE_URL": "ftp://models",
    "OPENAI_API_KEY": "two words",
    "AWS_REGION": "Frankfurt",
    "OSHAANI_BEDROCK_ENDPOINT": "bedrock",
    "OSHAANI_DEFAULT_MODEL": "llama3",
    "OSHAANI_SEARCH_TAVILY_API_KEY": "two words",
    "OSHAANI_SEARCH_BRAVE_API_KEY": "two words",
    "OSHAANI_SEARCH_SEARXNG_URL": "searx",
    "OSHAANI_EGRESS_ALLOW": "10.0.0.1/8",
    "OSHAANI_EGRESS_PORTS": "http",
    "FREE_CREDITS_AMOUNT": "-1",
    "OSHAANI_MASTER_KEY": base64.b64encode(b"too short").decode("ascii"),
    "OSHAANI_PLAN_LIMITS": '{"gold": {}}',
    "OSHAANI_METRICS_TOKEN": "two words",
    "OSHAANI_LOG_LEVEL": "loud",
    "OSHAANI_TURN_DEADLINE_S": "inf",
    "OSHAANI_MODEL_TIMEOUT_S": "0",
    "OSHAANI_SESSION_DAYS": "1.5",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_names_itself_its_shape_and_a_right_value(name: str):
    more = {"OSHAANI_MASTER_KEY": KEY_TEXT} if name == "DATABASE_URL" else {}
    [fault] = faults(**more, **{name: WRONG[name]})
    [setting] = [setting for setting in TABLE if name in setting.names]
    assert fault.startswith(name)
    assert setting.shape.text in fault
    assert f"for example {name}=" in fault
    assert (WRONG[name] in fault) is not setting.is_secret


def test_all_faults_are_reported_together():
    reported = faults(OSHAANI_PORT="x", FREE_CREDITS_AMOUNT="much", DATABASE_URL=DATABASE)
    assert [fault.split()[0] for fault in reported] == [
        "OSHAANI_PORT",
        "FREE_CREDITS_AMOUNT",
        "OSHAANI_MASTER_KEY",
    ]


def test_every_example_in_the_table_but_the_keys_recipe_is_itself_right():
    for setting in TABLE:
        if setting.field not in ("given_master_key", "previous_master_keys"):
            setting.shape.read(setting.shape.example.strip("'"))


def test_an_external_database_needs_a_master_key():
    [fault] = faults(DATABASE_URL=DATABASE)
    assert fault.startswith("OSHAANI_MASTER_KEY is missing")
    assert read(DATABASE_URL=DATABASE, OSHAANI_MASTER_KEY_FILE="/run/secrets/key").master_key_file == Path(
        "/run/secrets/key"
    )


def test_the_key_and_its_file_together_are_refused():
    [fault] = faults(OSHAANI_MASTER_KEY=KEY_TEXT, OSHAANI_MASTER_KEY_FILE="/run/secrets/key")
    assert "unset one of them" in fault


def test_secrets_are_never_shown():
    settings = read(
        DATABASE_URL=DATABASE,
        OSHAANI_MASTER_KEY=KEY_TEXT,
        OPENAI_API_KEY="sk-secret",
        OSHAANI_METRICS_TOKEN="metrics-secret",
    )
    text = repr(describe(settings)) + repr(settings)
    for secret in ("s3cret", "=pem", KEY_TEXT, "sk-secret", "metrics-secret", repr(KEY)):
        assert secret not in text
    assert shown(settings)["DATABASE_URL"][0].startswith(
        "postgresql://oshaani:********@db.internal:5432/oshaani"
    )


def test_every_setting_is_described_once():
    names = [line.name for line in describe(read())]
    assert len(names) == len(set(names)) == len(TABLE)
    assert all(line.description.endswith(".") for line in describe(read()))


def test_the_data_folder_follows_the_user(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert read().data_dir == Path("/home/ada/.local/share/oshaani")
    assert read(XDG_DATA_HOME="/data").data_dir == Path("/data/oshaani")
    assert read(XDG_DATA_HOME="relative").data_dir == Path("/home/ada/.local/share/oshaani")
    with pytest.raises(SettingsInvalid, match="OSHAANI_DATA_DIR is missing"):
        read_settings({})
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert read(XDG_DATA_HOME="/data").data_dir == ROOT_DATA_DIR


@pytest.mark.parametrize(
    ("host", "base_url"), [("0.0.0.0", "http://127.0.0.1:8080"), ("::1", "http://[::1]:8080")]
)
def test_the_base_url_follows_from_host_and_port(host: str, base_url: str):
    assert read(OSHAANI_HOST=host).base_url == base_url


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("gpu:8000", "http://gpu:8000"),
        ("https://gpu.example.com", "https://gpu.example.com:443"),
        ("http://gpu.example.com/ollama/", "http://gpu.example.com:80/ollama"),
    ],
)
def test_ollamas_address_is_read_by_ollamas_rules(text: str, url: str):
    assert read(OLLAMA_HOST=text).ollama_url == url


def test_a_key_alone_means_openai_itself():
    assert read(OPENAI_API_KEY="sk-secret").openai_base_url == "https://api.openai.com/v1"
    assert read().openai_base_url is None


def test_the_master_key_is_made_once_and_closed_to_others(tmp_path: Path):
    settings = read(OSHAANI_DATA_DIR=str(tmp_path / "data"))
    first = master_key(settings)
    assert len(first) == 32
    assert master_key(settings) == first
    assert settings.master_key_file.stat().st_mode & 0o777 == 0o600
    assert list(settings.data_dir.iterdir()) == [settings.master_key_file]


def test_processes_that_start_at_once_agree_on_the_master_key(tmp_path: Path):
    settings = read(OSHAANI_DATA_DIR=str(tmp_path / "data"))
    keys: list[bytes] = []
    threads = [threading.Thread(target=lambda: keys.append(master_key(settings))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(keys) == 16
    assert len(set(keys)) == 1


def test_a_master_key_that_others_may_read_is_refused_with_the_fix(tmp_path: Path):
    settings = read(OSHAANI_DATA_DIR=str(tmp_path))
    master_key(settings)
    settings.master_key_file.chmod(0o644)
    with pytest.raises(SettingsInvalid, match=r"open to other users \(mode 0644\); run `chmod 600 "):
        master_key(settings)


def test_a_named_key_file_is_never_made(tmp_path: Path):
    file = tmp_path / "elsewhere" / "key"
    with pytest.raises(SettingsInvalid, match=r"cannot be used: No such file or directory; .*openssl rand"):
        master_key(read(OSHAANI_MASTER_KEY_FILE=str(file)))
    assert not file.exists()


def test_a_damaged_key_file_is_refused_and_left_alone(tmp_path: Path):
    file = tmp_path / "master.key"
    file.write_text("not a key\n")
    file.chmod(0o600)
    with pytest.raises(SettingsInvalid, match="must hold 32 bytes in base64"):
        master_key(read(OSHAANI_DATA_DIR=str(tmp_path)))
    assert file.read_text() == "not a key\n"


def test_a_login_at_kafka_is_read_and_its_password_never_shown():
    settings = read(
        KAFKA_SECURITY_PROTOCOL="sasl_ssl",
        KAFKA_SASL_MECHANISM="scram-sha-512",
        KAFKA_SASL_USERNAME="oshaani",
        KAFKA_SASL_PASSWORD="open sesame",
        KAFKA_SSL_CA_FILE="/etc/oshaani/ca.pem",
        OSHAANI_KAFKA_PARTITIONS="32",
    )
    assert (settings.kafka_security_protocol, settings.kafka_sasl_mechanism) == ("SASL_SSL", "SCRAM-SHA-512")
    assert (settings.kafka_sasl_username, settings.kafka_sasl_password) == ("oshaani", "open sesame")
    assert settings.kafka_ssl_ca_file == Path("/etc/oshaani/ca.pem")
    assert settings.kafka_partitions == 32
    assert shown(settings)["KAFKA_SASL_PASSWORD"][0] == "********"
    assert "sesame" not in repr(settings)


@pytest.mark.parametrize(
    ("environment", "fault"),
    [
        ({"KAFKA_SECURITY_PROTOCOL": "TLS"}, "must be one of PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL"),
        ({"KAFKA_SASL_MECHANISM": "GSSAPI"}, "must be one of PLAIN, SCRAM-SHA-256, SCRAM-SHA-512"),
        ({"OSHAANI_KAFKA_PARTITIONS": "12"}, "must be a number that divides 32 evenly"),
        (
            {"KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "KAFKA_SASL_USERNAME": "oshaani"},
            "KAFKA_SASL_PASSWORD is missing: with KAFKA_SECURITY_PROTOCOL=SASL_SSL it must be set",
        ),
        (
            {"KAFKA_SECURITY_PROTOCOL": "SSL", "KAFKA_SSL_CERT_FILE": "/cert.pem"},
            "KAFKA_SSL_KEY_FILE is missing: with KAFKA_SSL_CERT_FILE it must be set",
        ),
        (
            {"KAFKA_SASL_USERNAME": "oshaani"},
            "KAFKA_SASL_USERNAME has no effect without a login; set KAFKA_SECURITY_PROTOCOL to SASL_SSL",
        ),
        (
            {"KAFKA_SSL_CA_FILE": "/ca.pem"},
            "KAFKA_SSL_CA_FILE has no effect without encryption; set KAFKA_SECURITY_PROTOCOL to SSL or SASL_SSL",
        ),
    ],
)
def test_a_kafka_setting_that_cannot_be_is_named_with_the_fix(environment: dict[str, str], fault: str):
    (said,) = faults(**environment)
    assert fault in said
