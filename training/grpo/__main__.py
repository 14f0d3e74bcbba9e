"""Execute a run: `python -m training.grpo <run folder>`.

The folder's config.json holds the settings. An interrupted run resumes from its last complete checkpoint. The last line
on standard output is a JSON object: base and tuned means on held-out photos, their difference, seconds, peak memory.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import cv2
import psutil
import torch
from filelock import FileLock, Timeout

from storage.files import write_atomically
from training.grpo.train import run_training
from training.runs import hf_jobs
from training.runs.run import BACKENDS, Run, RunAborted, RunConfig, RunError, RunPaused

LOCK_TIMEOUT = 10.0  # seconds; a process that only checks whether the run is alive holds the lock briefly

Train = Callable[[Run, RunConfig, Callable[[str], None]], dict[str, Any] | None]


def main() -> None:
    """Execute the run of a folder. Exits with a message if the config is invalid or the run is already executing."""
    args = parse_args()
    run = Run(args.folder)
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    overrides = {"base": args.base, "backend": args.backend, "hardware": args.hardware}
    try:
        settings = run.config().model_dump() | {key: value for key, value in overrides.items() if value is not None}
        config = RunConfig.create(**settings)
    except RunError as error:
        sys.exit(str(error))
    execute_locked(run, config, psutil.Process().create_time())


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "python -m training.grpo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the run's folder, with its config.json")
    parser.add_argument("--base", help="model to start from, instead of the config's")
    parser.add_argument(
        "--backend",
        "--where",
        choices=BACKENDS,
        help="this machine, Hugging Face Jobs, or Moondream's tuning API; --where is an alias",
    )
    parser.add_argument("--hardware", help="hardware flavor of a Hugging Face job, such as l4x1")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    return parser.parse_args()


def run_in_process(run: Run) -> None:
    """Execute a run in the current process. The outcome is in the run's status.

    Everything that the process prints meanwhile goes to the run's log, because output is redirected per process.
    """
    with (
        open(run.folder / "log.txt", "a", encoding="utf-8") as log,
        contextlib.suppress(SystemExit),
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        execute_locked(run, run.config(), time.time())


def execute_locked(run: Run, config: RunConfig, started: float) -> None:
    """Execute a run on its backend while holding the run's lock.

    Args:
        run: The run.
        config: Its config.
        started: Unix time from which the duration is measured.

    Raises:
        SystemExit: The run failed, or another process is executing it.
    """
    train = run_training
    if config.backend == "jobs":
        train = hf_jobs.run_on_jobs
    elif config.backend == "hosted":
        from training.hosted.trainer import train_hosted

        train = train_hosted
    elif config.method == "dpo":
        from training.dpo.train import run_dpo

        train = run_dpo
    lock = FileLock(run.folder / "lock", timeout=LOCK_TIMEOUT)
    try:
        if _is_main_process():
            lock.acquire()
        execute(run, config, train, started)
    except Timeout:
        sys.exit("Another process is already executing this run.")
    finally:
        lock.release()


def execute(run: Run, config: RunConfig, train: Train = run_training, started: float | None = None) -> None:
    """Execute a run and record how it ended: in its status, in `result.json` and as JSON on standard output.

    Args:
        run: The run.
        config: Its config.
        train: Trains and returns the result, or None if the run was cancelled.
        started: Unix time from which the duration is measured; the start of this process by default.

    Raises:
        SystemExit: The run failed.
    """
    is_main = _is_main_process()
    clock = time.monotonic()

    def set_phase(phase: str) -> None:
        if is_main:
            run.set_status(phase=phase)
            print(f"[{time.monotonic() - clock:5.1f} s] {phase}", flush=True)

    if is_main:
        run.set_status(state="running", started=time.time(), ended=0.0, steps=config.steps, message="")
    try:
        result = train(run, config, set_phase)
    except BaseException as error:
        if is_main:
            record_failure(run, error)
        raise SystemExit(1) from None
    if not is_main:
        return
    seconds = time.time() - (started or psutil.Process().create_time())
    resources = {"seconds": seconds, "peak_memory_bytes": peak_memory()}
    if result is None:
        run.set_status(
            state="cancelled", phase="", ended=time.time(), message="Cancelled. The training so far is kept."
        )
        print(json.dumps({"run": run.id, "state": "cancelled", "step": run.status().step, **resources}))
        return
    result = resources | result  # a job's result has its own measurements
    write_atomically(run.folder / "result.json", json.dumps(result, indent=1))
    run.set_status(state="done", phase="", ended=time.time(), message=result["alarm"])
    summary = {"run": run.id, "state": "done", "base": result["base"]["total"], "tuned": result["tuned"]["total"]}
    print(json.dumps(summary | {key: result[key] for key in ("difference", "wins", *resources)}))


def record_failure(run: Run, error: BaseException) -> None:
    """Write the reason of a failure to the run's status, and the traceback of an unexpected one to the log."""
    if isinstance(error, RunAborted | RunError):
        message = str(error)
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        message = "The disk is full. Free some space and resume: the last complete checkpoint is kept."
    elif isinstance(error, MemoryError | torch.OutOfMemoryError):
        message = "Out of memory. Use fewer photos per step or fewer rollouts."
    elif isinstance(error, KeyboardInterrupt):
        message = "Interrupted. Resume the run to continue."
    else:
        message = f"The run failed ({type(error).__name__}). See the log for details."
        traceback.print_exception(error)
    print(message, file=sys.stderr)
    try:
        state = "interrupted" if isinstance(error, RunPaused) else "failed"
        run.set_status(state=state, phase="", ended=time.time(), message=message)
    except OSError:
        print("The run's status could not be written either.", file=sys.stderr)


def peak_memory() -> int:
    """Return this process's peak main memory, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


if __name__ == "__main__":
    main()
