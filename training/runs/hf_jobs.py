"""Execute a run on Hugging Face Jobs and follow it from this machine (`--backend jobs`).

The run's inputs are committed to a private dataset repository of the user (`owner/playground-runs`): this project's
code once, and the run's config, photos and base under `runs/<id>/`. A job mounts that commit, executes
`training.runs.job_entrypoint` on it and stores the result beside it. The job's log is read as it grows: lines that
begin with LOG_MARKER carry entries for the run's folder (status, metrics, probes, alarms), all others are the log. A
follower that was killed finds its job again through `job.json`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, Volume, get_token
from huggingface_hub.errors import (
    FileMetadataError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from recipes import Recipe, save_picture
from storage.files import write_atomically
from training.data.sources import PhotoSet, PhotoSourceError, train_eval_split
from training.grpo.alarms import store_alarms
from training.runs.adapters import base_chain
from training.runs.rollouts import drop_invalid_rollouts
from training.runs.run import Run, RunConfig, RunError

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "playground-runs"
IMAGE = "python:3.12"
MOUNT = "/input"  # where a job finds the repository, read-only
MAX_HOURS = 2  # timeout of a job, which bounds its cost
CANCEL_GRACE_SECONDS = 120.0  # for a cancelled job to stop by itself and upload what it learned
CANCEL_POLL_SECONDS = 5.0
LOG_READS = 4  # of a log without a final state: one that follows the job, then those of a job that has ended
LOG_MARKER = "@run "
FINAL_STATES = ("done", "cancelled", "failed")
CODE_PATTERNS = ("*.py", "*.json", "*.txt", "*.safetensors", "*.jinja", "*.jpg", "*.png", "*.md", "*.tflite", "LICENSE")
CODE_PACKAGES = ("training", "inference", "usage", "storage", "rewards", "recipes", "assets")
COMMAND = (
    f"pip install --quiet --disable-pip-version-check -r {MOUNT}/code/requirements.txt"
    f" && cd {MOUNT}/code && python -m training.runs.job_entrypoint {MOUNT}/runs/$RUN"
)
OUTPUT_FILES = (
    "result.json",
    "rollouts.jsonl",
    "reward.png",
    "probe.png",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
)
NUMBERED_OUTPUT = re.compile(r"pair-\d{1,4}\.png|rollout-photo-\d{1,6}\.jpg")
_NETWORK_ERRORS = (
    httpx2.HTTPError,
    ConnectionError,
    TimeoutError,
    socket.gaierror,
    ssl.SSLError,
    FileMetadataError,
    LocalEntryNotFoundError,
)
_HTTP_ERRORS = {
    401: "Hugging Face does not recognize this token. Create a new one with write access and permission to run Jobs.",
    402: "This account has no credit for Jobs. Add some at huggingface.co/settings/billing.",
    403: "This token may not run Jobs. Create one that may at huggingface.co/settings/tokens.",
    404: "The job or its repository was not found on the Hub. It may have been deleted.",
    413: "The photos are too large for the Hub. Choose fewer or smaller ones.",
    429: "The Hub is limiting requests. Try again in a few minutes.",
}


@dataclass(frozen=True)
class JobInfo:
    """A job on Hugging Face: its id, owner, URL and hardware, and the repository with the run's files."""

    id: str
    owner: str
    url: str
    hardware: str
    repository: str

    @classmethod
    def load(cls, run: Run) -> JobInfo | None:
        """Read a run's job; None if no job was started."""
        try:
            return cls(**json.loads((run.folder / "job.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


@dataclass(frozen=True)
class Hardware:
    """A hardware flavor of Jobs: its name, description, and price in US dollars per hour (None if unknown)."""

    name: str
    description: str
    hourly: float | None


def list_hardware(token: str | None = None) -> list[Hardware]:
    """List the hardware flavors of Hugging Face Jobs with current prices. Raises RunError."""
    units_per_hour = {"second": 3600, "minute": 60, "hour": 1}
    flavors = []
    with _hub_errors():
        for flavor in HfApi(token=token or False).list_jobs_hardware():
            gpu = flavor.accelerator
            parts = [f"{gpu.quantity} x {gpu.model} {gpu.vram}"] if gpu else []
            units, cost = units_per_hour.get(flavor.unit_label), flavor.unit_cost_usd
            hourly = None if units is None or cost is None else cost * units
            flavors.append(Hardware(flavor.name, ", ".join([*parts, flavor.cpu, flavor.ram]), hourly))
    return flavors


def run_on_jobs(run: Run, config: RunConfig, set_phase: Callable[[str], None]) -> dict[str, Any] | None:
    """Execute a run on Hugging Face Jobs, or follow its job if it was started before.

    The token is read from HF_TOKEN or from `hf auth login`.

    Args:
        run: The run.
        config: Its settings.
        set_phase: Called with a description of each phase.

    Returns:
        The content of result.json, or None if the run was cancelled.

    Raises:
        RunError: If there is no token, the Hub refuses a request, or the job fails.
    """
    token = get_token()
    if not token:
        raise RunError("A Hugging Face token is needed for Jobs. Set HF_TOKEN, or enter one in the form.")
    api = HfApi(token=token)
    with _hub_errors():
        job = JobInfo.load(run)
        if job is None:
            set_phase("uploading the run to Hugging Face")
            job = submit(run, config, api)
        held_out = None
        with contextlib.suppress(PhotoSourceError):  # photos to show: the job chooses the same ones
            _, held_out = train_eval_split(config.photos, config.held_out, config.max_photos, config.seed)
            save_picture(held_out.photos[0], Recipe(), run.folder / "probe.png")
        set_phase(f"waiting for {job.hardware} on Hugging Face Jobs")
        print(f"Job {job.id}: {job.url}", flush=True)
        with _forward_cancellation(run, job, api):
            status = _follow_log(run, job, api, held_out)
        _download_outputs(run, job, api)
        job_status = api.inspect_job(job_id=job.id, namespace=job.owner).status
    state = status.get("state")
    if state == "done" and (result := run.result()):
        return result
    (run.folder / "job.json").unlink(missing_ok=True)  # resuming starts a new job
    if state == "cancelled" or (state not in FINAL_STATES and run.cancelled):
        return None
    if state in FINAL_STATES:
        raise RunError(str(status.get("message") or "The run failed on Hugging Face Jobs. See its log."))
    stage = str(getattr(job_status.stage, "value", job_status.stage))
    reason = f" ({job_status.message})" if job_status.message else ""
    raise RunError(f"The job ended as {stage}{reason} before the run was done. See its log.")


def submit(run: Run, config: RunConfig, api: HfApi) -> JobInfo:
    """Upload code and inputs of a run, start its job and store it in `job.json`. Raises errors of the Hub."""
    owner = api.whoami()["name"]
    repository = f"{owner}/{REPOSITORY}"
    api.create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
    patterns = [f"{package}/{pattern}" for package in CODE_PACKAGES for pattern in CODE_PATTERNS]
    target: dict[str, Any] = {"repo_id": repository, "repo_type": "dataset"}
    api.upload_folder(
        folder_path=ROOT, path_in_repo="code", allow_patterns=["requirements.txt", "LICENSE", *patterns], **target
    )
    with tempfile.TemporaryDirectory(prefix="run-job-") as folder:
        _write_inputs(config, Path(folder))
        commit = api.upload_folder(folder_path=folder, path_in_repo=f"runs/{run.id}", **target)
    started = api.run_job(
        image=IMAGE,
        command=["bash", "-c", COMMAND],
        env={"RUN": run.id, "REPOSITORY": repository, "HF_HUB_DISABLE_TELEMETRY": "1"},
        secrets={"HF_TOKEN": api.token},
        flavor=config.hardware,
        timeout=f"{MAX_HOURS}h",
        labels={"run": run.id},
        volumes=[Volume(type="dataset", source=repository, revision=commit.oid, mount_path=MOUNT)],
        namespace=owner,
    )
    job = JobInfo(started.id, owner, started.url, config.hardware, repository)
    write_atomically(run.folder / "job.json", json.dumps(asdict(job)))
    return job


def _write_inputs(config: RunConfig, folder: Path) -> None:
    """Write a job's inputs: the config, local photos, and the adapter to start from."""
    changes: dict[str, Any] = {"backend": "here"}
    for key in ("photos", "held_out"):
        source = getattr(config, key)
        if source != "bundled" and not source.startswith("hub:"):
            if Path(source).is_dir():
                shutil.copytree(source, folder / key)
            else:
                (folder / key).mkdir()
                shutil.copy2(source, folder / key)
            changes[key] = key
    if Path(config.base).is_absolute():
        parent = Run(config.base)
        shutil.copytree(parent.adapter, folder / "base" / "adapter")
        oldest = base_chain(parent)[0][-1].config()  # the parent's adapter contains those of earlier runs
        base_config = oldest.model_copy(update={"backend": "here"})
        write_atomically(folder / "base" / "config.json", base_config.model_dump_json())
        changes["base"] = "base"
    write_atomically(folder / "config.json", config.model_copy(update=changes).model_dump_json())


def _follow_log(run: Run, job: JobInfo, api: HfApi, held_out: PhotoSet | None) -> dict[str, Any]:
    """Read a job's log from its beginning to its end; return the last reported status.

    The library does not reconnect a stream that breaks off after the job has ended, so the log is then read again.
    """
    status: dict[str, Any] = {}
    read = 0
    run.truncate_after(-1)
    for attempt in range(LOG_READS):
        lines = api.fetch_job_logs(job_id=job.id, namespace=job.owner, follow=attempt == 0)
        for number, line in enumerate(lines, 1):
            if number > read:
                read = number
                status |= _apply_log_line(run, line, held_out)
        if status.get("state") in FINAL_STATES:
            break
    return status


def _apply_log_line(run: Run, text: str, held_out: PhotoSet | None = None) -> dict[str, Any]:
    """Apply a marked line to the run's folder, or print the line; return the state and message it reports."""
    if not text.startswith(LOG_MARKER):
        print(text, flush=True)
        return {}
    with contextlib.suppress(ValueError):
        match json.loads(text.removeprefix(LOG_MARKER)):
            case ["metrics", dict(row)]:
                run.append_metrics(row)
            case ["probes", dict(row)]:
                run.append_probe(row)
            case ["alarms", list(rows)]:
                store_alarms(run, [row for row in rows if isinstance(row, dict)], held_out)
            case ["status", {"phase": str(phase), "step": int(step), "steps": int(steps), **others}]:
                run.set_status(phase=phase[:200], step=step, steps=steps)
                return others
    return {}


@contextlib.contextmanager
def _forward_cancellation(run: Run, job: JobInfo, api: HfApi) -> Iterator[None]:
    """Cancel the job if the run is cancelled within the context.

    The job receives a stop request, so that it uploads its results, and is canceled after CANCEL_GRACE_SECONDS.
    """
    ended = threading.Event()

    def watch() -> None:
        while not run.cancelled:
            if ended.wait(1.0):
                return
        with contextlib.suppress(Exception):
            marker = f"runs/{run.id}/cancel"
            api.upload_file(path_or_fileobj=b"-", path_in_repo=marker, repo_id=job.repository, repo_type="dataset")
            if ended.wait(CANCEL_GRACE_SECONDS):
                return
        with contextlib.suppress(Exception):
            api.cancel_job(job_id=job.id, namespace=job.owner)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _download_outputs(run: Run, job: JobInfo, api: HfApi) -> None:
    """Download the known output files of a job into the run's folder, the adapter last."""
    try:
        available = set(api.list_repo_files(job.repository, repo_type="dataset"))
    except RepositoryNotFoundError:
        return
    prefix = f"runs/{run.id}/out/"
    outputs = [name.removeprefix(prefix) for name in sorted(available) if name.startswith(prefix)]
    for name in (*filter(NUMBERED_OUTPUT.fullmatch, outputs), *OUTPUT_FILES):
        if prefix + name in available:
            with tempfile.TemporaryDirectory(prefix="run-job-", dir=run.folder) as folder:
                file = api.hf_hub_download(job.repository, prefix + name, repo_type="dataset", local_dir=folder)
                if name == "rollouts.jsonl":
                    drop_invalid_rollouts(Path(file))
                (run.folder / name).parent.mkdir(exist_ok=True)
                os.replace(file, run.folder / name)


@contextlib.contextmanager
def _hub_errors() -> Iterator[None]:
    """Convert errors of the Hub, of the network and of local files to RunError with a remedy and without the token."""
    try:
        yield
    except HfHubHTTPError as error:
        code = error.response.status_code
        message = _HTTP_ERRORS.get(code, f"The Hub returned an error ({code}). Resume the run later.")
        raise RunError(message) from None
    except (*_NETWORK_ERRORS, json.JSONDecodeError, HFValidationError) as error:
        kind = type(error).__name__
        raise RunError(f"The Hub could not be reached ({kind}). The job continues; resume the run to see it.") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise  # the caller explains a full disk
        file = f" {Path(str(error.filename)).name!r}" if error.filename else ""
        raise RunError(
            f"A local file{file} cannot be read or written ({error.strerror or type(error).__name__}). Check the "
            "photos and this machine's disk, and resume the run."
        ) from None
