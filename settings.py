"""Application settings, read from environment variables."""

import hashlib
import re
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent
VERSION = "0.6.0"
TRUE_VALUES = ("1", "t", "true", "yes", "on")


class SettingsError(ValueError):
    """Raised for an invalid environment variable. The message names it and says what is allowed."""


@dataclass(frozen=True)
class Settings:
    """Settings of the application. The defaults give a working local playground.

    Attributes:
        data_dir: Folder of runs, finetunes, spooled usage events and the SQLite database.
        database_url: URL of the database; by default an SQLite file in `data_dir`. Not part of the repr.
        host: Address to listen on.
        port: Port to listen on.
        branch: Git branch of the deployment; by default that of the checkout.
        commit: Git commit of the deployment.
        space: Hugging Face Space as owner/name.
        space_host: Host name of the Space.
        hardware: Name of this machine in the table of prices.
        prices: JSON file that overrides the table of prices.
        train_in_request: Whether training runs work inside the request that starts them, as ZeroGPU requires.
        moondream_key: API key of Moondream Cloud. Not part of the repr.
        moondream_url: Address of Moondream Cloud's API.
        moondream_rate: Requests per second to Moondream Cloud.
        endpoints: Addresses of other servers with Moondream's API, by name.
        api_keys: SHA-256 digests of the keys of this deployment's API, in hexadecimal. Not part of the repr.
        api_rate: Requests per second for each of these keys.
        oauth: Whether visitors of the Space can sign in with Hugging Face.
        admins: User names on Hugging Face of further administrators of the Space.
        guest_runs: Whether guests may start short training runs on this machine.
        behind_proxy: Whether a reverse proxy on this machine passes other machines' requests on, so that a request from
            this machine is not necessarily its user's.
        upload_quota: Bytes of photos that visitors upload for training runs, of all visitors together.
        retention_months: Months after which usage events are archived.
        alert_webhook: Address that alerts are sent to. Not part of the repr, because it may contain a secret.
        alert_secret: Key of their signatures. Not part of the repr.
        telemetry: Signals that are sent to collectors of OpenTelemetry: "traces" and "metrics".
        metrics_token: SHA-256 digest of the token that may only read /v1/usage and /metrics. Not part of the repr.
        state_bucket: Hugging Face Storage Bucket that keeps the state of `data_dir`, as owner/name.
        state_bucket_token: Token with write access to it; by default HF_TOKEN. Not part of the repr.
        state_bucket_seconds: Time between two saves, in seconds.
    """

    data_dir: Path = ROOT / "data"
    database_url: str | None = field(default=None, repr=False)
    host: str = "127.0.0.1"
    port: int = 7860
    branch: str | None = None
    commit: str | None = None
    space: str | None = None
    space_host: str | None = None
    hardware: str | None = None
    prices: Path | None = None
    train_in_request: bool = False
    moondream_key: str | None = field(default=None, repr=False)
    moondream_url: str | None = None
    moondream_rate: float | None = None
    endpoints: Mapping[str, str] = field(default_factory=dict)
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    api_rate: float = 10.0
    oauth: bool = False
    admins: tuple[str, ...] = ()
    guest_runs: bool = False
    behind_proxy: bool = False
    upload_quota: int = 2_000_000_000
    retention_months: int = 13
    telemetry: tuple[str, ...] = ()
    alert_webhook: str | None = field(default=None, repr=False)
    alert_secret: str = field(default="", repr=False)
    metrics_token: str = field(default="", repr=False)
    state_bucket: str | None = None
    state_bucket_token: str | None = field(default=None, repr=False)
    state_bucket_seconds: float = 30.0

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> "Settings":
        """Read settings from environment variables. Empty variables count as unset.

        - Server: DATA_DIR, DATABASE_URL, GRADIO_SERVER_NAME (in a Space the default is 0.0.0.0), GRADIO_SERVER_PORT or
          PORT.
        - Training: TRAIN_IN_REQUEST (1 or 0; on ZeroGPU hardware the default is SPACES_ZERO_GPU), UPLOAD_QUOTA_MB
          (megabytes of uploaded photos).
        - Moondream Cloud: MOONDREAM_API_KEY, MOONDREAM_API_URL, MOONDREAM_RATE (requests per second).
        - Other servers with Moondream's API: MOONDREAM_ENDPOINTS, as name=address, separated by commas.
        - This deployment's API: PLAYGROUND_API_KEYS, separated by commas, each a key or "sha256:" and its digest;
          PLAYGROUND_API_RATE (requests per second for each key).
        - Access: PLAYGROUND_ADMINS (user names on Hugging Face, separated by commas), GUEST_RUNS and PLAYGROUND_PROXIED
          (1 or 0). A Space with `hf_oauth` sets OAUTH_CLIENT_ID.
        - Usage: PREVIEW_BRANCH, PREVIEW_COMMIT, SPACE_ID, PRICES_FILE, HARDWARE, METRICS_TOKEN (a token or "sha256:"
          and its digest, with which a program may only read usage and metrics), USAGE_RETENTION_MONTHS (2 to 120),
          OTEL_EXPORTER_OTLP_ENDPOINT (address of an OpenTelemetry collector; also the other standard variables of its
          addresses, OTEL_TRACES_EXPORTER, OTEL_METRICS_EXPORTER and OTEL_SDK_DISABLED), ALERT_WEBHOOK_URL and
          ALERT_WEBHOOK_SECRET (receiver of alerts, and the key of their signatures).
        - State: STATE_BUCKET (owner/name), STATE_BUCKET_TOKEN, STATE_BUCKET_SECONDS (1 to 3600).

        Args:
            environ: Environment variables.

        Raises:
            SettingsError: A variable is invalid.
        """
        env = {name: text.strip() for name, text in environ.items() if text.strip()}
        port_name = "GRADIO_SERVER_PORT" if "GRADIO_SERVER_PORT" in env else "PORT"
        moondream_url, moondream_rate = env.get("MOONDREAM_API_URL"), env.get("MOONDREAM_RATE")
        return cls(
            data_dir=Path(env["DATA_DIR"]).expanduser() if "DATA_DIR" in env else cls.data_dir,
            database_url=env.get("DATABASE_URL"),
            host=env.get("GRADIO_SERVER_NAME", "0.0.0.0" if "SPACE_ID" in env else cls.host),
            port=_parse_port(port_name, env[port_name]) if port_name in env else cls.port,
            branch=env.get("PREVIEW_BRANCH"),
            commit=env.get("PREVIEW_COMMIT"),
            space=env.get("SPACE_ID"),
            space_host=env.get("SPACE_HOST", "").partition(",")[0] or None,
            hardware=_detect_hardware(env),
            prices=Path(env["PRICES_FILE"]).expanduser() if "PRICES_FILE" in env else None,
            train_in_request=env.get("TRAIN_IN_REQUEST", env.get("SPACES_ZERO_GPU", "")).lower() in TRUE_VALUES,
            moondream_key=env.get("MOONDREAM_API_KEY"),
            moondream_url=_parse_address("MOONDREAM_API_URL", moondream_url) if moondream_url else None,
            moondream_rate=_parse_rate("MOONDREAM_RATE", moondream_rate) if moondream_rate else None,
            endpoints=_parse_endpoints(env.get("MOONDREAM_ENDPOINTS", "")),
            api_keys=_parse_api_keys(env.get("PLAYGROUND_API_KEYS", "")),
            api_rate=_parse_rate("PLAYGROUND_API_RATE", env.get("PLAYGROUND_API_RATE", str(cls.api_rate))),
            oauth="SPACE_ID" in env and "OAUTH_CLIENT_ID" in env,
            admins=_parse_names("PLAYGROUND_ADMINS", env.get("PLAYGROUND_ADMINS", "")),
            guest_runs=env.get("GUEST_RUNS", "").lower() in TRUE_VALUES,
            behind_proxy=env.get("PLAYGROUND_PROXIED", "").lower() in TRUE_VALUES,
            upload_quota=_parse_megabytes("UPLOAD_QUOTA_MB", env["UPLOAD_QUOTA_MB"])
            if "UPLOAD_QUOTA_MB" in env
            else cls.upload_quota,
            retention_months=_parse_months(env.get("USAGE_RETENTION_MONTHS", str(cls.retention_months))),
            alert_webhook=_parse_webhook(env["ALERT_WEBHOOK_URL"]) if "ALERT_WEBHOOK_URL" in env else None,
            alert_secret=_parse_webhook_secret(env.get("ALERT_WEBHOOK_SECRET", "")),
            telemetry=_parse_telemetry(env),
            metrics_token=_parse_secret("METRICS_TOKEN", env["METRICS_TOKEN"]) if "METRICS_TOKEN" in env else "",
            state_bucket=_parse_bucket(env["STATE_BUCKET"]) if "STATE_BUCKET" in env else None,
            state_bucket_token=env.get("STATE_BUCKET_TOKEN"),
            state_bucket_seconds=_parse_save_interval(env.get("STATE_BUCKET_SECONDS", str(cls.state_bucket_seconds))),
        )

    @property
    def access_mode(self) -> Literal["local", "link", "space"]:
        """How administrators are recognized; see `access.control.AccessControl`."""
        if self.space:
            return "space"
        return "local" if self.host in ("127.0.0.1", "localhost", "::1") and not self.behind_proxy else "link"

    @property
    def store_url(self) -> str:
        """URL of the database: `database_url`, or an SQLite file in `data_dir`."""
        return self.database_url or f"sqlite:///{self.data_dir / 'playground.sqlite3'}"


