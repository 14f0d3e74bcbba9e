"""A commit goes live: by hot reload, by a restart or by a build, until the running application itself reports it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path as Folder
from typing import Any

from huggingface_hub import CommitOperationAdd

from previews.errors import Exit, PreviewError, refused
from previews.hot_reload import Program
from previews.hub import Hub, SpaceSnapshot, State, asked
from previews.names import space_name
from previews.plan import FORCED, DeployPath, Plan, plan, read_front_matter
from previews.source import APP_FILE, README, File, Source, blob_oid, blobs, is_ancestor, read

MARKER, BRANCH = "PREVIEW_OF", "PREVIEW_BRANCH"
STARTING = ("BUILDING", "RUNNING_BUILDING", "APP_STARTING", "RUNNING_APP_STARTING")
BROKEN = {"BUILD_ERROR": Exit.BUILD, "CONFIG_ERROR": Exit.BUILD, "NO_APP_FILE": Exit.BUILD, "RUNTIME_ERROR": Exit.APP}
HALTED = ("PAUSED", "STOPPED", "SLEEPING")
DEPLOY, PART = "Deploy ", "Hot reload of "  # how the titles of our commits in a Space begin
GRACE = 30.0  # seconds after a commit in which an error may be one of before
HOT_LIMIT = 15.0  # seconds until a hot-reloaded commit must be seen
HOT_POLL = 0.1
KNOWN = 1.5  # seconds in which a replica that has reloaded before must hear of a commit
PATIENCE = 5.0  # seconds in which what another deploy has sent may go live
RETRIES = 3  # plans, when somebody else commits in between
JOB_PRICE, JOB_SECONDS = 0.02, 1800  # dollars an hour: cpu-basic .01 and a public port .01


@dataclass(frozen=True)
class Target:
    """A Space to deploy to. marker: the variable's value by which this application knows its own Spaces.

    shared: it shows now this branch, now that one, as main's Space does; a preview's is one branch's for good.
    """

    space: str
    branch: str
    marker: str
    shared: bool = False


@dataclass(frozen=True)
class Options:
    """How a new Space is made, and how long to wait."""

    visibility: str = "private"
    secrets: dict[str, str] = field(default_factory=dict, repr=False)
    variables: dict[str, str] = field(default_factory=dict)
    hardware: str | None = None
    timeout: float = 1200.0
    poll: float = 1.0
    at_least: DeployPath = DeployPath.NOTHING
    slim: bool = False  # a preview without models of its own, whose image is built sooner
    fast_from: str | None = None  # the Space whose image serves a first preview in a Job


@dataclass(frozen=True)
class Result:
    """What came of a deploy.

    seconds: until live, since the push where its time was told, else since the command began (`since` says which);
    by_path: of these, what each path took that was tried, in order; own_seconds: processor time of the deployer
    itself, the rest is waiting; job_seconds: until a Job served the commit meanwhile.
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
        """For --json."""
        return asdict(self)


@dataclass
class _Run:
    """A deploy that is going on: what it has made, what it took, and what did not work."""

    target: Target
    source: Source
    program: Callable[[], Program]
    created: bool = False
    fallbacks: list[str] = field(default_factory=list)
    by_path: dict[str, float] = field(default_factory=dict)
    job: Any = None
    job_url: str = ""
    job_seconds: float | None = None


class _NotShown(Exception):
    """Why a hot reload has not come about."""


