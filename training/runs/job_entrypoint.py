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

from huggingface_hub import HfApi, snapshot_download

from inference.registry import MODELS
from storage.files import write_atomically
from training.runs.hf_jobs import EVERY, MARK, OUT
from training.runs.run import Run, RunConfig


def main() -> int:
    """Does the run of a mounted folder, tells what it writes in marked lines, and hands over what came out."""
    wish, api, repository = Path(sys.argv[1]), HfApi(), os.environ["REPOSITORY"]
    run = Run(Path(tempfile.mkdtemp(prefix="run-")) / wish.name)
    shutil.copytree(wish, run.folder)
    config = _settle_paths(run)
    _download_base(config)
    over = threading.Event()
    threading.Thread(target=_watch_for_cancel, args=(run, api, repository, over), daemon=True).start()
    child = subprocess.Popen(
        [sys.executable, "-m", "training.grpo", str(run.folder), "--where", "here"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    told = _Told(run)
    for line in child.stdout or ():
        print(line, end="", flush=True)
        told.news()
    code = child.wait()
    over.set()
    api.upload_folder(
        repo_id=repository,
        repo_type="dataset",
        folder_path=run.folder,
        path_in_repo=f"runs/{run.id}/out",
        allow_patterns=[*OUT, "pair-*.png"],
    )
    told.news()
    return code


def _settle_paths(run: Run) -> RunConfig:
    """The photos and the base that came along are named by where they lie now."""
    config = run.config()
    changes = {key: str(run.folder / key) for key in ("photos", "held_out", "base") if getattr(config, key) == key}
    config = config.model_copy(update=changes)
    write_atomically(run.folder / "config.json", config.model_dump_json())
    return config


def _download_base(config: RunConfig) -> None:
    """Gets the weights of a model that lies on the Hub."""
    name = config.base if config.base in MODELS else Run(config.base).config().base
    entry = MODELS[name]
    for source, revision in ((entry.source, entry.revision), (entry.tokenizer, None)):
        if source and not Path(source).is_dir():
            snapshot_download(source, revision=revision)


def _watch_for_cancel(run: Run, api: HfApi, repository: str, over: threading.Event) -> None:
    while not over.wait(EVERY):
        with contextlib.suppress(Exception):
            if api.file_exists(repository, f"runs/{run.id}/cancel", repo_type="dataset"):
                run.cancel()
                return


class _Told:
    """Prints what is new in a run's folder as marked lines."""

    def __init__(self, run: Run) -> None:
        self.run, self.lines, self.status = run, {"metrics": 0, "probes": 0}, ""

    def news(self) -> None:
        """The new lines of metrics and probes, and the status when it is another."""
        for kind, lines in (("metrics", self.run.metrics()), ("probes", self.run.probes())):
            for line in lines[self.lines[kind] :]:
                print(MARK + json.dumps([kind, line]), flush=True)
            self.lines[kind] = len(lines)
        status = asdict(self.run.status())
        text = json.dumps(["status", {key: status[key] for key in ("state", "phase", "step", "steps", "message")}])
        if text != self.status:
            print(MARK + text, flush=True)
            self.status = text


if __name__ == "__main__":
    sys.exit(main())
