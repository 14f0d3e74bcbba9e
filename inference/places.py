"""Where models are that are not loaded from files here: Moondream Cloud's address, and whether Photon can run."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from functools import lru_cache

CLOUD_URL = "https://api.moondream.ai/v1"
RATE = 2.0  # requests a second and key; Moondream Cloud allows ten where the balance is at least $10
CAPABILITY = 8.0  # of an NVIDIA GPU: Ampere


@lru_cache(maxsize=1)
def photon_unavailable() -> str | None:
    """Why Photon cannot run on this machine; None when it can. The machine is asked once."""
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    found = None if apple else capability()
    if not apple and found is None:
        return "it needs an NVIDIA GPU of compute capability 8.0 or more, or Apple silicon; here is neither."
    if found is not None and found < CAPABILITY:
        return f"it needs an NVIDIA GPU of compute capability 8.0 or more, and this one has {found}."
    if importlib.util.find_spec("kestrel") is None or importlib.util.find_spec("moondream") is None:
        return "its engine is not installed. Run `pip install -r requirements-gpu.txt` once."
    return None


def capability() -> float | None:
    """The compute capability of the best NVIDIA GPU, as its driver tells it; None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True).stdout
        return max((float(line) for line in told.split()), default=None)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
