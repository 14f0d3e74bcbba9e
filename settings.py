"""The settings: everything that the environment may say, read once, in one place."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent
YES = ("1", "t", "true", "yes", "on")


class SettingsError(ValueError):
    """An environment variable holds something that cannot be used; the message says which and what would do."""


@dataclass(frozen=True)
class Settings:
    """What the environment says. An empty environment gives a playground that works.

    `database_url` is never shown: it may hold a password.
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

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Settings":
        """Read DATA_DIR, DATABASE_URL, GRADIO_SERVER_NAME and GRADIO_SERVER_PORT (or PORT). Empty means unset.

        TRAIN_IN_REQUEST (1 or 0) says whether a training run works inside the request that asked for it; it does so by
        itself on ZeroGPU hardware (SPACES_ZERO_GPU), where nothing else has a GPU.

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


def _port(name: str, text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535:
        return int(text)
    raise SettingsError(f"{name} must be a number from 1 to 65535, not {text[:40]!r}.")
