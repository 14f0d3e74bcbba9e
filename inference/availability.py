"""Whether a model can be used on this machine, and where its files are. Imports no torch and uses no network."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from inference.types import ModelSpec

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
NVIDIA_DEVICES = ("/proc/driver/nvidia/version", "/dev/nvidia0", "/dev/dxg")
PHOTON_CAPABILITY = 8.0  # minimum CUDA compute capability (Ampere)


def unavailable(spec: ModelSpec) -> str | None:
    """Return why a model cannot be used and what to do about it, or None if it can be used."""
    if spec.backend == "hosted":
        if spec.needs_key and spec.key is None:
            return "it needs a Moondream API key. Enter one under “Moondream API key”, or set MOONDREAM_API_KEY."
        return None
    if spec.backend == "photon":
        return photon_unavailable() or _photon_problem(spec.source)
    if spec.backend != "local":
        return None
    if not _has_torch():
        return "this deployment has no torch (requirements-slim.txt); only hosted models are available."
    if spec.needs_gpu and not has_gpu():
        return "it needs a GPU, and this machine has none (on a CPU a single answer would take minutes)."
    reason = missing_files(spec)
    if reason:
        return reason
    free = free_memory()
    if free is not None and free < spec.memory_bytes:
        return f"it needs {spec.memory_bytes / 2**30:.0f} GB of memory, but only {free / 2**30:.1f} GB are free."
    return None


def _photon_problem(source: str) -> str | None:
    """Return why the engine of a model refuses requests. Imports no engine."""
    photon = sys.modules.get("inference.photon")
    return photon.engine_of(source).problem() if photon else None


@cache
def photon_unavailable() -> str | None:
    """Return why Photon cannot run on this machine, or None if it can. Cached for the process."""
    apple = _is_apple_silicon()
    capability = None if apple else compute_capability()
    if not apple and capability is None:
        return "it needs an NVIDIA GPU with compute capability 8.0 or higher, or Apple silicon; here is neither."
    if capability is not None and capability < PHOTON_CAPABILITY:
        return f"it needs an NVIDIA GPU with compute capability 8.0 or higher; this one has {capability}."
    if find_spec("kestrel") is None or find_spec("moondream") is None:
        return "its engine is not installed. Run `pip install -r requirements-gpu.txt` once."
    return None


def compute_capability() -> float | None:
    """Return the highest CUDA compute capability reported by nvidia-smi, or None without an NVIDIA GPU."""
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return None
    command = [nvidia_smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
        return max((float(line) for line in output.split()), default=None)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def has_gpu() -> bool:
    """Whether a GPU driver is present. PyTorch may still be unable to use it."""
    return _is_apple_silicon() or any(os.path.exists(path) for path in NVIDIA_DEVICES)


def free_memory() -> int | None:
    """Return the available main memory in bytes, or None if the system does not report it."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def missing_files(spec: ModelSpec) -> str | None:
    """Return which files of a local model are missing and how to get them, or None if all are present."""
    if model_folder(spec) is None:
        return _missing_weights(spec)
    if spec.tokenizer and tokenizer_folder(spec) is None:
        return f"its tokenizer is not on this machine. Run `hf download {spec.tokenizer}` once."
    if spec.adapter and not (Path(spec.adapter) / "adapter_config.json").is_file():
        return f"its adapter {Path(spec.adapter).name!r} does not exist."
    return None


def model_folder(spec: ModelSpec) -> Path | None:
    """Return the folder with config and weights, or None if they are missing.

    The folder named by the environment variable takes precedence over `spec.source`; repositories are looked up in the
    Hugging Face cache.
    """
    folder = _folder_from_environment(spec)
    if folder is None and _is_repository(spec.source):
        config = _cached_file(spec.source, CONFIG, spec.revision)
        folder = config.parent if config else None
    elif folder is None:
        folder = Path(spec.source)
    return folder if folder and (folder / CONFIG).is_file() and weights_file(folder).is_file() else None


def weights_file(folder: Path) -> Path:
    """Return the safetensors file of a folder, or the index of a sharded checkpoint."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder / WEIGHTS[0])


def tokenizer_folder(spec: ModelSpec) -> Path | None:
    """Return the folder with the tokenizer, or None if it is missing.

    The tokenizer repository in the Hugging Face cache is preferred: a folder named by the environment variable may
    contain a stale tokenizer, which is only detected when it is loaded.
    """
    if not spec.tokenizer:
        return model_folder(spec)
    cached = _cached_file(spec.tokenizer, TOKENIZER, None)
    if cached:
        return cached.parent
    folder = _folder_from_environment(spec)
    return folder if folder and (folder / TOKENIZER).is_file() else None


@cache
def _has_torch() -> bool:
    return bool(find_spec("torch") and find_spec("transformers"))


def _is_apple_silicon() -> bool:
    return platform.system() == "Darwin" and platform.machine() == "arm64"


def _folder_from_environment(spec: ModelSpec) -> Path | None:
    folder = os.environ.get(spec.folder_variable or "", "").strip() if spec.folder_variable else ""
    return Path(folder).expanduser() if folder else None


def _is_repository(source: str) -> bool:
    return not os.path.isabs(source) and source.count("/") == 1 and not os.path.isdir(source)


def _cached_file(repository: str, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, name, revision=revision)
    return Path(path) if isinstance(path, str) else None


def _missing_weights(spec: ModelSpec) -> str:
    folder = _folder_from_environment(spec)
    if folder:
        return f"{spec.folder_variable} is set to {folder}, which does not contain {CONFIG} and {WEIGHTS[0]}."
    if not _is_repository(spec.source):
        return f"its weights are missing in {Path(spec.source).name}. Restore the project's files."
    revision = f" --revision {spec.revision}" if spec.revision else ""
    commands = [f"`hf download {spec.source}{revision}`"]
    if spec.tokenizer:
        commands.append(f"`hf download {spec.tokenizer}`")
    hint = f", or set {spec.folder_variable} to a folder that contains them" if spec.folder_variable else ""
    return f"its weights are not on this machine. Run {' and '.join(commands)} once{hint}."
