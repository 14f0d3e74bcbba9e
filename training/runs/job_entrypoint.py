"""`python -m training.runs.job_entrypoint <folder>`: execute a run inside a job on Hugging Face."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from inference.registry import MODELS
from storage.files import write_atomically
from training.runs.adapters import base_chain
from training.runs.hf_jobs import CANCEL_POLL_SECONDS, LOG_MARKER, OUTPUT_FILES
from training.runs.run import Run


def main() -> int:
    """Execute the run in the mounted folder, print its progress as marked lines and upload its outputs."""
    inputs, api, repository = Path(sys.argv[1]), HfApi(), os.environ["REPOSITORY"]
    run = Run(Path(tempfile.mkdtemp(prefix="run-")) / inputs.name)
    shutil.copytree(inputs, run.folder)
    _resolve_paths(run)
    _download_base(run)
    ended = threading.Event()
    threading.Thread(target=_watch_for_cancel, args=(run, api, repository, ended), daemon=True).start()
    process = subprocess.Popen(
        [sys.executable, "-m", "training.grpo", str(run.folder), "--backend", "here"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    reporter = ProgressReporter(run)
    for line in process.stdout or ():
        print(line, end="", flush=True)
        reporter.print_new()
    code = process.wait()
    ended.set()
    api.upload_folder(
        repo_id=repository,
        repo_type="dataset",
        folder_path=run.folder,
        path_in_repo=f"runs/{run.id}/out",
        allow_patterns=[*OUTPUT_FILES, "pair-*.png", "rollout-photo-*.jpg"],
    )
    reporter.print_new()
    return code


def _resolve_paths(run: Run) -> None:
    """Replace the names of uploaded photos and base in the config by their paths here."""
    config = run.config()
    changes = {key: str(run.folder / key) for key in ("photos", "held_out", "base") if getattr(config, key) == key}
    write_atomically(run.folder / "config.json", config.model_copy(update=changes).model_dump_json())


def _download_base(run: Run) -> None:
    """Download weights and tokenizer of the base model from the Hub, unless they are local folders."""
    _, base = base_chain(run)
    spec = MODELS[base]
    for source, revision in ((spec.source, spec.revision), (spec.tokenizer, None)):
        if source and not Path(source).is_dir():
            snapshot_download(source, revision=revision)


def _watch_for_cancel(run: Run, api: HfApi, repository: str, ended: threading.Event) -> None:
    while not ended.wait(CANCEL_POLL_SECONDS):
        with contextlib.suppress(Exception):
            if api.file_exists(repository, f"runs/{run.id}/cancel", repo_type="dataset"):
                run.cancel()
                return


class ProgressReporter:
    """Prints new entries of a run's folder as marked lines, which `hf_jobs` reads from the job's log."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.printed = {"metrics": 0, "probes": 0}
        self.status = ""
        self.alarms: list[dict[str, Any]] = []

    def print_new(self) -> None:
        """Print metrics and probes that were added since the last call, and alarms and status if they changed."""
        for kind, rows in (("metrics", self.run.metrics()), ("probes", self.run.probes())):
            for row in rows[self.printed[kind] :]:
                print(LOG_MARKER + json.dumps([kind, row]), flush=True)
            self.printed[kind] = len(rows)
        alarms = self.run.alarms()
        if alarms != self.alarms:
            print(LOG_MARKER + json.dumps(["alarms", alarms]), flush=True)
            self.alarms = alarms
        status = asdict(self.run.status())
        text = json.dumps(["status", {key: status[key] for key in ("state", "phase", "step", "steps", "message")}])
        if text != self.status:
            print(LOG_MARKER + text, flush=True)
            self.status = text


if __name__ == "__main__":
    sys.exit(main())
