"""Execute a run on Hugging Face Jobs and follow it from this machine (`--where jobs`).

The run's inputs are committed to a private dataset repository of the user (`owner/playground-runs`): this project's
code once, and the run's config, photos and base under `runs/<id>/`. A job mounts that commit, executes
`training.runs.job_entrypoint` on it and stores the result beside it. The job's log is read as it grows: lines that
begin with MARK carry entries for the run's folder (status, metrics, probes), all others are the log. A follower that
was killed finds its job again through `job.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, Volume, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from recipes import Recipe, save_picture
from storage.files import write_atomically
from training.data.sources import PhotoSourceError, train_eval_split
from training.runs.run import Run, RunConfig, RunError

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "playground-runs"
IMAGE = "python:3.12"
MOUNT = "/input"  # where a job finds the repository, read-only
HOURS = 2  # a job is ended after that long, which bounds what it can cost
GRACE = 120.0  # seconds that a job has to stop by itself and hand over what it learned, once it is cancelled
EVERY = 5.0  # seconds between two looks whether it was cancelled
MARK = "@run "
FINAL = ("done", "cancelled", "failed")
CODE = ("*.py", "*.json", "*.txt", "*.safetensors", "*.jinja", "*.jpg", "*.png", "*.md", "LICENSE")
PARTS = ("training", "inference", "storage", "recipes", "rewards", "assets")
COMMAND = (
    f"pip install --quiet --disable-pip-version-check -r {MOUNT}/code/requirements.txt"
    f" && cd {MOUNT}/code && python -m training.runs.job_entrypoint {MOUNT}/runs/$RUN"
)
OUT = ("result.json", "reward.png", "probe.png", "adapter/adapter_config.json", "adapter/adapter_model.safetensors")

_REFUSED = {
    401: "The Hub does not know this token. Make a new one with write access and the right to run Jobs.",
    402: "This account has no credit for Jobs. Add some at huggingface.co/settings/billing.",
    403: "This token may not run Jobs. Make one that may: huggingface.co/settings/tokens.",
    404: "The Hub does not find this job or its repository (any more).",
    413: "The photos are too large for the Hub to take.",
    429: "The Hub asks to wait. Try again in a few minutes.",
}


@dataclass(frozen=True)
class Job:
    """Where a run works: the job's id, its owner, its page, its hardware, and the repository with its files."""

    id: str
    owner: str
    url: str
    hardware: str
    repository: str

    @classmethod
    def of(cls, run: Run) -> Job | None:
        """The job that was started for a run; None before."""
        try:
            return cls(**json.loads((run.folder / "job.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


@dataclass(frozen=True)
class Hardware:
    """A machine on offer: its name, what it has, and its price in US dollars an hour (None: the Hub does not say)."""

    name: str
    words: str
    hourly: float | None


def hardware(token: str | None = None) -> list[Hardware]:
    """What Hugging Face offers for Jobs now, at its present prices. Raises RunError."""
    with _plainly():
        return [_hardware(one) for one in HfApi(token=token or False).list_jobs_hardware()]


def _hardware(one: Any) -> Hardware:
    per = {"second": 3600, "minute": 60, "hour": 1}.get(one.unit_label)
    hourly = one.unit_cost_usd * per if per and one.unit_cost_usd is not None else None
    gpu = one.accelerator
    has = [f"{gpu.quantity} x {gpu.model} {gpu.vram}"] if gpu else []
    return Hardware(one.name, ", ".join([*has, one.cpu, one.ram]), hourly)


# ── Here: submit, follow, fetch ─────────────────────────────────────────────────────────────────────────────────────


def follow(run: Run, config: RunConfig, phase: Callable[[str], None]) -> dict[str, Any] | None:
    """Sees a run through on Hugging Face Jobs; returns its result, or None when it was cancelled.

    The token is that of the environment (HF_TOKEN) or of `hf auth login`. Raises RunError.
    """
    token = get_token()
    if not token:
        raise RunError("A Hugging Face token is needed for Jobs. Set HF_TOKEN, or give one in the form.")
    api = HfApi(token=token)
    with _plainly():
        job = Job.of(run)
        if job is None:
            phase("sending the run to Hugging Face")
            job = submit(run, config, api)
        _show_probe(run, config)
        phase(f"waiting for {job.hardware} on Hugging Face Jobs")
        print(f"Job {job.id}: {job.url}", flush=True)
        with _cancelling(run, job, api):
            told = _listen(run, job, api)
        _fetch(run, job, api)
        status = api.inspect_job(job_id=job.id, namespace=job.owner).status
    state, message = _verdict(run, told, str(getattr(status.stage, "value", status.stage)), status.message)
    if state == "done" and (result := run.result()):
        return result
    (run.folder / "job.json").unlink(missing_ok=True)  # to resume it means a new job
    if state == "cancelled":
        return None
    raise RunError(message)


def _show_probe(run: Run, config: RunConfig) -> None:
    """The photo whose answers are shown while the job works; the job chooses the same one."""
    with contextlib.suppress(PhotoSourceError):
        _, held_out = train_eval_split(config.photos, config.held_out, config.max_photos, config.seed)
        save_picture(held_out.photos[0], Recipe(), run.folder / "probe.png")


def submit(run: Run, config: RunConfig, api: HfApi) -> Job:
    """Uploads what the run needs and starts its job; `job.json` says which. Raises what the Hub raises."""
    owner = api.whoami()["name"]
    repository = f"{owner}/{REPOSITORY}"
    api.create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
    allowed = [pattern for part in PARTS for pattern in (f"{part}/{kind}" for kind in CODE)]
    common: dict[str, Any] = {"repo_id": repository, "repo_type": "dataset"}
    api.upload_folder(
        folder_path=ROOT, path_in_repo="code", allow_patterns=["requirements.txt", "LICENSE", *allowed], **common
    )
    with tempfile.TemporaryDirectory(prefix="run-job-") as folder:
        _write_wish(config, Path(folder))
        commit = api.upload_folder(folder_path=folder, path_in_repo=f"runs/{run.id}", **common)
    made = api.run_job(
        image=IMAGE,
        command=["bash", "-c", COMMAND],
        env={"RUN": run.id, "REPOSITORY": repository, "HF_HUB_DISABLE_TELEMETRY": "1"},
        secrets={"HF_TOKEN": api.token},
        flavor=config.hardware,
        timeout=f"{HOURS}h",
        labels={"run": run.id},
        volumes=[Volume(type="dataset", source=repository, revision=commit.oid, mount_path=MOUNT)],
        namespace=owner,
    )
    job = Job(made.id, owner, made.url, config.hardware, repository)
    write_atomically(run.folder / "job.json", json.dumps(asdict(job)))
    return job


def _write_wish(config: RunConfig, folder: Path) -> None:
    """What a job is to do: the config, with its own photos and the adapter that it starts from beside it."""
    changes: dict[str, Any] = {"where": "here"}
    for key in ("photos", "held_out"):
        source = getattr(config, key)
        if source != "bundled" and not source.startswith("hub:"):
            _copy(Path(source), folder / key)
            changes[key] = key
    if Path(config.base).is_absolute():
        before = Run(config.base)
        shutil.copytree(before.adapter, folder / "base" / "adapter")
        below = before.config()
        while Path(below.base).is_absolute():  # an adapter that went on from another holds all that was learned
            below = Run(below.base).config()
        write_atomically(folder / "base" / "config.json", below.model_copy(update={"where": "here"}).model_dump_json())
        changes["base"] = "base"
    write_atomically(folder / "config.json", config.model_copy(update=changes).model_dump_json())


def _copy(source: Path, to: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, to)
    else:
        to.mkdir()
        shutil.copy2(source, to)


def _listen(run: Run, job: Job, api: HfApi) -> dict[str, Any]:
    """Reads a job's log to its end, from its beginning; returns the last status that it told.

    A stream that breaks off as the job ends is not taken up again by the library: then the log is read once more.
    """
    told: dict[str, Any] = {}
    read = 0
    run.truncate_after(-1)
    for following in (True, False):
        lines = api.fetch_job_logs(job_id=job.id, namespace=job.owner, follow=following)
        for place, line in enumerate(lines, 1):
            if place > read:
                read = place
                told |= _take(run, line)
        if told.get("state") in FINAL:
            break
    return told


def _take(run: Run, text: str) -> dict[str, Any]:
    """Puts what a line says into the run's folder, or prints it; returns what it says of the status."""
    if not text.startswith(MARK):
        print(text, flush=True)
        return {}
    with contextlib.suppress(ValueError):
        match json.loads(text.removeprefix(MARK)):
            case ["metrics" | "probes" as kind, dict(line)]:
                run.add(kind, line)
            case ["status", {"phase": str(phase), "step": int(step), "steps": int(steps), **others}]:
                run.set_status(phase=phase[:200], step=step, steps=steps)
                return others
    return {}


@contextlib.contextmanager
def _cancelling(run: Run, job: Job, api: HfApi) -> Iterator[None]:
    """Inside, a cancelled run is cancelled there, too."""
    over = threading.Event()
    watcher = threading.Thread(target=_pass_on_cancel, args=(run, job, api, over), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _pass_on_cancel(run: Run, job: Job, api: HfApi, over: threading.Event) -> None:
    """Tells the job that the run was cancelled, so that it hands over what it learned; ends it when it does not."""
    while not run.cancelled:
        if over.wait(1.0):
            return
    with contextlib.suppress(Exception):
        there = f"runs/{run.id}/cancel"
        api.upload_file(path_or_fileobj=b"-", path_in_repo=there, repo_id=job.repository, repo_type="dataset")
        if over.wait(GRACE):
            return
    with contextlib.suppress(Exception):
        api.cancel_job(job_id=job.id, namespace=job.owner)


def _fetch(run: Run, job: Job, api: HfApi) -> None:
    """Brings what came out into the run's folder, and nothing but what a run writes; the adapter comes last."""
    try:
        there = set(api.list_repo_files(job.repository, repo_type="dataset"))
    except RepositoryNotFoundError:
        return
    out = f"runs/{run.id}/out/"
    pairs = [name.removeprefix(out) for name in sorted(there) if name.startswith(f"{out}pair-")]
    wanted = [*(name for name in pairs if name.removesuffix(".png").removeprefix("pair-").isdigit()), *OUT]
    for name in wanted:
        if out + name in there:
            with tempfile.TemporaryDirectory(prefix="run-job-", dir=run.folder) as folder:
                got = api.hf_hub_download(job.repository, out + name, repo_type="dataset", local_dir=folder)
                (run.folder / name).parent.mkdir(exist_ok=True)
                os.replace(got, run.folder / name)


def _verdict(run: Run, told: dict[str, Any], stage: str, message: str | None) -> tuple[str, str]:
    """How it ended: as the job told, or as Hugging Face says of a job that could tell nothing any more."""
    if told.get("state") in FINAL:
        return told["state"], str(told.get("message") or "It failed on Hugging Face Jobs. Its log says why.")
    if run.cancelled:
        return "cancelled", ""
    why = f" ({message})" if message else ""
    return "failed", f"The job ended as {stage}{why} before the run was done. Its log says more."


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """What the Hub refuses is a RunError that says what to do; the token is never in it."""
    try:
        yield
    except HfHubHTTPError as error:
        code = error.response.status_code
        words = _REFUSED.get(code, f"The Hub answered with an error ({code}). Resume the run later.")
        raise RunError(words) from None
    except (httpx2.HTTPError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == 28:
            raise
        kind = type(error).__name__
        raise RunError(f"The Hub could not be reached ({kind}). The job goes on; resume the run to see it.") from None
