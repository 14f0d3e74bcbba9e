"""Execute a run inside the request that submitted it, as ZeroGPU Spaces require.

On ZeroGPU hardware, `spaces.GPU` forks a process with a GPU for a limited time, charged to the visitor's quota.
Elsewhere the decorator returns the function unchanged, and the run is executed in the application's process.
"""

from __future__ import annotations

from pathlib import Path

import spaces

from training.runs.run import Run

STARTUP_SECONDS, MAX_SECONDS = 30, 300  # a longer run is resumed


def gpu_seconds(folder: str) -> int:
    """Estimate the GPU time that a run needs, in seconds, rather too long than too short."""
    return min(MAX_SECONDS, STARTUP_SECONDS + Run(Path(folder)).config().steps)


@spaces.GPU(duration=gpu_seconds)
def run_inline(folder: str) -> None:
    """Execute a run to its end. Its folder holds the outcome; a forked process returns nothing else."""
    from training.grpo.__main__ import run_in_process

    run_in_process(Run(Path(folder)))
