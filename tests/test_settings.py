"""Tests of the settings: defaults, environment variables, helpful errors, and secrets that are never shown."""

from pathlib import Path

import pytest

from settings import ROOT, Settings, SettingsError


def test_empty_environment_gives_the_defaults() -> None:
    settings = Settings.from_env({})
    assert settings == Settings()
    assert settings.store_url == f"sqlite:///{ROOT / 'data' / 'playground.sqlite3'}"
    assert (settings.host, settings.port) == ("127.0.0.1", 7860)


def test_server_variables_are_read() -> None:
    settings = Settings.from_env(
        {
            "DATA_DIR": "/somewhere/else",
            "DATABASE_URL": "postgres://me:secret@db/x",
            "GRADIO_SERVER_NAME": "0.0.0.0",
            "GRADIO_SERVER_PORT": "8000",
            "PORT": "9000",
        }
    )
    assert settings == Settings(Path("/somewhere/else"), "postgres://me:secret@db/x", "0.0.0.0", 8000)
    assert settings.store_url == "postgres://me:secret@db/x"


def test_port_variable_sets_the_port() -> None:
    assert Settings.from_env({"PORT": "9000"}).port == 9000


def test_space_listens_on_all_addresses_by_default() -> None:
    assert Settings.from_env({"SPACE_ID": "me/playground"}).host == "0.0.0.0"
    assert Settings.from_env({"SPACE_ID": "me/playground", "GRADIO_SERVER_NAME": "::1"}).host == "::1"
    assert Settings.from_env({}).host == "127.0.0.1"


def test_blank_variables_count_as_unset() -> None:
    names = ("DATA_DIR", "DATABASE_URL", "GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "PORT")
    assert Settings.from_env(dict.fromkeys(names, "  ")) == Settings()


@pytest.mark.parametrize("text", ["http", "0", "65536", "-1", "7860.0", "９０００", "9" * 5000, "0000099999"])
def test_invalid_port_is_rejected_with_its_variable(text: str) -> None:
    with pytest.raises(SettingsError, match="GRADIO_SERVER_PORT") as caught:
        Settings.from_env({"GRADIO_SERVER_PORT": text})
    assert len(str(caught.value)) < 200


def test_database_password_is_not_shown() -> None:
    settings = Settings.from_env({"DATABASE_URL": "postgres://me:hunter2@db/x"})
    assert "hunter2" not in repr(settings) + str(settings)


def test_moondream_variables_are_read_and_the_key_is_not_shown() -> None:
    settings = Settings.from_env(
        {
            "MOONDREAM_API_KEY": "md-1",
            "MOONDREAM_API_URL": "https://host/v1/",
            "MOONDREAM_RATE": "10",
            "MOONDREAM_ENDPOINTS": "lab=http://127.0.0.1:2020/v1, b=https://x/v1/",
        }
    )
    assert settings.moondream_key == "md-1"
    assert (settings.moondream_url, settings.moondream_rate) == ("https://host/v1", 10.0)
    assert dict(settings.endpoints) == {"lab": "http://127.0.0.1:2020/v1", "b": "https://x/v1"}
    assert "md-1" not in repr(settings)


@pytest.mark.parametrize(
    "env",
    [
        {"MOONDREAM_API_URL": "host/v1"},
        {"MOONDREAM_API_URL": "https://user:secret@host/v1"},
        {"MOONDREAM_RATE": "0"},
        {"MOONDREAM_RATE": "fast"},
        {"MOONDREAM_ENDPOINTS": "http://host/v1"},
        {"MOONDREAM_ENDPOINTS": "a b=http://host/v1"},
    ],
)
def test_invalid_moondream_server_is_rejected_without_its_password(env: dict[str, str]) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(env)
    assert "secret" not in str(caught.value)


def test_quota_of_uploads_is_a_number_of_megabytes() -> None:
    assert Settings.from_env({"UPLOAD_QUOTA_MB": "500"}).upload_quota == 500_000_000
    for text in ("0", "-1", "2.5", "2 GB", "9" * 5000):
        with pytest.raises(SettingsError, match="UPLOAD_QUOTA_MB"):
            Settings.from_env({"UPLOAD_QUOTA_MB": text})


def test_state_bucket_is_read_and_its_token_is_not_shown() -> None:
    settings = Settings.from_env({"STATE_BUCKET": "team/state", "STATE_BUCKET_TOKEN": "hf_secretsecret"})
    assert (settings.state_bucket, settings.state_bucket_token) == ("team/state", "hf_secretsecret")
    assert settings.state_bucket_seconds == 30 and "hf_secret" not in repr(settings)
    assert Settings.from_env({}).state_bucket is None
    for text in ("team", "team/a/b", "https://hf.co/buckets/team/state", "team/"):
        with pytest.raises(SettingsError, match="STATE_BUCKET"):
            Settings.from_env({"STATE_BUCKET": text})
    for text in ("0", "soon", "nan", "86400"):
        with pytest.raises(SettingsError, match="STATE_BUCKET_SECONDS"):
            Settings.from_env({"STATE_BUCKET_SECONDS": text})


def test_secret_of_webhooks_is_checked_without_being_shown() -> None:
    for text in ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "any text"):
        settings = Settings.from_env({"ALERT_WEBHOOK_SECRET": text})
        assert settings.alert_secret == text and text not in repr(settings)
    with pytest.raises(SettingsError, match="ALERT_WEBHOOK_SECRET") as caught:
        Settings.from_env({"ALERT_WEBHOOK_SECRET": "whsec_not base64"})
    assert "not base64" not in str(caught.value)


@pytest.mark.parametrize(
    ("env", "signals"),
    [
        ({}, ()),
        ({"ENDPOINT": "http://c:4318"}, ("traces", "metrics")),
        ({"TRACES_ENDPOINT": "http://c:4318/v1/traces"}, ("traces",)),
        ({"METRICS_ENDPOINT": "http://c:4318/v1/metrics"}, ("metrics",)),
        ({"ENDPOINT": "http://c:4318", "OTEL_METRICS_EXPORTER": "none"}, ("traces",)),
        ({"ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "True"}, ()),
    ],
)
def test_standard_variables_choose_the_signals_of_telemetry(env: dict[str, str], signals: tuple[str, ...]) -> None:
    full = {name if name.startswith("OTEL") else f"OTEL_EXPORTER_OTLP_{name}": text for name, text in env.items()}
    assert Settings.from_env(full).telemetry == signals
