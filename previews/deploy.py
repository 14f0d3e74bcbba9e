"""A commit goes live: by hot reload, by a restart or by a build, until the running application itself reports it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path as Folder
from typing import Any

from previews.changes import Path, Plan, plan, read_front_matter
from previews.errors import Exit, PreviewError
from previews.hub import Hub, State
from previews.names import space_name
from previews.source import File, Source, blob_oid, is_ancestor, read

MARKER, BRANCH = "PREVIEW_OF", "PREVIEW_BRANCH"
STARTING = ("BUILDING", "RUNNING_BUILDING", "APP_STARTING", "RUNNING_APP_STARTING")
BROKEN = {"BUILD_ERROR": Exit.BUILD, "CONFIG_ERROR": Exit.BUILD, "NO_APP_FILE": Exit.BUILD, "RUNTIME_ERROR": Exit.APP}
HALTED = ("PAUSED", "STOPPED", "SLEEPING", "DELETING")
GRACE = 30.0  # seconds after a commit in which an error may be one of before
HOT_LIMIT = 15.0  # seconds until a hot-reloaded commit must be seen
RETRIES = 3  # plans, when somebody else commits in between
JOB_PRICE, JOB_SECONDS = 0.02, 1800  # dollars an hour: cpu-basic .01 and a public port .01


@dataclass(frozen=True)
class Target:
    """A Space to deploy to. marker: the variable's value by which this application knows its own Spaces."""

    space: str
    branch: str
    marker: str


@dataclass(frozen=True)
class Options:
    """How a new Space is made, and how long to wait."""

    visibility: str = "private"
    secrets: dict[str, str] = field(default_factory=dict, repr=False)
    variables: dict[str, str] = field(default_factory=dict)
    hardware: str | None = None
    timeout: float = 1200.0
    poll: float = 1.0
    at_least: Path = Path.NOTHING
    fast_from: str | None = None  # the Space whose image serves a first preview in a Job


@dataclass(frozen=True)
class Result:
    """What came of a deploy. seconds: from the start to live; own: of these, not spent waiting for the Hub."""

    space: str
    branch: str
    sha: str
    url: str
    path: str
    reason: str
    seconds: float
    own_seconds: float
    fallbacks: list[str]

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


