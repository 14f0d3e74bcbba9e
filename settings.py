"""The settings: everything that the environment may say, read once, in one place."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent
VERSION = "0.6.0"
YES = ("1", "t", "true", "yes", "on")


class SettingsError(ValueError):
    """An environment variable holds something that cannot be used; the message says which and what would do."""


@dataclass(frozen=True)
class Settings:
    """What the environment says. An empty environment gives a playground that works.

    `database_url` and `moondream_key` are never shown: they hold secrets.
    """

    data_dir: Path = ROOT / "data"
    database_url: str | None = field(default=None, repr=False)
    host: str = "127.0.0.1"
    port: int = 7860
    branch: str | None = None
    commit: str | None = None
    space: str | None = None
    hardware: str | None = None
    prices: Path | None = None
    train_in_request: bool = False
    moondream_key: str | None = field(default=None, repr=False)
    moondream_url: str | None = None
    moondream_rate: float | None = None
    endpoints: Mapping[str, str] = field(default_factory=dict)
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    api_rate: float = 10.0

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Settings":
        """Read DATA_DIR, DATABASE_URL, GRADIO_SERVER_NAME and GRADIO_SERVER_PORT (or PORT). Empty means unset.

        TRAIN_IN_REQUEST (1 or 0) says whether a training run works inside the request that asked for it; it does so by
        itself on ZeroGPU hardware (SPACES_ZERO_GPU), where nothing else has a GPU.

        Of Moondream Cloud: MOONDREAM_API_KEY, MOONDREAM_API_URL, MOONDREAM_RATE (requests a second); of other servers
        that speak its API: MOONDREAM_ENDPOINTS, as name=address, separated by commas.

        Of this deployment's own API: PLAYGROUND_API_KEYS, separated by commas, each a key or "sha256:" and its digest;
        what is kept are digests. PLAYGROUND_API_RATE: requests a second for each key.

        For usage: PREVIEW_BRANCH, PREVIEW_COMMIT, SPACE_ID, PRICES_FILE, and the hardware (see `_hardware`).

        In a Space (SPACE_ID) the server listens to the outside unless it is told otherwise. Raises SettingsError for a
        port that is none.
        """
        said = {name: text.strip() for name, text in env.items() if text.strip()}
        port_name = "GRADIO_SERVER_PORT" if "GRADIO_SERVER_PORT" in said else "PORT"
        return cls(
            data_dir=Path(said["DATA_DIR"]).expanduser() if "DATA_DIR" in said else cls.data_dir,
            database_url=said.get("DATABASE_URL"),
            host=said.get("GRADIO_SERVER_NAME", "0.0.0.0" if "SPACE_ID" in said else cls.host),
            port=_port(port_name, said[port_name]) if port_name in said else cls.port,
            branch=said.get("PREVIEW_BRANCH"),
            commit=said.get("PREVIEW_COMMIT"),
            space=said.get("SPACE_ID"),
            hardware=_hardware(said),
            prices=Path(said["PRICES_FILE"]).expanduser() if "PRICES_FILE" in said else None,
            train_in_request=said.get("TRAIN_IN_REQUEST", said.get("SPACES_ZERO_GPU", "")).lower() in YES,
            moondream_key=said.get("MOONDREAM_API_KEY"),
            moondream_url=_address("MOONDREAM_API_URL", said["MOONDREAM_API_URL"])
            if "MOONDREAM_API_URL" in said
            else None,
            moondream_rate=_rate("MOONDREAM_RATE", said["MOONDREAM_RATE"]) if "MOONDREAM_RATE" in said else None,
            endpoints=_endpoints(said.get("MOONDREAM_ENDPOINTS", "")),
            api_keys=_digests(said.get("PLAYGROUND_API_KEYS", "")),
            api_rate=_rate("PLAYGROUND_API_RATE", said.get("PLAYGROUND_API_RATE", str(cls.api_rate))),
        )

    @property
    def store_url(self) -> str:
        """Where the store is: DATABASE_URL, or without one an SQLite file in the data folder."""
        return self.database_url or f"sqlite:///{self.data_dir / 'playground.sqlite3'}"


def _hardware(said: Mapping[str, str]) -> str | None:
    """The machine's name in the table of prices: HARDWARE, or what a Space says of itself; None where nobody says.

    A Space states ACCELERATOR ("none", or the kind of GPU) and CPU_CORES. Its two CPU machines have 2 and 8 cores.
    """
    if "HARDWARE" in said or "SPACE_ID" not in said:
        return said.get("HARDWARE")
    if said.get("ACCELERATOR", "none").lower() != "none":
        return said["ACCELERATOR"]
    return {"2": "cpu-basic", "8": "cpu-upgrade"}.get(said.get("CPU_CORES", ""))


def _address(name: str, text: str | None) -> str | None:
    if text is None:
        return None
    parts = urlsplit(text.rstrip("/"))
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise SettingsError(f"{name} must hold an address like https://api.moondream.ai/v1.")
    return text.rstrip("/")


def _rate(name: str, text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate <= 1000:
        raise SettingsError(f"{name} must be a number of requests a second, more than 0 and at most 1000.")
    return rate


def _digests(text: str) -> tuple[str, ...]:
    """The SHA-256 of each key, in hexadecimal. The text itself stays out of every message."""
    found = []
    for key in filter(None, (part.strip() for part in text.split(","))):
        kind, _, digest = key.partition(":")
        if kind == "sha256" and not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise SettingsError("PLAYGROUND_API_KEYS: behind sha256: there must be 64 digits and letters a to f.")
        if kind != "sha256" and not re.fullmatch(r"[!-~]{16,500}", key):
            raise SettingsError("PLAYGROUND_API_KEYS: each key needs 16 to 500 characters, without spaces.")
        found.append(digest if kind == "sha256" else hashlib.sha256(key.encode()).hexdigest())
    return tuple(found)


def _endpoints(text: str) -> dict[str, str]:
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, address = (piece.strip() for piece in part.partition("="))
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,60}", name):
            raise SettingsError("MOONDREAM_ENDPOINTS must look like: lab=http://127.0.0.1:2020/v1, other=https://…/v1.")
        found[name] = _address("MOONDREAM_ENDPOINTS", address) or ""
    return found


def _port(name: str, text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535:
        return int(text)
    raise SettingsError(f"{name} must be a number from 1 to 65535, not {text[:40]!r}.")
