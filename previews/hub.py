"""The Hub as the deployer sees it: huggingface_hub's calls, with waiting, retries and plain words for failures."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    SpaceHardware,
    Volume,
    constants,
    get_token,
    set_client_factory,
)
from huggingface_hub.errors import HfHubHTTPError, OIDCError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, get_session, hf_raise_for_status
from huggingface_hub.utils._http import default_client_factory

from previews.errors import Exit, PreviewError, refused, without_secrets
from previews.plan import Remote
from previews.source import APP_FILE, File

T = TypeVar("T")
TRIES = 4  # of a call that fails for a reason that may pass
MOST_WAIT = 300.0  # seconds that one call may wait for a rate limit
SILENCE = 60.0  # seconds after which an answer that does not come is given up
ANSWER = 20.0  # the same, for the answer of a running application
BUSY = "another conflicting operation is in progress"
RELOAD_PORT = 7887  # of the hot-reload server in every Gradio Space
RELOAD_PATIENCE = 10.0  # seconds until that server must know of a commit
LOOPBACK = ("127.0.0.1", "localhost", "::1")
JOB_FOLDER = "/preview"  # where a Job finds the Space's files


@dataclass(frozen=True)
class State:
    """A Space as the Hub tells of it. head: its last commit; running: the commit that the Hub says runs."""

    id: str
    head: str
    stage: str
    running: str | None
    host: str
    subdomain: str
    reload: str | None  # "created" or "canceled"
    replicas: tuple[str, ...]


@dataclass(frozen=True)
class SpaceSnapshot:
    """What one look at a Space tells: its state, files and variables, and the app.py that it has (None: none)."""

    state: State
    files: dict[str, Remote]
    variables: dict[str, str]
    app: bytes | None


def asked(question: Callable[[], T]) -> Future[T]:
    """The answer to come, from a thread that nobody waits for where the program ends without it."""
    answer: Future[T] = Future()

    def ask() -> None:
        try:
            answer.set_result(question())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return answer


def patient() -> None:
    """Makes huggingface_hub give up in the end, and send nothing but what it is told to.

    Its own client waits for an answer without limit, and asks without a pause for a new Space while another is being
    made; and before its first request it asks what to report of who uses it.
    """
    constants.HF_HUB_DISABLE_TELEMETRY = True
    refused: list[float] = []

    def hold(answer: httpx2.Response) -> None:
        if answer.status_code == 409 and answer.request.url.path == "/api/repos/create":
            answer.read()
            if BUSY in answer.text:
                refused.append(time.monotonic())
                if time.monotonic() - refused[0] > SILENCE:
                    raise httpx2.ReadTimeout(f"for {SILENCE:.0f} s the Hub said: {BUSY}", request=answer.request)
                time.sleep(min(0.5 * len(refused), 5.0))

    def client() -> httpx2.Client:
        made = default_client_factory()
        made.timeout = httpx2.Timeout(SILENCE)
        made.event_hooks = {**made.event_hooks, "response": [*made.event_hooks.get("response", []), hold]}
        return made

    set_client_factory(client)


class Hub:
    """Calls to the Hub. token: of HF_TOKEN; without one, that of a trusted publisher or of `hf auth login`.

    say: takes a line for a person. Raises PreviewError if a trusted publisher's token cannot be had.
    """

    def __init__(self, token: str | None = None, say: Callable[[str], None] = lambda _: None) -> None:
        disable_progress_bars()
        try:
            token = token or get_token()
        except (OIDCError, HfHubHTTPError, httpx2.HTTPError) as error:
            message = (
                f"The Hub gives this workflow no token ({without_secrets(str(error))}). Is this repository a trusted"
                " publisher of the Space, and has the job id-token: write?"
            )
            raise PreviewError(message, Exit.ACCESS) from None
        self._api, self._token, self._say = HfApi(token=token), token, say

    # ── Spaces ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def state(self, space: str) -> State | None:
        """A Space's state; None if there is none."""
        try:
            info = self._call(f"look at {space}", self._api.space_info, space, missing=True)
        except RepositoryNotFoundError:
            return None
        runtime = info.runtime
        reload = runtime.hot_reloading if runtime else None
        return State(
            space,
            info.sha or "",
            str(runtime.raw.get("stage") if runtime else "") or "UNKNOWN",
            runtime.raw.get("sha") if runtime else None,
            (info.host or "").rstrip("/"),
            info.subdomain or "",
            reload.status if reload else None,
            tuple(hash for hash, _ in reload.replica_statuses) if reload else (),
        )

    def create(
        self, space: str, visibility: str, secrets: dict[str, str], variables: dict[str, str], hardware: str | None
    ) -> bool:
        """Makes an empty Gradio Space; whether it was this call that did. Raises PreviewError."""
        try:
            self._call(
                f"create the Space {space}",
                self._api.create_repo,
                space,
                repo_type="space",
                space_sdk="gradio",
                visibility=visibility,
                space_hardware=SpaceHardware(hardware) if hardware else None,
                space_secrets=[{"key": key, "value": value} for key, value in secrets.items()],
                space_variables=[{"key": key, "value": value} for key, value in variables.items()],
            )
        except PreviewError as error:
            if error.code is Exit.CONFLICT and self.state(space):
                return False  # another run of this was faster, or the answer to a first try was lost
            raise
        return True

    def variables(self, space: str) -> dict[str, str]:
        """A Space's public variables."""
        found = self._call(f"read the variables of {space}", self._api.get_space_variables, space)
        return {name: variable.value for name, variable in found.items()}

    def look(self, space: str) -> SpaceSnapshot | None:
        """All that a deploy needs to know of a Space, asked at once; None if there is none."""
        state, files = asked(lambda: self.state(space)), asked(lambda: self.files(space))
        variables, app = asked(lambda: self.variables(space)), asked(lambda: self.content(space, APP_FILE))
        found = state.result()
        return SpaceSnapshot(found, files.result(), variables.result(), app.result()) if found else None

    def spaces(self, owner: str) -> dict[str, datetime | None]:
        """The names, without the owner, of the owner's Spaces, and when each was made."""
        found = self._call(f"list the Spaces of {owner}", lambda: list(self._api.list_spaces(author=owner)))
        return {info.id.split("/", 1)[1]: info.created_at for info in sorted(found, key=lambda info: info.id)}

    def delete(self, space: str) -> bool:
        """Deletes a Space; False if it was gone already."""
        try:
            self._call(f"delete {space}", self._api.delete_repo, space, repo_type="space", missing=True)
        except RepositoryNotFoundError:
            return False
        return True

    def restart(self, space: str, factory: bool = False) -> None:
        """Restarts a Space; factory: with a new image."""
        self._call(f"restart {space}", self._api.restart_space, space, factory_reboot=factory)

    def logs(self, space: str, build: bool = False, last: int = 40) -> list[str]:
        """The last lines of what the build or the application has printed; empty if they cannot be had."""
        try:
            text = "".join(
                line if line.endswith("\n") else f"{line}\n" for line in self._api.fetch_space_logs(space, build=build)
            )
        except (HfHubHTTPError, httpx2.HTTPError, OSError):
            return []
        return [without_secrets(line) for line in text.splitlines() if line.strip()][-last:]

    # ── Files ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def files(self, space: str) -> dict[str, Remote]:
        """What a Space has, by path."""
        tree = self._call(
            f"list the files of {space}",
            lambda: list(self._api.list_repo_tree(space, recursive=True, repo_type="space")),
        )
        found = [entry for entry in tree if isinstance(entry, RepoFile)]
        return {file.path: Remote(file.blob_id, file.lfs.sha256 if file.lfs else None) for file in found}

    def content(self, space: str, path: str) -> bytes | None:
        """A file of a Space; None if it has none. Raises PreviewError."""
        url = f"{self._api.endpoint}/spaces/{space}/resolve/main/{quote(path)}"

        def once() -> bytes | None:
            answer = self._get(url, follow_redirects=True)  # the Hub sends readers of a file on, within itself
            if answer.status_code == 404:
                return None
            hf_raise_for_status(answer)
            return answer.content

        return self._call(f"read {path} of {space}", once)

    def titles(self, space: str) -> list[tuple[str, str]]:
        """The Space's commits, newest first: name and title."""
        found = self._call(
            f"list the commits of {space}", lambda: list(self._api.list_repo_commits(space, repo_type="space"))
        )
        return [(commit.commit_id, commit.title) for commit in found]

    def additions(self, space: str, send: Sequence[File]) -> list[CommitOperationAdd]:
        """Files as parts of commits, one each; the Hub is asked once how it wants them, and gets the large ones."""
        made = [CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=file.content) for file in send]
        ask = self._api.preupload_lfs_files
        self._call(f"send files to {space}", ask, space, additions=made, repo_type="space", free_memory=False)
        return made

    def commit(
        self,
        space: str,
        parent: str,
        title: str,
        additions: Iterable[CommitOperationAdd],
        delete: Iterable[str] = (),
        hot: bool = False,
    ) -> str:
        """One commit upon `parent`, and no other; its name. An answer that was lost is looked up, not asked for again.

        Raises PreviewError with Exit.CONFLICT if the Space has moved on.
        """
        parts = [*additions, *(CommitOperationDelete(path_in_repo=path, is_folder=False) for path in delete)]

        def once() -> str:
            made = self._api.create_commit(
                space,
                parts,
                commit_message=title,
                repo_type="space",
                parent_commit=parent or None,
                _hot_reload=hot,
            )
            return made.oid

        what = f"commit to {space}"
        try:
            return self._call(what, once, tries=1)
        except PreviewError as error:
            if error.code is not Exit.NETWORK:
                raise
            self._say(f"the connection was lost during a commit ({error}); looking whether it arrived")
            history = self.titles(space)
            if history and history[0][0] != parent:
                if history[0][1] == title:
                    return history[0][0]
                raise refused(412, what, "") from None
            return self._call(what, once, tries=1)

    # ── The running application ─────────────────────────────────────────────────────────────────────────────────────

    def revision(self, host: str) -> str | None:
        """The commit that the application itself says it is; None while it does not answer."""
        try:
            answer = self._get(f"{host}/healthz")
            return str(answer.json()["revision"]) if answer.is_success else None
        except (httpx2.HTTPError, ValueError, KeyError, TypeError):
            return None

    def page_tells(self, host: str, sha: str) -> bool:
        """Whether the page that the application serves to new visitors has been built for a commit."""
        try:
            answer = self._get(f"{host}/config")
        except httpx2.HTTPError:
            return False
        return answer.is_success and sha in answer.text

    def reload_events(self, state: State, commit: str, patience: float = RELOAD_PATIENCE) -> list[dict[str, Any]]:
        """What hot reload did, replica by replica: events with a `kind`. Raises PreviewError if it cannot be told.

        patience: the seconds in which a replica must have heard of the commit.
        """
        found = []
        host = state.host.replace(state.subdomain, f"{state.subdomain}--{RELOAD_PORT}", 1)
        for replica in state.replicas:
            url = f"{host}/--replicas/+{replica}/get-reload"
            try:
                found += self._events(url, commit, patience)
            except (httpx2.HTTPError, ValueError, KeyError) as error:
                why = without_secrets(str(error)) or type(error).__name__
                raise PreviewError(f"hot reload did not tell what it did ({why})", Exit.NETWORK) from None
        return found

    def _events(self, url: str, commit: str, patience: float) -> list[dict[str, Any]]:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            asked = {"json": {"reloadId": commit}, "headers": self._proof(url), "timeout": ANSWER}
            with get_session().stream("POST", url, **asked, follow_redirects=False) as answer:
                if answer.status_code != 204:
                    answer.raise_for_status()
                    lines = [line.removeprefix("data:") for line in answer.iter_lines() if line.startswith("data:")]
                    return [json.loads(line)["data"] for line in lines if line.strip()]
            time.sleep(0.1)
        raise ValueError("it does not know this commit")

    def _get(self, url: str, follow_redirects: bool = False) -> httpx2.Response:
        """The answer; to another host than the one that was asked no token goes along."""
        return get_session().get(url, headers=self._proof(url), follow_redirects=follow_redirects, timeout=ANSWER)

    def _proof(self, url: str) -> dict[str, str]:
        """The token, for the Hub and its Spaces over HTTPS, and for this machine: for nobody else."""
        parts, hub = urlsplit(url), urlsplit(self._api.endpoint)
        name = parts.hostname or ""
        ours = parts.netloc == hub.netloc or (parts.scheme == "https" and name.endswith(".hf.space"))
        return {"Authorization": f"Bearer {self._token}"} if self._token and (ours or name in LOOPBACK) else {}

    # ── Jobs ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def run_job(self, image: str, space: str, revision: str, env: dict[str, str], seconds: int, owner: str) -> Any:
        """A Job that serves a Space's files, which it only reads, on a public port, from the image of another Space."""
        return self._call(
            "start a Job",
            self._api.run_job,
            image=image,
            command=["sh", "-c", f"cd {JOB_FOLDER} && exec python app.py"],
            env=env,
            flavor="cpu-basic",
            timeout=seconds,
            labels={"preview": space.split("/", 1)[1][:60]},
            volumes=[Volume(type="space", source=space, revision=revision, mount_path=JOB_FOLDER)],
            expose_public=[7860],
            namespace=owner,
        )

    def end_job(self, id: str, owner: str) -> None:
        """Ends a Job."""
        self._call("end the Job", self._api.cancel_job, job_id=id, namespace=owner)

    # ── Trying ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _call(
        self, what: str, do: Callable[..., T], *args: Any, tries: int = TRIES, missing: bool = False, **named: Any
    ) -> T:
        """Does a call. Waits where the Hub asks to, tries again what may pass, says in plain words what does not."""
        deadline, tried = time.monotonic() + MOST_WAIT, 0
        while True:
            tried += 1
            try:
                return do(*args, **named)
            except HfHubHTTPError as error:
                if missing and isinstance(error, RepositoryNotFoundError) and error.response.status_code == 404:
                    raise
                status = error.response.status_code
                pause = _pause(error) if status == 429 else 2.0 ** (tried - 1) / 2
                final = status < 500 and status != 429
                if final or (status >= 500 and tried >= tries) or time.monotonic() + pause > deadline:
                    raise refused(status, what, error.server_message or "") from None
                if status == 429:
                    self._say(f"the Hub asks to wait {pause:.0f} s (too many requests)")
            except (httpx2.HTTPError, OSError) as error:
                pause = 2.0 ** (tried - 1) / 2
                if tried >= tries:
                    why = without_secrets(str(error)) or type(error).__name__
                    message = f"Could not {what}: no connection to the Hub ({why}). Check the network, and HF_ENDPOINT."
                    raise PreviewError(message, Exit.NETWORK) from None
            time.sleep(pause)


def _pause(error: HfHubHTTPError) -> float:
    """The seconds that a 429 asks to wait, from Retry-After or RateLimit (…;t=55)."""
    headers = error.response.headers
    for text in (headers.get("Retry-After", ""), headers.get("RateLimit", "").rpartition("t=")[2]):
        try:
            return max(0.0, float(text.strip(' ";')))
        except ValueError:
            continue
    return 10.0