class Deployer:
    """Brings Spaces to commits. say: takes a line for a person."""

    def __init__(self, hub: Hub, folder: Folder, options: Options, say: Callable[[str], None]) -> None:
        self.hub, self.folder, self.options, self.say = hub, folder, options, say

    def deploy(self, target: Target, sha: str) -> Result:
        """Until the application reports the commit. Raises PreviewError."""
        began, waited = time.monotonic(), self.hub.waited
        source = read(self.folder, sha)
        if source.files.get("README.md") is None:
            raise PreviewError("A Space needs a README.md with its front-matter.", Exit.USAGE)
        created = self._exists(target)
        fallbacks: list[str] = []
        job: Any = None
        try:
            for attempt in range(RETRIES):
                try:
                    done, url, job = self._bring(target, source, fallbacks, job, created)
                    break
                except PreviewError as error:
                    if error.code is not Exit.CONFLICT or attempt == RETRIES - 1:
                        raise
                    self._give_way(target, source.sha)
                    self.say("somebody else committed to this Space; looking again")
            else:
                raise AssertionError("unreachable")
        finally:
            if job is not None:
                self.hub.end_job(job.id, target.space.split("/", 1)[0])
                self.say("the Job has been ended")
        seconds = time.monotonic() - began
        own = round(seconds - (self.hub.waited - waited), 2)
        how = (done.path.value, done.reason, round(seconds, 2), own, fallbacks)
        return Result(target.space, target.branch, source.sha, url, *how)

    # ── Steps ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _exists(self, target: Target) -> bool:
        """Makes the Space if it is not there; whether it is new. A Space of somebody else's is left alone."""
        if self.hub.state(target.space) is None:
            variables = {**self.options.variables, MARKER: target.marker, BRANCH: target.branch}
            options = self.options
            self.say(f"creating {target.space} ({options.visibility})")
            if self.hub.create(target.space, options.visibility, options.secrets, variables, options.hardware):
                return True
        if self.hub.variables(target.space).get(MARKER) != target.marker:
            message = f"{target.space} exists and is not one of this application's ({MARKER} is not {target.marker!r})."
            raise PreviewError(f"{message} Choose another --app, or set that variable if it is yours.", Exit.CONFLICT)
        return False

    def _give_way(self, target: Target, sha: str) -> None:
        """Raises PreviewError if what was committed in between is newer than what shall be deployed."""
        for _, title in self.hub.titles(target.space)[:1]:
            newer = deployed_sha(title)
            if newer and newer != sha and is_ancestor(self.folder, sha, newer):
                raise PreviewError(f"Superseded: {newer[:12]} of this branch is being deployed.", Exit.CONFLICT)

    def _bring(
        self, target: Target, source: Source, fallbacks: list[str], job: Any, created: bool
    ) -> tuple[Plan, str, Any]:
        state = self._state(target)
        remote = self.hub.files(target.space)
        ours = source.files["README.md"]
        same_readme = "README.md" in remote and remote["README.md"].oid == ours.oid
        front = read_front_matter(
            ours if same_readme else File("README.md", "", self.hub.text(target.space, "README.md").encode())
        )
        made = plan(source, remote, front)
        made = self._fitting(made, source, state, fallbacks)
        self.say(f"{made.path.value}: {made.reason}")
        if made.path is Path.HOT_RELOAD:
            problem = self._hot(target, source, made, state)
            if problem is None:
                return made, state.host, job
            fallbacks.append(f"hot reload: {problem}")
            self.say(f"hot reload did not show it ({problem}); restarting instead")
            remote, state = self.hub.files(target.space), self._state(target)
            made = self._forced(plan(source, remote, front), source, problem)
        head = state.head
        if made.path is not Path.NOTHING:
            head = self.hub.commit(target.space, state.head, title(source.sha), made.send, made.delete)
            if created and self.options.fast_from and job is None:
                job = self._fast(target, head)
        return made, self._until_live(target, source.sha, head, made.path, fallbacks), job

    def _fitting(self, made: Plan, source: Source, state: State, fallbacks: list[str]) -> Plan:
        """The plan as the Space's state allows it."""
        if made.path is Path.HOT_RELOAD and self.options.at_least in (Path.RESTART, Path.BUILD):
            return replace(made, path=self.options.at_least, reason="asked for")
        if made.path is Path.HOT_RELOAD:
            state = self._settled(state)
        if made.path is Path.HOT_RELOAD and state.stage != "RUNNING":
            fallbacks.append(f"hot reload: the Space is {state.stage}")
            return replace(made, path=Path.RESTART, reason=f"{made.reason}, but the Space is {state.stage}")
        if made.path is Path.NOTHING and state.stage not in STARTING:
            running = self.hub.revision(state.host)
            if running != source.sha:
                return self._forced(made, source, f"the Space has the files, and runs {running and running[:12]}")
        return made

    def _settled(self, state: State) -> State:
        """A Space that is starting, when it has started: hot reload opens its port a little after the page."""
        deadline = time.monotonic() + GRACE
        while state.stage in STARTING and time.monotonic() < deadline:
            self.hub.sleep(self.options.poll)
            state = self.hub.state(state.id) or state
        return state

    def _forced(self, made: Plan, source: Source, reason: str) -> Plan:
        """A plan that restarts even where no file differs: the Hub makes no commit of nothing, so one line changes."""
        content = f"{source.sha} {time.time_ns()}\n".encode()
        mark = File(".deploy", blob_oid(content), content)
        path = made.path if made.path is Path.BUILD else Path.RESTART
        return Plan(path, reason, [*made.send, mark], made.delete)

    def _hot(self, target: Target, source: Source, made: Plan, state: State) -> str | None:
        """Sends the files one by one, the stamp last; None when the application reports the commit, else why not.

        Raises PreviewError if the new code does not run: then the old goes on serving.
        """
        head = state.head
        for file in made.send:
            last = file is made.send[-1]
            words = title(source.sha) if last else f"Hot reload of {file.path} for {source.sha}"
            head = self.hub.commit(target.space, head, words, [file], [], hot=True)
            try:
                problem = self._reloaded(target, file, head)
            except PreviewError as error:
                if error.code is not Exit.NETWORK:
                    raise
                problem = str(error)
            if problem:
                return problem
        deadline = time.monotonic() + HOT_LIMIT
        while time.monotonic() < deadline:
            if self.hub.revision(state.host) == source.sha:
                return None
            self.hub.sleep(0.1)
        return f"after {HOT_LIMIT:.0f} s the page was still another commit's"

    def _reloaded(self, target: Target, file: File, head: str) -> str | None:
        """Waits for a file's reload; why it did not come about, or None."""
        deadline = time.monotonic() + HOT_LIMIT
        while (state := self._state(target)).head != head or state.reload is None or state.running != head:
            if state.reload == "canceled" and state.head == head:
                return "the Hub canceled it"
            if state.stage != "RUNNING" or time.monotonic() > deadline:
                return f"the Hub did not do it (stage {state.stage})"
            self.hub.sleep(0.1)
        if state.reload != "created":
            return f"the Hub says it is {state.reload}"
        for event in self.hub.reload_events(state, head):
            if event.get("kind") in ("exception", "error"):
                trace = str(event.get("traceback", "")).strip().splitlines()
                message = (
                    f"{file.path} does not run: {trace[-1] if trace else 'no traceback'}. The old application goes on"
                    " serving. Mend it and deploy again; if it runs after a restart, deploy with --path restart."
                )
                raise PreviewError(message, Exit.APP, trace)
        return None

    def _until_live(self, target: Target, sha: str, head: str, path: Path, fallbacks: list[str]) -> str:
        """The address, once the application there reports the commit. Raises PreviewError when that cannot be."""
        began, shown, rebuilt, moved = time.monotonic(), "", False, False
        while True:
            state = self._state(target)
            if self.hub.revision(state.host) == sha:
                return state.host
            spent = time.monotonic() - began
            # Right after a commit the Hub may still tell of what was before it.
            moved = moved or state.stage in STARTING
            current = state.running == head or moved or spent > GRACE
            if state.stage in BROKEN and current:
                self._broken(target, state)
            if state.stage in HALTED and path is Path.NOTHING:
                message = f"{target.space} is {state.stage}. Start it with: python -m previews deploy --path restart"
                raise PreviewError(message, Exit.APP)
            if state.stage != shown:
                shown = state.stage
                self.say(f"{state.stage.lower().replace('_', ' ')}, {spent:.0f} s")
            if spent > self.options.timeout / 2 and path is Path.RESTART and not rebuilt:
                rebuilt = True
                fallbacks.append(f"restart: not live after {spent:.0f} s")
                self.say(f"not live after {spent:.0f} s; building it anew")
                self.hub.restart(target.space, factory=True)
            if spent > self.options.timeout:
                log = self.hub.logs(target.space)
                message = f"{target.space} does not report {sha[:12]} after {spent:.0f} s (stage {state.stage})."
                message += " Look at: python -m previews logs; or give it a longer --timeout."
                raise PreviewError(message, Exit.TIMEOUT, log)
            self.hub.sleep(self.options.poll)

    def _broken(self, target: Target, state: State) -> None:
        building = BROKEN[state.stage] is Exit.BUILD
        log = self.hub.logs(target.space, build=building)
        what = "could not be built" if building else "does not start"
        message = f"{target.space} {what} ({state.stage}). The last lines of its log:"
        raise PreviewError(message, BROKEN[state.stage], log)

    def _fast(self, target: Target, head: str) -> Any:
        """A Job that serves the preview until its Space is ready; None if it cannot be started."""
        owner = target.space.split("/", 1)[0]
        env = {BRANCH: target.branch, "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": "7860"}
        try:
            image = f"hf.co/spaces/{self.options.fast_from}"
            job = self.hub.run_job(image, target.space, head, env, JOB_SECONDS, owner)
            urls = job.status.expose_urls or []
        except PreviewError as error:
            self.say(f"no Job for the meantime: {error}")
            return None
        where = ", ".join(urls) or job.url
        self.say(f"in the meantime a Job serves it, open to all, for ${JOB_PRICE:.2f} an hour: {where}")
        return job

    def _state(self, target: Target) -> State:
        state = self.hub.state(target.space)
        if state is None:
            raise PreviewError(f"{target.space} has been deleted in the meantime.", Exit.NOT_FOUND)
        return state


def preview(owner: str, app: str, branch: str) -> Target:
    """The Space of a branch."""
    return Target(f"{owner}/{space_name(owner, app, branch)}", branch, app)


def production(owner: str, app: str, branch: str) -> Target:
    """The application's main Space."""
    return Target(f"{owner}/{app}", branch, f"{app}/production")


def title(sha: str) -> str:
    """The title of the commit that completes a deploy."""
    return f"Deploy {sha}"


def deployed_sha(words: str) -> str | None:
    """The commit that a Space's commit completed the deploy of, by its title."""
    kind, _, sha = words.partition(" ")
    return sha if kind == "Deploy" and len(sha) == 40 and set(sha) <= set("0123456789abcdef") else None
