"""A run inside the request that asked for it: on ZeroGPU hardware nothing else has a GPU.

There `spaces` forks a process off for the call, with a GPU for so many seconds of the visitor's quota. Off that
hardware the decorator gives the function back as it is, and the run works in the process of the page.
"""

from __future__ import annotations

from pathlib import Path

import spaces

from training.runs.run import Run

STARTING, MOST = 30, 300  # seconds: to start with, and what is asked for at most; a run that needs more is resumed


def seconds(folder: str) -> int:
    """What a run asks of the quota: a guess, on the long side."""
    return min(MOST, STARTING + Run(Path(folder)).config().steps)


@spaces.GPU(duration=seconds)
def do(folder: str) -> None:
    """Does the run, to its end; its folder says how it ended. In a forked process only the folder comes back."""
    from training.grpo import train as grpo

    grpo.inside(Run(Path(folder)))
