"""Where a local model's files lie, and why it cannot be used here: cheap looks at the disk, no torch, no network."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inference.registry import ModelSpec

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
NVIDIA = ("/proc/driver/nvidia/version", "/dev/nvidia0", "/dev/dxg")


def unavailable(entry: ModelSpec) -> str | None:
    """Why a local model cannot be used on this machine, and what to do about it; None when it can."""
    if entry.backend != "local":
        return None
    return _missing_torch() or _missing_gpu(entry) or missing_files(entry) or _missing_memory(entry)


@cache
def _missing_torch() -> str | None:
    if find_spec("torch") and find_spec("transformers"):
        return None
    return "this deployment has no torch (requirements-slim.txt): hosted models alone answer here."


def missing_files(entry: ModelSpec) -> str | None:
    """What to do to get the files of a model that are not here; None when all are."""
    if model_folder(entry) is None:
        return _how_to_get(entry)
    if entry.tokenizer and tokenizer_folder(entry) is None:
        return f"its tokenizer is not on this machine. Run `hf download {entry.tokenizer}` once."
    if entry.adapter and not (Path(entry.adapter) / "adapter_config.json").is_file():
        return f"its adapter {Path(entry.adapter).name!r} is not there (any more)."
    return None


def model_folder(entry: ModelSpec) -> Path | None:
    """The folder with config and weights: the one the user named, else the source, else the Hub's cache."""
    named = _named_folder(entry)
    if named:
        return named if _is_model(named) else None
    if _is_repository(entry.source):
        config = _cached(entry.source, CONFIG, entry.revision)
        return config.parent if config and _is_model(config.parent) else None
    return Path(entry.source) if _is_model(Path(entry.source)) else None


def weights_file(folder: Path) -> Path:
    """The file that the weights begin in: the only one, or the list of several."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder / WEIGHTS[0])


def tokenizer_folder(entry: ModelSpec) -> Path | None:
    """The folder with the tokenizer: the model's own, or that of the tokenizer's repository in the Hub's cache.

    A folder that the user named may hold the right tokenizer or a stale one; whether its ids are right is checked
    when it is loaded, so the repository's is preferred.
    """
    if not entry.tokenizer:
        return model_folder(entry)
    cached = _cached(entry.tokenizer, TOKENIZER, None)
    named = _named_folder(entry)
    if cached:
        return cached.parent
    return named if named and (named / TOKENIZER).is_file() else None


def has_gpu() -> bool:
    """Whether an accelerator's driver is here; torch decides later whether it can be used."""
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    return apple or any(os.path.exists(path) for path in NVIDIA)


def _named_folder(entry: ModelSpec) -> Path | None:
    named = os.environ.get(entry.folder_variable or "", "").strip() if entry.folder_variable else ""
    return Path(named).expanduser() if named else None


def _is_repository(source: str) -> bool:
    return not os.path.isabs(source) and source.count("/") == 1 and not os.path.isdir(source)


def _is_model(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and weights_file(folder).is_file()


def _cached(repository: str, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _missing_gpu(entry: ModelSpec) -> str | None:
    if entry.needs_gpu and not has_gpu():
        return "it needs a GPU, and this machine has none (without one a single answer would take minutes)."
    return None


def _how_to_get(entry: ModelSpec) -> str:
    named = _named_folder(entry)
    if named:
        return f"{entry.folder_variable} names {named}, where {CONFIG} and {WEIGHTS[0]} were not found."
    if not _is_repository(entry.source):
        return f"its weights are missing in {Path(entry.source).name}; get the project's files again."
    revision = f" --revision {entry.revision}" if entry.revision else ""
    commands = [f"`hf download {entry.source}{revision}`"]
    if entry.tokenizer:
        commands.append(f"`hf download {entry.tokenizer}`")
    folder = f", or set {entry.folder_variable} to a folder that holds them" if entry.folder_variable else ""
    return f"its weights are not on this machine. Run {' and '.join(commands)} once{folder}."


def _missing_memory(entry: ModelSpec) -> str | None:
    free = free_memory()
    if free is None or free >= entry.memory_bytes:
        return None
    return f"it takes {entry.memory_bytes / 2**30:.0f} GB of memory, and {free / 2**30:.1f} GB are free."


def free_memory() -> int | None:
    """Bytes of main memory that are available; None where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
