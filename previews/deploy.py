"""Deploys a commit to a Space by hot reload, restart or build, and waits until the application reports the commit."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd

from previews.errors import ExitCode, PreviewError, hub_error, redact_secrets
from previews.hot_reload import Codebase
from previews.hub import Hub, SpaceSnapshot, SpaceState, in_thread
from previews.names import space_name
from previews.plan import RESTART_FILE, DeployPath, Plan, make_plan, read_front_matter
from previews.source import APP_FILE, README, File, Source, blob_oid, is_ancestor, read_blobs, read_commit

MARKER_VARIABLE, BRANCH_VARIABLE = "PREVIEW_OF", "PREVIEW_BRANCH"
BUCKET_VARIABLE, BUCKET_TOKEN = "STATE_BUCKET", "STATE_BUCKET_TOKEN"
STARTING_STAGES = ("BUILDING", "RUNNING_BUILDING", "APP_STARTING", "RUNNING_APP_STARTING")
FAILED_STAGES = {
    "BUILD_ERROR": ExitCode.BUILD,
    "CONFIG_ERROR": ExitCode.BUILD,
    "NO_APP_FILE": ExitCode.BUILD,
    "RUNTIME_ERROR": ExitCode.APP,
}
HALTED_STAGES = ("PAUSED", "STOPPED", "SLEEPING")
DEPLOY_TITLE, RELOAD_TITLE = "Deploy ", "Hot reload of "  # prefixes of commit titles in a Space
STALE_STATE_SECONDS = 30.0  # after a commit, a failed stage may still belong to the previous one
HOT_RELOAD_TIMEOUT = 15.0  # seconds until a hot-reloaded commit must be visible
HOT_RELOAD_POLL = 0.1
KNOWN_REPLICA_TIMEOUT = 1.5  # seconds until a replica known from an earlier reload must know a commit
CONCURRENT_DEPLOY_TIMEOUT = 5.0  # seconds until files sent by a concurrent deploy must be live
MAX_ATTEMPTS = 3  # on concurrent commits
JOB_SECONDS = 1800
JOB_PRICE = 0.02  # dollars an hour: $0.01 for cpu-basic and $0.01 for the public port


@dataclass(frozen=True)
class Target:
    """A Space to deploy to.

    Attributes:
        space: Id of the Space, "owner/name".
        branch: The branch it shows.
        marker: Value of the variable that marks the application's own Spaces.
        is_production: Whether different branches may be deployed to it; a preview belongs to one branch.
    """

    space: str
    branch: str
    marker: str
    is_production: bool = False


@dataclass(frozen=True)
class DeployOptions:
    """Options of a deploy.

    Attributes:
        visibility: Visibility of a new Space.
        secrets: Secrets of a new Space.
        variables: Public variables of a new Space.
        hardware: Hardware of a new Space, or None for the Hub's default.
        timeout: Seconds to wait for a restart or build.
        poll: Seconds between two status requests.
        min_path: Cheapest path to use.
        slim: Install previews without torch.
        job_image_space: Space whose image a Job uses to serve a first preview while it is built, or None for no Job.
        state_bucket: Bucket that keeps the state of a new Space, "owner/name"; "" for one of its own, None for none.
    """

    visibility: str = "private"
    secrets: dict[str, str] = field(default_factory=dict, repr=False)
    variables: dict[str, str] = field(default_factory=dict)
    hardware: str | None = None
    timeout: float = 1200.0
    poll: float = 1.0
    min_path: DeployPath = DeployPath.NOTHING
    slim: bool = False
    job_image_space: str | None = None
    state_bucket: str | None = None


@dataclass(frozen=True)
class DeployResult:
    """Result of a deploy; the fields are the keys of `--json`.

    Attributes:
        path: The path that succeeded.
        seconds: Time until live, since the push or the start of the command.
        since: "push" or "start".
        by_path: Seconds spent on each path that was tried, in order.
        own_seconds: Processor time of the deployer; the rest is waiting.
        fallbacks: Why cheaper paths failed.
        job_seconds: Time until a Job served the commit, or None.
    """

    space: str
    branch: str
    sha: str
    url: str
    path: str
    reason: str
    seconds: float
    since: str
    by_path: dict[str, float]
    own_seconds: float
    fallbacks: list[str]
    job_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dictionary for `--json`."""
        return asdict(self)