class Deployer:
    """Brings Spaces to commits. say: takes a line for a person; tick: takes one that the next may replace.

    began: when the program began, on the monotonic clock; pushed: when the commit was pushed, in seconds of Unix time.
    """

    def __init__(
        self,
        hub: Hub,
        folder: Folder,
        options: Options,
        say: Callable[[str], None],
        tick: Callable[[str], None] = lambda _: None,
        began: float | None = None,
        pushed: float | None = None,
    ) -> None:
        self.hub, self.folder, self.options, self.say, self.tick = hub, folder, options, say, tick
        self.began, self.pushed = began, pushed

    def deploy(self, target: Target, sha: str) -> Result:
        """Until the application reports the commit. Raises PreviewError."""
        began, used = (time.monotonic(), _processor()) if self.began is None else (self.began, 0.0)
        look = asked(lambda: self.hub.look(target.space))
        source = read(self.folder, sha, slim=self.options.slim and not target.shared)
        # It takes as long as the Hub does to answer.
        run = _Run(target, source, asked(lambda: Program(source.python)).result)
        try:
            done, url = self._with_retries(run, look.result())
        finally:
            if run.job is not None:
                self.hub.end_job(run.job.id, target.space.split("/", 1)[0])
                self.say("the Job has been ended")
        spent = time.monotonic() - began
        return Result(
            target.space,
            target.branch,
            run.source.sha,
            url,
            done.path.value,
            done.reason,
            seconds=round(max(spent, time.time() - self.pushed) if self.pushed else spent, 2),
            since="push" if self.pushed else "start",
            by_path={path: round(seconds, 2) for path, seconds in run.by_path.items()},
            own_seconds=round(_processor() - used, 2),
            fallbacks=run.fallbacks,
            job_seconds=run.job_seconds,
        )

    # ── Steps ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _with_retries(self, run: _Run, seen: SpaceSnapshot | None) -> tuple[Plan, str]:
        for attempt in range(1, RETRIES + 1):
            try:
                return self._bring(run, self._found(run, seen))
            except PreviewError as error:
                if error.code is not Exit.CONFLICT or error.final or seen is None or attempt == RETRIES:
                    raise
                self._give_way(run.target, run.source.sha)
                self.say("somebody else committed to this Space; looking again")
                seen = self.hub.look(run.target.space)
        raise AssertionError("unreachable")

    def _found(self, run: _Run, seen: SpaceSnapshot | None) -> SpaceSnapshot:
        """The Space, made if it is not there. Raises PreviewError for another application's or branch's."""
        target, options = run.target, self.options
        if seen is None:
            variables = {**options.variables, MARKER: target.marker, BRANCH: target.branch}
            self.say(f"creating {target.space} ({options.visibility})")
            run.created = self.hub.create(
                target.space, options.visibility, options.secrets, variables, options.hardware
            )
            seen = self.hub.look(target.space)
            if seen is None:
                raise PreviewError(f"{target.space} has been made and cannot be seen. Run this again.", Exit.NOT_FOUND)
        said = seen.variables
        if said.get(MARKER) != target.marker:
            message = f"{target.space} exists and is not one of this application's ({MARKER} is not {target.marker!r})."
            message += " Choose another --app, or set that variable if it is yours."
            raise PreviewError(message, Exit.CONFLICT, final=True)
        if said.get(BRANCH) != target.branch and not target.shared:
            message = f"{target.space} is the preview of another branch, {said.get(BRANCH)!r}. Rename this branch."
            raise PreviewError(message, Exit.CONFLICT, final=True)
        for name, value in options.variables.items():
            if not run.created and said.get(name) != value:
                self.say(f"{name} has another value in this Space: it is given when a Space is made. See its settings.")
        return seen

    def _give_way(self, target: Target, sha: str) -> None:
        """Raises PreviewError if what was committed in between is newer than what shall be deployed."""
        for _, words in self.hub.titles(target.space)[:1]:
            newer = deployed_sha(words) or _sha(words.removeprefix(PART).rpartition(" for ")[2])
            if newer and newer != sha and is_ancestor(self.folder, sha, newer):
                message = f"Superseded: {newer[:12]} of this branch is being deployed."
                raise PreviewError(message, Exit.CONFLICT, final=True)

    def _bring(self, run: _Run, seen: SpaceSnapshot) -> tuple[Plan, str]:
        began = time.monotonic()
        made = self._plan(run, seen)
        made = self._fitting(made, run, seen.state)
        self.say(f"{made.path.value}: {made.reason}")
        state = seen.state
        if made.path is DeployPath.HOT_RELOAD:
            problem = self._hot(run, made, seen)
            run.by_path[DeployPath.HOT_RELOAD.value] = time.monotonic() - began
            if problem is None:
                return made, state.host
            run.fallbacks.append(f"hot reload: {problem}")
            self.say(f"hot reload did not show it ({problem}); restarting instead")
            began, seen = time.monotonic(), self._found(run, self.hub.look(state.id))
            state = seen.state
            made = self._forced(self._plan(run, seen), run.source, problem)
        head = state.head
        if made.path is not DeployPath.NOTHING:
            additions = self._prepared(seen, made)
            head = self.hub.commit(state.id, head, title(run.source.sha), additions, made.delete)
            if self.options.at_least is DeployPath.BUILD and not run.created:
                self.hub.restart(state.id, factory=True)  # a commit alone takes from the last image what it can
            if run.created and self.options.fast_from and run.job is None:
                self._fast(run, head)
        # What is only started again tells the commit before that, too.
        again = made.path is not DeployPath.NOTHING and not {file.path for file in made.send} - {FORCED}
        return made, self._until_live(run, head, made.path, began, again)

    def _plan(self, run: _Run, seen: SpaceSnapshot) -> Plan:
        """What differs between the Space and the commit."""

        def before(paths: list[str]) -> dict[str, bytes]:
            here = blobs(self.folder, [seen.files[path].oid for path in paths if path != APP_FILE])
            found = {APP_FILE: seen.app} if APP_FILE in paths else {}
            for path in paths:
                if path not in found:
                    known = here.get(seen.files[path].oid)
                    found[path] = known if known is not None else self.hub.content(seen.state.id, path)
            return {path: content for path, content in found.items() if content is not None}

        ours, theirs = run.source.files[README], seen.files.get(README)
        front = read_front_matter(ours)
        if theirs is not None and theirs.oid != ours.oid:
            front = read_front_matter(File(README, theirs.oid, self.hub.content(seen.state.id, README) or b""))
        return plan(run.source, seen.files, front, before, run.program)

    def _fitting(self, made: Plan, run: _Run, state: State) -> Plan:
        """The plan as the options and the Space's state allow it."""
        least = self.options.at_least
        if made.path.is_less_than(least):
            more = replace(made, path=least, reason="asked for")
            return self._forced(more, run.source, more.reason) if made.path is DeployPath.NOTHING else more
        if made.path is DeployPath.HOT_RELOAD:
            state = self._settled(state)
        if made.path is DeployPath.HOT_RELOAD and state.stage != "RUNNING":
            run.fallbacks.append(f"hot reload: the Space is {state.stage}")
            return replace(made, path=DeployPath.RESTART, reason=f"{made.reason}, but the Space is {state.stage}")
        if made.path is DeployPath.NOTHING and state.stage not in STARTING:
            running = self._soon(state.host, run.source.sha)
            if running != run.source.sha:
                return self._forced(made, run.source, f"the Space has the files, and runs {running and running[:12]}")
        return made

    def _soon(self, host: str, sha: str) -> str | None:
        """What runs, once it is the commit or has had time to become it: another deploy may be at work."""
        deadline = time.monotonic() + PATIENCE
        while (running := self.hub.revision(host)) != sha and time.monotonic() < deadline:
            self.tick("the files are there; waiting for the application")
            time.sleep(self.options.poll)
        return running

    def _settled(self, state: State) -> State:
        """A Space that is starting, when it has started: hot reload opens its port a little after the page."""
        deadline = time.monotonic() + GRACE
        while state.stage in STARTING and time.monotonic() < deadline:
            self.tick(f"waiting until the Space has started ({_words(state.stage)})")
            time.sleep(self.options.poll)
            state = self.hub.state(state.id) or state
        return state

    def _forced(self, made: Plan, source: Source, reason: str) -> Plan:
        """A plan that restarts even where no file differs: the Hub makes no commit of nothing, so one line changes."""
        content = f"{source.sha} {time.time_ns()}\n".encode()
        mark = File(FORCED, blob_oid(content), content)
        path = made.path if made.path is DeployPath.BUILD else DeployPath.RESTART
        return Plan(path, reason, [*made.send, mark], made.delete)

    def _prepared(self, seen: SpaceSnapshot, made: Plan) -> list[CommitOperationAdd]:
        """What to commit, known to the Hub. Raises PreviewError if the Space has other files than were looked at.

        A commit is made upon the head that was looked at. The files were asked for at the same time, so they may be
        those of just before that head; a second look, for which nobody has to wait, would show it.
        """
        again = asked(lambda: self.hub.files(seen.state.id))
        additions = self.hub.additions(seen.state.id, made.send)
        if again.result() != seen.files:
            raise refused(412, f"commit to {seen.state.id}", "")
        return additions

    def _hot(self, run: _Run, made: Plan, seen: SpaceSnapshot) -> str | None:
        """Sends the files one by one, the stamp last; None when the page is the commit's, else why it is not.

        Raises PreviewError if the new code does not run: then the old goes on serving.
        """
        sha, state, head = run.source.sha, seen.state, seen.state.head
        additions = self._prepared(seen, made)
        for file, addition in zip(made.send, additions):
            last = file is made.send[-1]
            self.tick(f"hot reload of {file.path}")
            words = title(sha) if last else part_title(file.path, sha)
            parent, head = head, self.hub.commit(state.id, head, words, [addition], hot=True)
            try:
                state = self._reloaded(state, file, parent, head)
            except _NotShown as problem:
                return str(problem)
        deadline = time.monotonic() + HOT_LIMIT
        while time.monotonic() < deadline:
            if self.hub.revision(state.host) == sha and self.hub.page_tells(state.host, sha):
                return None
            time.sleep(HOT_POLL)
        return f"after {HOT_LIMIT:.0f} s the page was still another commit's"

    def _reloaded(self, state: State, file: File, parent: str, head: str) -> State:
        """Waits for a file's reload; the Space's state then.

        Raises _NotShown if it does not come about, PreviewError if somebody else commits or the new code does not run.
        """
        events = None
        if state.replicas:  # known from an earlier reload, which spares a question to the Hub
            with suppress(PreviewError):  # they may have gone, or the Hub has not done it
                events = self.hub.reload_events(state, head, patience=KNOWN)
        if events is None:
            state = self._reload_state(state.id, file, parent, head)
            try:
                events = self.hub.reload_events(state, head)
            except PreviewError as error:
                raise _NotShown(str(error)) from None
        for event in events:
            if event.get("kind") in ("exception", "error"):
                trace = str(event.get("traceback", "")).strip().splitlines()
                message = (
                    f"{file.path} does not run: {trace[-1] if trace else 'no traceback'}. The old application goes on"
                    " serving. Mend it and deploy again; if it runs after a restart, deploy with --path restart."
                )
                raise PreviewError(message, Exit.APP, trace)
        return state

    def _reload_state(self, space: str, file: File, parent: str, head: str) -> State:
        """The Space's state once the Hub has made the reload."""
        deadline = time.monotonic() + HOT_LIMIT
        while (state := self._state(space)).head != head or state.reload is None:
            if state.head not in (head, parent):
                raise refused(412, f"reload {file.path}", "")
            if state.stage != "RUNNING" or time.monotonic() > deadline:
                raise _NotShown(f"the Hub did not do it (stage {state.stage})")
            time.sleep(HOT_POLL)
        if state.reload != "created":
            raise _NotShown(f"the Hub has {state.reload} it")
        return state

    def _until_live(self, run: _Run, head: str, path: DeployPath, began: float, again: bool = False) -> str:
        """The address, once the application there reports the commit. Raises PreviewError when that cannot be.

        again: not the one that may have reported it before, but the one that is started now.
        """
        target, sha = run.target, run.source.sha
        shown, woken, moved = "", False, False
        while True:
            state = self._state(target.space)
            spent = time.monotonic() - began
            moved = moved or state.stage in STARTING
            new = not again or (moved and state.stage == "RUNNING") or state.running == head
            if new and self.hub.revision(state.host) == sha:
                run.by_path[path.value] = run.by_path.get(path.value, 0.0) + spent
                return state.host
            self._look_at_job(run, began)
            # Right after a commit the Hub may still tell of what was before it.
            current = state.running == head or moved or spent > (GRACE * 4 if state.stage == "NO_APP_FILE" else GRACE)
            if state.stage in BROKEN and current:
                self._broken(target, state)
            if state.stage in HALTED and not woken:
                woken = True
                self.say(f"the Space is {_words(state.stage)}: starting it")
                self.hub.restart(target.space)
            if state.stage != shown:
                shown = state.stage
                self.say(f"{_words(state.stage)}, {spent:.0f} s")
            self.tick(f"{path.value}: {_words(state.stage)}, {spent:.0f} s")
            if spent > self.options.timeout / 2 and path is DeployPath.RESTART:
                run.fallbacks.append(f"restart: not live after {spent:.0f} s")
                run.by_path[path.value] = spent
                self.say(f"not live after {spent:.0f} s; building it anew")
                self.hub.restart(target.space, factory=True)
                path, began = DeployPath.BUILD, time.monotonic()
            if spent > self.options.timeout:
                log = self.hub.logs(target.space)
                message = f"{target.space} does not report {sha[:12]} after {spent:.0f} s (stage {state.stage})."
                message += " Look at: python -m previews logs; or give it a longer --timeout."
                raise PreviewError(message, Exit.TIMEOUT, log)
            time.sleep(self.options.poll)

    def _broken(self, target: Target, state: State) -> None:
        building = BROKEN[state.stage] is Exit.BUILD
        log = self.hub.logs(target.space, build=building)
        what = "could not be built" if building else "does not start"
        message = f"{target.space} {what} ({state.stage}). The last lines of its log:"
        raise PreviewError(message, BROKEN[state.stage], log)

    def _fast(self, run: _Run, head: str) -> None:
        """Starts a Job that serves the preview until its Space is ready, if one can be started."""
        owner = run.target.space.split("/", 1)[0]
        env = {BRANCH: run.target.branch, "PREVIEW_COMMIT": run.source.sha, "DATA_DIR": "/tmp/data"}
        env |= {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": "7860"}
        try:
            image = f"hf.co/spaces/{self.options.fast_from}"
            run.job = self.hub.run_job(image, run.target.space, head, env, JOB_SECONDS, owner)
        except PreviewError as error:
            self.say(f"no Job for the meantime: {error}")
            return
        run.job_url = next(iter(run.job.status.expose_urls or []), "").rstrip("/")
        where = run.job_url or run.job.url
        self.say(f"in the meantime a Job serves it, open to all, for ${JOB_PRICE:.2f} an hour: {where}")

    def _look_at_job(self, run: _Run, began: float) -> None:
        """Says when the Job serves the commit, once."""
        if run.job_url and run.job_seconds is None and self.hub.revision(run.job_url) == run.source.sha:
            run.job_seconds = round(time.monotonic() - began, 2)
            self.say(f"the Job serves it since {run.job_seconds:.0f} s: {run.job_url}")

    def _state(self, space: str) -> State:
        state = self.hub.state(space)
        if state is None:
            raise PreviewError(f"{space} has been deleted in the meantime.", Exit.NOT_FOUND)
        return state


def preview(owner: str, app: str, branch: str) -> Target:
    """The Space of a branch."""
    return Target(f"{owner}/{space_name(owner, app, branch)}", branch, app)


def production(owner: str, app: str, branch: str) -> Target:
    """The application's main Space."""
    return Target(f"{owner}/{app}", branch, f"{app}/production", shared=True)


def title(sha: str) -> str:
    """The title of the commit that completes a deploy."""
    return f"{DEPLOY}{sha}"


def part_title(path: str, sha: str) -> str:
    """The title of a commit that brings one file of several."""
    return f"{PART}{path} for {sha}"


def deployed_sha(words: str) -> str | None:
    """The commit that a Space's commit completed the deploy of, by its title."""
    return _sha(words.removeprefix(DEPLOY)) if words.startswith(DEPLOY) else None


def _sha(text: str) -> str | None:
    return text if re.fullmatch(r"[0-9a-f]{40}", text) else None


def _words(stage: str) -> str:
    return stage.lower().replace("_", " ")


def _processor() -> float:
    """Seconds of processor time that this process and those it has waited for have used."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system