def _parse_bucket(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,96}/[A-Za-z0-9._-]{1,96}", text):
        raise SettingsError("STATE_BUCKET must be a bucket's owner and name, like team/playground-state.")
    return text


def _parse_save_interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 3600:
        raise SettingsError("STATE_BUCKET_SECONDS must be a number of seconds from 1 to 3600.")
    return seconds


def _parse_telemetry(env: Mapping[str, str]) -> tuple[str, ...]:
    """Return the signals for which the standard variables name a collector."""
    if env.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return ()
    return tuple(
        signal.lower()
        for signal in ("TRACES", "METRICS")
        if env.keys() & {"OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT"}
        and env.get(f"OTEL_{signal}_EXPORTER") != "none"
    )


def _parse_webhook(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingsError("ALERT_WEBHOOK_URL must be an address like https://example.org/hook.")
    return text


def _parse_webhook_secret(text: str) -> str:
    try:
        if text.startswith("whsec_"):
            b64decode(text.removeprefix("whsec_"), validate=True)
    except ValueError:
        raise SettingsError("ALERT_WEBHOOK_SECRET must be base64 after whsec_.") from None
    return text


def _parse_months(text: str) -> int:
    if not text.isdecimal() or not 2 <= int(text) <= 120:
        raise SettingsError("USAGE_RETENTION_MONTHS must be a number of months from 2 to 120.")
    return int(text)


def _parse_names(name: str, text: str) -> tuple[str, ...]:
    names = tuple(filter(None, (part.strip() for part in text.split(","))))
    if not all(re.fullmatch(r"[A-Za-z0-9_.-]{1,96}", part) for part in names):
        raise SettingsError(f"{name} must be user names on Hugging Face, separated by commas.")
    return names


def _detect_hardware(env: Mapping[str, str]) -> str | None:
    """Return HARDWARE, or the hardware of a Space; None if unknown.

    A Space sets ACCELERATOR ("none" or the GPU) and CPU_CORES. Its CPU machines have 2 or 8 cores.
    """
    if "HARDWARE" in env or "SPACE_ID" not in env:
        return env.get("HARDWARE")
    if env.get("ACCELERATOR", "none").lower() != "none":
        return env["ACCELERATOR"]
    return {"2": "cpu-basic", "8": "cpu-upgrade"}.get(env.get("CPU_CORES", ""))


def _parse_address(name: str, text: str) -> str:
    parts = urlsplit(text.rstrip("/"))
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise SettingsError(f"{name} must be an address like https://api.moondream.ai/v1.")
    return text.rstrip("/")


def _parse_rate(name: str, text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate <= 1000:
        raise SettingsError(f"{name} must be a number of requests per second, more than 0 and at most 1000.")
    return rate


def _parse_megabytes(name: str, text: str) -> int:
    """Return a number of megabytes in bytes."""
    if text.isascii() and text.isdigit() and len(text) <= 9 and int(text):
        return int(text) * 1_000_000
    raise SettingsError(f"{name} must be a whole number of megabytes, more than 0.")


def _parse_api_keys(text: str) -> tuple[str, ...]:
    keys = filter(None, (part.strip() for part in text.split(",")))
    return tuple(_parse_secret("PLAYGROUND_API_KEYS", key) for key in keys)


def _parse_secret(name: str, secret: str) -> str:
    """Return the SHA-256 digest of a key or token, or the digest that it contains. Errors do not contain the secret."""
    prefix, _, digest = secret.partition(":")
    if prefix == "sha256" and not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise SettingsError(f"{name}: sha256: must be followed by 64 hexadecimal digits in lower case.")
    if prefix != "sha256" and not re.fullmatch(r"[!-~]{16,500}", secret):
        what = "the token" if name == "METRICS_TOKEN" else "each key"
        raise SettingsError(f"{name}: {what} needs 16 to 500 ASCII characters without spaces.")
    return digest if prefix == "sha256" else hashlib.sha256(secret.encode()).hexdigest()


def _parse_endpoints(text: str) -> dict[str, str]:
    endpoints = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, address = (piece.strip() for piece in part.partition("="))
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,60}", name):
            raise SettingsError("MOONDREAM_ENDPOINTS must look like: lab=http://127.0.0.1:2020/v1, other=https://…/v1.")
        endpoints[name] = _parse_address("MOONDREAM_ENDPOINTS", address)
    return endpoints


def _parse_port(name: str, text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535:
        return int(text)
    raise SettingsError(f"{name} must be a number from 1 to 65535, not {text[:40]!r}.")