@dataclass
class _Deployment:
    """State of a deploy in progress."""

    target: Target
    source: Source
    codebase: Callable[[], Codebase]
    created: bool = False
    fallbacks: list[str] = field(default_factory=list)
    by_path: dict[str, float] = field(default_factory=dict)
    job: Any = None
    job_url: str = ""
    job_seconds: float | None = None


class _HotReloadFailed(Exception):  # noqa: N818 - a reason to fall back, not an error of the deploy
    """Raised with the reason why a hot reload did not take effect."""


class Deployer:
    """Deploys commits to Spaces.

    Args:
        hub: Hub client.
        folder: The git repository.
        options: Options of the deploy.
        log: Receives lasting progress lines.
        progress: Receives progress lines that the next one may replace.
        started: Start of the program on the monotonic clock, if earlier than the call of `deploy`.
        pushed: Time of the push, in seconds since 1970.
    """

    def __init__(
        self,
        hub: Hub,
        folder: Path,
        options: DeployOptions,
        log: Callable[[str], None],
        progress: Callable[[str], None] = lambda _: None,
        started: float | None = None,
        pushed: float | None = None,
    ) -> None:
        self.hub, self.folder, self.options, self.log, self.progress = hub, folder, options, log, progress
        self.started, self.pushed = started, pushed

    def deploy(self, target: Target, sha: str) -> DeployResult:
        """Deploy a commit and wait until the application reports it.

        Raises:
            PreviewError: If the commit cannot be deployed, or does not become live in time.
        """
        started, initial_cpu = (time.monotonic(), _cpu_seconds()) if self.started is None else (self.started, 0.0)
        snapshot = in_thread(lambda: self.hub.snapshot(target.space))
        source = read_commit(self.folder, sha, slim=self.options.slim and not target.is_production)
        codebase = in_thread(lambda: Codebase(source.python))  # parsed while the Hub responds
        deployment = _Deployment(target, source, codebase.result)
        try:
            plan, url = self._deploy_with_retries(deployment, snapshot.result())
        finally:
            if deployment.job is not None:
                self._cancel_job(deployment.job.id, target)
        elapsed = time.monotonic() - started
        return DeployResult(
            space=target.space,
            branch=target.branch,
            sha=source.sha,
            url=url,
            path=plan.path.value,
            reason=plan.reason,
            seconds=round(max(elapsed, time.time() - self.pushed) if self.pushed else elapsed, 2),
            since="push" if self.pushed else "start",
            by_path={path: round(seconds, 2) for path, seconds in deployment.by_path.items()},
            own_seconds=round(_cpu_seconds() - initial_cpu, 2),
            fallbacks=deployment.fallbacks,
            job_seconds=deployment.job_seconds,
        )

    # ── Steps ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _deploy_with_retries(self, deployment: _Deployment, snapshot: SpaceSnapshot | None) -> tuple[Plan, str]:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return self._deploy_once(deployment, self._ensure_space(deployment, snapshot))
            except PreviewError as error:
                if error.code is not ExitCode.CONFLICT or error.final or snapshot is None or attempt == MAX_ATTEMPTS:
                    raise
                self._check_superseded(deployment.target, deployment.source.sha)
                self.log("the Space received another commit meanwhile; starting over")
                snapshot = self.hub.snapshot(deployment.target.space)
        raise AssertionError("unreachable")

    def _ensure_space(self, deployment: _Deployment, snapshot: SpaceSnapshot | None) -> SpaceSnapshot:
        """Create the Space if it does not exist, and check that it belongs to the target.

        Raises:
            PreviewError: If it belongs to another application or branch.
        """
        target, options = deployment.target, self.options
        expected = dict(options.variables)
        if options.state_bucket is not None:
            expected[BUCKET_VARIABLE] = options.state_bucket or own_bucket(target.space)
        if snapshot is None:
            variables = {**expected, MARKER_VARIABLE: target.marker, BRANCH_VARIABLE: target.branch}
            if options.state_bucket is not None:
                self.log(f"creating the private bucket {expected[BUCKET_VARIABLE]}, if it does not exist")
                self.hub.create_bucket(expected[BUCKET_VARIABLE])
            self.log(f"creating {target.space} ({options.visibility})")
            deployment.created = self.hub.create(
                target.space, options.visibility, options.secrets, variables, options.hardware
            )
            snapshot = self.hub.snapshot(target.space)
            if snapshot is None:
                message = f"{target.space} was created but cannot be read yet. Run the command again."
                raise PreviewError(message, ExitCode.NOT_FOUND)
        variables = snapshot.variables
        if variables.get(MARKER_VARIABLE) != target.marker:
            message = (
                f"{target.space} belongs to another application: its variable {MARKER_VARIABLE} is not"
                f" {target.marker!r}. Choose another --app, or set the variable if the Space is yours."
            )
            raise PreviewError(message, ExitCode.CONFLICT, final=True)
        branch = variables.get(BRANCH_VARIABLE)
        if branch != target.branch and not target.is_production:
            message = f"{target.space} is the preview of another branch, {branch!r}. Rename this branch."
            raise PreviewError(message, ExitCode.CONFLICT, final=True)
        for name, value in expected.items():
            if not deployment.created and variables.get(name) != value:
                self.log(f"the variable {name} only applies to a new Space; change it in this Space's settings")
        return snapshot

    def _check_superseded(self, target: Target, sha: str) -> None:
        """Raise PreviewError if the Space's last commit deploys a newer commit of the branch."""
        for _, title in self.hub.commits(target.space)[:1]:
            newer = deployed_sha(title) or _full_sha(title.removeprefix(RELOAD_TITLE).rpartition(" for ")[2])
            if newer and newer != sha and is_ancestor(self.folder, sha, newer):
                message = f"Superseded: {newer[:12]} of this branch is being deployed."
                raise PreviewError(message, ExitCode.CONFLICT, final=True)

    def _deploy_once(self, deployment: _Deployment, snapshot: SpaceSnapshot) -> tuple[Plan, str]:
        """Apply the difference between Space and commit.

        Returns:
            The plan that succeeded, and the application's URL.
        """
        path_started = time.monotonic()
        plan = self._adjust_plan(self._make_plan(deployment, snapshot), deployment, snapshot.state)
        self.log(f"{plan.path.value}: {plan.reason}")
        state = snapshot.state
        if plan.path is DeployPath.HOT_RELOAD:
            problem = self._hot_reload(deployment, plan, snapshot)
            deployment.by_path[DeployPath.HOT_RELOAD.value] = time.monotonic() - path_started
            if problem is None:
                return plan, state.host
            deployment.fallbacks.append(f"hot reload: {problem}")
            self.log(f"hot reload failed ({problem}); restarting instead")
            path_started = time.monotonic()
            snapshot = self._ensure_space(deployment, self.hub.snapshot(state.id))
            state = snapshot.state
            plan = _force_restart(self._make_plan(deployment, snapshot), deployment.source, problem)
        head = state.head
        if plan.path is not DeployPath.NOTHING:
            additions = self._prepare_uploads(snapshot, plan)
            head = self.hub.commit(state.id, head, deploy_title(deployment.source.sha), additions, plan.delete)
            if self.options.min_path is DeployPath.BUILD and not deployment.created:
                self.hub.restart(state.id, factory=True)  # the commit alone would reuse cached layers of the image
            if deployment.created and self.options.job_image_space and deployment.job is None:
                self._start_job(deployment, head)
        # If no file of the commit changed, the application that is about to stop already reports it.
        only_restart = plan.path is not DeployPath.NOTHING and {file.path for file in plan.upload} <= {RESTART_FILE}
        return plan, self._wait_until_live(deployment, head, plan.path, path_started, only_restart)

    def _make_plan(self, deployment: _Deployment, snapshot: SpaceSnapshot) -> Plan:
        space = snapshot.state.id

        def read_remote(paths: list[str]) -> dict[str, bytes]:
            """Read contents from the local repository where it has the blob, otherwise from the Space."""
            local = read_blobs(self.folder, [snapshot.files[path].oid for path in paths if path != APP_FILE])
            contents: dict[str, bytes] = {}
            for path in paths:
                content = snapshot.app if path == APP_FILE else local.get(snapshot.files[path].oid)
                if content is None and path != APP_FILE:
                    content = self.hub.content(space, path)
                if content is not None:
                    contents[path] = content
            return contents

        readme, remote_readme = deployment.source.files[README], snapshot.files.get(README)
        front_matter = read_front_matter(readme)
        if remote_readme is not None and remote_readme.oid != readme.oid:
            front_matter = read_front_matter(File(README, remote_readme.oid, self.hub.content(space, README) or b""))
        return make_plan(deployment.source, snapshot.files, front_matter, read_remote, deployment.codebase)

    def _adjust_plan(self, plan: Plan, deployment: _Deployment, state: SpaceState) -> Plan:
        """Choose a more expensive path where the options or the Space's state require it."""
        if plan.path.is_cheaper_than(self.options.min_path):
            forced = replace(plan, path=self.options.min_path, reason="requested with --path")
            is_unchanged = plan.path is DeployPath.NOTHING
            return _force_restart(forced, deployment.source, forced.reason) if is_unchanged else forced
        if plan.path is DeployPath.HOT_RELOAD:
            state = self._wait_until_started(state)
            if state.stage != "RUNNING":
                deployment.fallbacks.append(f"hot reload: the Space is {state.stage}")
                reason = f"{plan.reason}, but the Space is {state.stage}"
                return replace(plan, path=DeployPath.RESTART, reason=reason)
        if plan.path is DeployPath.NOTHING and state.stage not in STARTING_STAGES:
            sha = deployment.source.sha
            running = self._wait_for_concurrent_deploy(state.host, sha)
            if running != sha:
                reason = f"the Space has the files, but runs {running and running[:12]}"
                return _force_restart(plan, deployment.source, reason)
        return plan

    def _wait_for_concurrent_deploy(self, host: str, sha: str) -> str | None:
        """Wait for another deploy of the same commit to become live; return the running commit."""
        deadline = time.monotonic() + CONCURRENT_DEPLOY_TIMEOUT
        while (running := self.hub.revision(host)) != sha and time.monotonic() < deadline:
            self.progress("the Space has the files; waiting for the application")
            time.sleep(self.options.poll)
        return running

    def _wait_until_started(self, state: SpaceState) -> SpaceState:
        """Wait for a starting Space, whose hot-reload port opens a little after the page."""
        deadline = time.monotonic() + STALE_STATE_SECONDS
        while state.stage in STARTING_STAGES and time.monotonic() < deadline:
            self.progress(f"waiting for the Space to start ({_readable(state.stage)})")
            time.sleep(self.options.poll)
            state = self.hub.state(state.id) or state
        return state

    def _prepare_uploads(self, snapshot: SpaceSnapshot, plan: Plan) -> list[CommitOperationAdd]:
        """Prepare the plan's uploads, and check that the snapshot's files are those of its head.

        State and files were read concurrently, so the files may be older than the head on which the commit is made.
        They are read a second time while the uploads are prepared.

        Raises:
            PreviewError: With `ExitCode.CONFLICT` if the files have changed.
        """
        current_files = in_thread(lambda: self.hub.files(snapshot.state.id))
        additions = self.hub.prepare_uploads(snapshot.state.id, plan.upload)
        if current_files.result() != snapshot.files:
            raise hub_error(412, f"commit to {snapshot.state.id}", "")
        return additions

    def _hot_reload(self, deployment: _Deployment, plan: Plan, snapshot: SpaceSnapshot) -> str | None:
        """Commit and hot-reload the files one by one, app.py with the stamp last.

        Returns:
            None once the page was built for the commit, otherwise the reason why it was not.

        Raises:
            PreviewError: If the new code fails; the old code continues to serve.
        """
        sha, state, head = deployment.source.sha, snapshot.state, snapshot.state.head
        additions = self._prepare_uploads(snapshot, plan)
        for file, addition in zip(plan.upload, additions):
            self.progress(f"hot reload of {file.path}")
            title = deploy_title(sha) if file is plan.upload[-1] else f"{RELOAD_TITLE}{file.path} for {sha}"
            parent, head = head, self.hub.commit(state.id, head, title, [addition], hot=True)
            try:
                state = self._wait_for_reload(state, file, parent, head)
            except _HotReloadFailed as problem:
                return str(problem)
        deadline = time.monotonic() + HOT_RELOAD_TIMEOUT
        while time.monotonic() < deadline:
            if self.hub.revision(state.host) == sha and self.hub.page_contains(state.host, sha):
                return None
            time.sleep(HOT_RELOAD_POLL)
        return f"the page still shows another commit after {HOT_RELOAD_TIMEOUT:.0f} s"

    def _wait_for_reload(self, state: SpaceState, file: File, parent: str, head: str) -> SpaceState:
        """Wait for the hot reload of one file.

        Returns:
            The Space's status afterwards.

        Raises:
            _HotReloadFailed: If the reload does not happen.
            PreviewError: If the Space receives another commit, or the new code fails.
        """
        events = None
        if state.replicas:  # known from an earlier reload, which saves a request to the Hub
            with suppress(PreviewError):  # the replicas may be gone, or the Hub has not started the reload
                events = self.hub.reload_events(state, head, timeout=KNOWN_REPLICA_TIMEOUT)
        if events is None:
            state = self._wait_for_reload_status(state.id, file, parent, head)
            try:
                events = self.hub.reload_events(state, head)
            except PreviewError as error:
                raise _HotReloadFailed(str(error)) from None
        for event in events:
            if event.get("kind") in ("exception", "error"):
                trace = str(event.get("traceback", "")).strip().splitlines()
                message = (
                    f"{file.path} fails: {trace[-1] if trace else 'no traceback'}. The old application continues to"
                    " serve. Fix the code and deploy again; if it needs a restart, deploy with --path restart."
                )
                raise PreviewError(message, ExitCode.APP, trace)
        return state

    def _wait_for_reload_status(self, space: str, file: File, parent: str, head: str) -> SpaceState:
        """Wait until the Hub reports the hot reload of a commit; return the Space's status."""
        deadline = time.monotonic() + HOT_RELOAD_TIMEOUT
        while (state := self._state(space)).head != head or state.reload is None:
            if state.head not in (head, parent):
                raise hub_error(412, f"reload {file.path}", "")
            if state.stage != "RUNNING" or time.monotonic() > deadline:
                raise _HotReloadFailed(f"the Hub did not start it (stage {state.stage})")
            time.sleep(HOT_RELOAD_POLL)
        if state.reload != "created":
            raise _HotReloadFailed(f"the Hub {state.reload} it")
        return state

    def _wait_until_live(
        self, deployment: _Deployment, head: str, path: DeployPath, path_started: float, only_restart: bool = False
    ) -> str:
        """Wait until the application reports the commit, and return its URL.

        Args:
            deployment: The deploy in progress.
            head: Last commit of the Space.
            path: The path in progress; a restart that takes half the timeout falls back to a build.
            path_started: Start of the path on the monotonic clock.
            only_restart: Whether the application that is about to stop already reports the commit, so that a restart
                must be seen first.

        Raises:
            PreviewError: If the build fails, the application does not start, or the timeout passes.
        """
        target, sha = deployment.target, deployment.source.sha
        logged_stage, restarted, has_started = "", False, False
        while True:
            state = self._state(target.space)
            elapsed = time.monotonic() - path_started
            has_started = has_started or state.stage in STARTING_STAGES
            is_new = not only_restart or (has_started and state.stage == "RUNNING") or state.running == head
            if is_new and self.hub.revision(state.host) == sha:
                deployment.by_path[path.value] = deployment.by_path.get(path.value, 0.0) + elapsed
                return state.host
            if deployment.job_url and deployment.job_seconds is None and self.hub.revision(deployment.job_url) == sha:
                deployment.job_seconds = round(time.monotonic() - path_started, 2)
                self.log(f"live in the temporary Job after {deployment.job_seconds:.0f} s: {deployment.job_url}")
            # Right after a commit the Hub may still report the stage of the previous one.
            stale_seconds = STALE_STATE_SECONDS * 4 if state.stage == "NO_APP_FILE" else STALE_STATE_SECONDS
            is_current = state.running == head or has_started or elapsed > stale_seconds
            if state.stage in FAILED_STAGES and is_current:
                code = FAILED_STAGES[state.stage]
                log = self.hub.logs(target.space, build=code is ExitCode.BUILD)
                problem = "could not be built" if code is ExitCode.BUILD else "does not start"
                raise PreviewError(f"{target.space} {problem} ({state.stage}). Last lines of its log:", code, log)
            if state.stage in HALTED_STAGES and not restarted:
                restarted = True
                self.log(f"the Space is {_readable(state.stage)}: starting it")
                self.hub.restart(target.space)
            if state.stage != logged_stage:
                logged_stage = state.stage
                self.log(f"{_readable(state.stage)}, {elapsed:.0f} s")
            self.progress(f"{path.value}: {_readable(state.stage)}, {elapsed:.0f} s")
            if elapsed > self.options.timeout / 2 and path is DeployPath.RESTART:
                deployment.fallbacks.append(f"restart: not live after {elapsed:.0f} s")
                deployment.by_path[path.value] = elapsed
                self.log(f"not live after {elapsed:.0f} s; rebuilding the image")
                self.hub.restart(target.space, factory=True)
                path, path_started = DeployPath.BUILD, time.monotonic()
            if elapsed > self.options.timeout:
                message = (
                    f"{target.space} does not report {sha[:12]} after {elapsed:.0f} s (stage {state.stage})."
                    " See `python -m previews logs`, or set a longer --timeout."
                )
                raise PreviewError(message, ExitCode.TIMEOUT, self.hub.logs(target.space))
            time.sleep(self.options.poll)

    def _start_job(self, deployment: _Deployment, head: str) -> None:
        """Start a Job that serves the preview until its Space is ready; on failure, only log the reason."""
        target = deployment.target
        env = {BRANCH_VARIABLE: target.branch, "PREVIEW_COMMIT": deployment.source.sha, "DATA_DIR": "/tmp/data"}
        env |= {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": "7860"}
        image, owner = f"hf.co/spaces/{self.options.job_image_space}", target.space.split("/", 1)[0]
        try:
            deployment.job = self.hub.run_job(image, target.space, head, env, JOB_SECONDS, owner)
        except PreviewError as error:
            self.log(f"no temporary Job: {error}")
            return
        deployment.job_url = next(iter(deployment.job.status.expose_urls or []), "").rstrip("/")
        url = deployment.job_url or deployment.job.url
        self.log(f"starting a temporary Job, public, ${JOB_PRICE:.2f} an hour: {url}")

    def _cancel_job(self, id: str, target: Target) -> None:
        """Cancel the temporary Job. A failure is only logged: it must not change the result of the deploy."""
        try:
            self.hub.cancel_job(id, target.space.split("/", 1)[0])
        except Exception as error:
            description = redact_secrets(str(error)) or type(error).__name__
            limit = f"It ends by itself after {JOB_SECONDS // 60} minutes"
            self.log(f"the temporary Job could not be canceled ({description}). {limit}; or cancel {id} on the Hub")
        else:
            self.log("the temporary Job has been canceled")

    def _state(self, space: str) -> SpaceState:
        state = self.hub.state(space)
        if state is None:
            raise PreviewError(f"{space} was deleted during the deploy.", ExitCode.NOT_FOUND)
        return state


def preview_target(owner: str, app: str, branch: str) -> Target:
    """Return the preview Space of a branch."""
    return Target(f"{owner}/{space_name(owner, app, branch)}", branch, app)


def production_target(owner: str, app: str, branch: str) -> Target:
    """Return the application's production Space."""
    return Target(f"{owner}/{app}", branch, f"{app}/production", is_production=True)


def own_bucket(space: str) -> str:
    """Return the bucket that belongs to a Space alone, and is deleted with it."""
    return f"{space}-state"


def deploy_title(sha: str) -> str:
    """Return the title of the Space commit that completes a deploy."""
    return f"{DEPLOY_TITLE}{sha}"


def deployed_sha(title: str) -> str | None:
    """Return the commit whose deploy a Space commit completed, from its title; None for other commits."""
    return _full_sha(title.removeprefix(DEPLOY_TITLE)) if title.startswith(DEPLOY_TITLE) else None


def _full_sha(text: str) -> str | None:
    return text if re.fullmatch(r"[0-9a-f]{40}", text) else None


def _force_restart(plan: Plan, source: Source, reason: str) -> Plan:
    """Add a changed file to a plan, since the Hub ignores empty commits."""
    content = f"{source.sha} {time.time_ns()}\n".encode()
    file = File(RESTART_FILE, blob_oid(content), content)
    path = plan.path if plan.path is DeployPath.BUILD else DeployPath.RESTART
    return Plan(path, reason, [*plan.upload, file], plan.delete)


def _readable(stage: str) -> str:
    return stage.lower().replace("_", " ")


def _cpu_seconds() -> float:
    """Return the processor time used by this process and its finished children, in seconds."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
