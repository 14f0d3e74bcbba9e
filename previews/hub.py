"""Hugging Face Hub client of the deployer: huggingface_hub with timeouts, retries and readable errors."""

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

from previews.errors import ExitCode, PreviewError, hub_error, redact_secrets
from previews.plan import RemoteFile
from previews.source import APP_FILE, File

T = TypeVar("T")
MAX_ATTEMPTS = 4  # for connection errors and status 5xx
RETRY_DELAY = 0.5  # seconds before the first retry; doubles with each
MAX_RATE_LIMIT_WAIT = 300.0  # seconds per call
DEFAULT_RATE_LIMIT_WAIT = 10.0  # seconds, if a 429 response does not say
HUB_TIMEOUT = 60.0  # seconds without a response from the Hub
APP_TIMEOUT = 20.0  # seconds without a response from a running application
CREATE_CONFLICT = "another conflicting operation is in progress"
RELOAD_PORT = 7887  # of the hot-reload server in every Gradio Space
RELOAD_POLL = 0.1  # seconds between requests to the hot-reload server
RELOAD_TIMEOUT = 10.0  # seconds until the hot-reload server must know a commit
LOOPBACK = ("127.0.0.1", "localhost", "::1")
JOB_FOLDER = "/preview"  # mount point of the Space's files in a Job


@dataclass(frozen=True)
class SpaceState:
    """Status of a Space, as reported by the Hub.

    Attributes:
        head: Last commit of the Space's repository.
        stage: Runtime stage, such as "RUNNING".
        running: Commit that the Hub reports as running.
        host: URL of the running application.
        reload: Status of the last hot reload: "created", "canceled" or None.
        replicas: Hashes of the replicas that hot-reloaded.
    """

    id: str
    head: str
    stage: str
    running: str | None
    host: str
    subdomain: str
    reload: str | None
    replicas: tuple[str, ...]


@dataclass(frozen=True)
class SpaceSnapshot:
    """State, files, variables and app.py of a Space, read concurrently.

    Attributes:
        app: Content of app.py, or None if the Space has none.
    """

    state: SpaceState
    files: dict[str, RemoteFile]
    variables: dict[str, str]
    app: bytes | None


def in_thread(function: Callable[[], T]) -> Future[T]:
    """Run a function in a daemon thread, which does not keep the program from exiting."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def configure_hub_client() -> None:
    """Set timeouts for huggingface_hub, slow down its retries of Space creation, and disable its telemetry.

    Its default client has no read timeout, and retries without a pause while another Space is being created.
    """
    constants.HF_HUB_DISABLE_TELEMETRY = True
    conflicts: list[float] = []

    def wait_on_create_conflict(response: httpx2.Response) -> None:
        if response.status_code == 409 and response.request.url.path == "/api/repos/create":
            response.read()
            if CREATE_CONFLICT in response.text:
                conflicts.append(time.monotonic())
                if time.monotonic() - conflicts[0] > HUB_TIMEOUT:
                    message = f"for {HUB_TIMEOUT:.0f} s: {CREATE_CONFLICT}"
                    raise httpx2.ReadTimeout(message, request=response.request)
                time.sleep(min(0.5 * len(conflicts), 5.0))

    def build_client() -> httpx2.Client:
        client = default_client_factory()
        client.timeout = httpx2.Timeout(HUB_TIMEOUT)
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "response": [*hooks.get("response", []), wait_on_create_conflict]}
        return client

    set_client_factory(build_client)


class Hub:
    """Hub client.

    Args:
        token: Access token; by default that of a trusted publisher or of `hf auth login`.
        log: Receives progress lines.

    Raises:
        PreviewError: If the trusted publisher's token cannot be obtained.
    """

    def __init__(self, token: str | None = None, log: Callable[[str], None] = lambda _: None) -> None:
        disable_progress_bars()
        try:
            token = token or get_token()
        except (OIDCError, HfHubHTTPError, httpx2.HTTPError) as error:
            message = (
                f"The Hub gives this workflow no token ({redact_secrets(str(error))}). Add this repository as a trusted"
                " publisher of the Space, and give the job the permission id-token: write."
            )
            raise PreviewError(message, ExitCode.ACCESS) from None
        self._api, self._token, self._log = HfApi(token=token), token, log

    # ── Spaces ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def state(self, space: str) -> SpaceState | None:
        """Return a Space's status, or None if it does not exist."""
        try:
            info = self._call(f"read the status of {space}", self._api.space_info, space, missing_ok=True)
        except RepositoryNotFoundError:
            return None
        runtime = info.runtime
        reload = runtime.hot_reloading if runtime else None
        return SpaceState(
            id=space,
            head=info.sha or "",
            stage=str(runtime.raw.get("stage") if runtime else "") or "UNKNOWN",
            running=runtime.raw.get("sha") if runtime else None,
            host=(info.host or "").rstrip("/"),
            subdomain=info.subdomain or "",
            reload=reload.status if reload else None,
            replicas=tuple(hash for hash, _ in reload.replica_statuses) if reload else (),
        )

    def create(
        self, space: str, visibility: str, secrets: dict[str, str], variables: dict[str, str], hardware: str | None
    ) -> bool:
        """Create an empty Gradio Space.

        Returns:
            False if it already exists, because of a concurrent deploy or a lost response.
        """
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
            if error.code is ExitCode.CONFLICT and self.state(space):
                return False
            raise
        return True

    def variables(self, space: str) -> dict[str, str]:
        """Return a Space's public variables."""
        variables = self._call(f"read the variables of {space}", self._api.get_space_variables, space)
        return {name: variable.value for name, variable in variables.items()}

    def snapshot(self, space: str) -> SpaceSnapshot | None:
        """Read everything a deploy needs to know about a Space, concurrently; None if it does not exist."""
        state, files = in_thread(lambda: self.state(space)), in_thread(lambda: self.files(space))
        variables, app = in_thread(lambda: self.variables(space)), in_thread(lambda: self.content(space, APP_FILE))
        if (space_state := state.result()) is None:
            return None
        return SpaceSnapshot(space_state, files.result(), variables.result(), app.result())

    def spaces(self, owner: str) -> dict[str, datetime | None]:
        """List an owner's Spaces: creation time by name, without the owner."""
        infos = self._call(f"list the Spaces of {owner}", lambda: list(self._api.list_spaces(author=owner)))
        return {info.id.split("/", 1)[1]: info.created_at for info in sorted(infos, key=lambda info: info.id)}

    def delete(self, space: str) -> bool:
        """Delete a Space; return False if it did not exist."""
        try:
            self._call(f"delete {space}", self._api.delete_repo, space, repo_type="space", missing_ok=True)
        except RepositoryNotFoundError:
            return False
        return True

    def create_bucket(self, bucket: str) -> None:
        """Create a private Storage Bucket if it does not exist."""
        self._call(
            f"create the bucket {bucket}", self._api.create_bucket, bucket, private=True, exist_ok=True, attempts=1
        )

    def delete_bucket(self, bucket: str) -> bool:
        """Delete a Storage Bucket with its files; return False if it did not exist."""
        try:
            self._call(f"delete the bucket {bucket}", self._api.delete_bucket, bucket)
        except PreviewError as error:
            if error.code is ExitCode.NOT_FOUND:
                return False
            raise
        return True

    def restart(self, space: str, factory: bool = False) -> None:
        """Restart a Space; with `factory`, rebuild its image first."""
        self._call(f"restart {space}", self._api.restart_space, space, factory_reboot=factory)

    def logs(self, space: str, build: bool = False, last: int = 40) -> list[str]:
        """Return the last lines of the build log or application log; empty if unavailable."""
        try:
            chunks = list(self._api.fetch_space_logs(space, build=build))
        except (HfHubHTTPError, httpx2.HTTPError, OSError):
            return []
        text = "".join(chunk if chunk.endswith("\n") else f"{chunk}\n" for chunk in chunks)
        return [redact_secrets(line) for line in text.splitlines() if line.strip()][-last:]

    # ── Files ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def files(self, space: str) -> dict[str, RemoteFile]:
        """List a Space's files by path."""
        tree = self._call(
            f"list the files of {space}",
            lambda: list(self._api.list_repo_tree(space, recursive=True, repo_type="space")),
        )
        files = [entry for entry in tree if isinstance(entry, RepoFile)]
        return {file.path: RemoteFile(file.blob_id, file.lfs.sha256 if file.lfs else None) for file in files}

    def content(self, space: str, path: str) -> bytes | None:
        """Download a file of a Space; None if it does not exist."""
        url = f"{self._api.endpoint}/spaces/{space}/resolve/main/{quote(path)}"

        def download() -> bytes | None:
            response = self._get(url, follow_redirects=True)  # the Hub redirects downloads to another of its paths
            if response.status_code == 404:
                return None
            hf_raise_for_status(response)
            return response.content

        return self._call(f"read {path} of {space}", download)

    def commits(self, space: str) -> list[tuple[str, str]]:
        """List a Space's commits, newest first: hash and title."""
        commits = self._call(
            f"list the commits of {space}", lambda: list(self._api.list_repo_commits(space, repo_type="space"))
        )
        return [(commit.commit_id, commit.title) for commit in commits]

    def prepare_uploads(self, space: str, files: Sequence[File]) -> list[CommitOperationAdd]:
        """Build one commit operation per file, and upload large files to the Hub's LFS storage."""
        operations = [CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=file.content) for file in files]
        self._call(
            f"upload files to {space}",
            self._api.preupload_lfs_files,
            space,
            additions=operations,
            repo_type="space",
            free_memory=False,
        )
        return operations

    def commit(
        self,
        space: str,
        parent: str,
        title: str,
        additions: Iterable[CommitOperationAdd],
        delete: Iterable[str] = (),
        hot: bool = False,
    ) -> str:
        """Commit to a Space on top of `parent`; after a lost response, check whether the commit arrived.

        Args:
            space: Id of the Space.
            parent: Expected head of the Space.
            title: Commit title.
            additions: Prepared uploads.
            delete: Paths to delete.
            hot: Apply the commit by hot reload instead of a restart.

        Returns:
            The new commit's hash.

        Raises:
            PreviewError: With `ExitCode.CONFLICT` if the Space's head is no longer `parent`.
        """
        operations = [*additions, *(CommitOperationDelete(path_in_repo=path, is_folder=False) for path in delete)]

        def create_commit() -> str:
            commit = self._api.create_commit(
                space,
                operations,
                commit_message=title,
                repo_type="space",
                parent_commit=parent or None,
                _hot_reload=hot,
            )
            return commit.oid

        action = f"commit to {space}"
        try:
            return self._call(action, create_commit, attempts=1)
        except PreviewError as error:
            if error.code is not ExitCode.NETWORK:
                raise
            self._log(f"connection lost during a commit ({error}); checking whether it arrived")
            history = self.commits(space)
            if history and history[0][0] != parent:
                if history[0][1] == title:
                    return history[0][0]
                raise hub_error(412, action, "") from None
            return self._call(action, create_commit, attempts=1)

    # ── The running application ─────────────────────────────────────────────────────────────────────────────────────

    def revision(self, host: str) -> str | None:
        """Return the commit that the running application reports at /healthz; None while it does not respond."""
        try:
            response = self._get(f"{host}/healthz")
            return str(response.json()["revision"]) if response.is_success else None
        except (httpx2.HTTPError, ValueError, KeyError, TypeError):
            return None

    def page_contains(self, host: str, sha: str) -> bool:
        """Return whether the page served to new visitors was built for a commit."""
        try:
            response = self._get(f"{host}/config")
        except httpx2.HTTPError:
            return False
        return response.is_success and sha in response.text

    def reload_events(self, state: SpaceState, commit: str, timeout: float = RELOAD_TIMEOUT) -> list[dict[str, Any]]:
        """Return the hot-reload events of all replicas; each has a `kind`.

        Args:
            state: The Space's status, with its replicas.
            commit: The Space's commit that was hot-reloaded.
            timeout: Seconds until each replica must know the commit.

        Raises:
            PreviewError: If a replica does not report its events.
        """
        events = []
        host = state.host.replace(state.subdomain, f"{state.subdomain}--{RELOAD_PORT}", 1)
        for replica in state.replicas:
            url = f"{host}/--replicas/+{replica}/get-reload"
            try:
                events += self._replica_events(url, commit, timeout)
            except (httpx2.HTTPError, ValueError, KeyError) as error:
                reason = redact_secrets(str(error)) or type(error).__name__
                raise PreviewError(f"no result from the hot-reload server ({reason})", ExitCode.NETWORK) from None
        return events

    def _replica_events(self, url: str, commit: str, timeout: float) -> list[dict[str, Any]]:
        options = {"json": {"reloadId": commit}, "timeout": APP_TIMEOUT, "follow_redirects": False}
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            with get_session().stream("POST", url, headers=self._auth_headers(url), **options) as response:
                if response.status_code != 204:
                    response.raise_for_status()
                    lines = [line.removeprefix("data:") for line in response.iter_lines() if line.startswith("data:")]
                    return [json.loads(line)["data"] for line in lines if line.strip()]
            time.sleep(RELOAD_POLL)
        raise ValueError("it does not know this commit")

    def _get(self, url: str, follow_redirects: bool = False) -> httpx2.Response:
        """Send a GET request; redirects to another host do not receive the token."""
        headers = self._auth_headers(url)
        return get_session().get(url, headers=headers, follow_redirects=follow_redirects, timeout=APP_TIMEOUT)

    def _auth_headers(self, url: str) -> dict[str, str]:
        """Return the authorization header for the Hub, its Spaces over HTTPS and loopback; empty for other hosts."""
        parts, hub = urlsplit(url), urlsplit(self._api.endpoint)
        hostname = parts.hostname or ""
        is_hub = parts.netloc == hub.netloc or (parts.scheme == "https" and hostname.endswith(".hf.space"))
        return {"Authorization": f"Bearer {self._token}"} if self._token and (is_hub or hostname in LOOPBACK) else {}

    # ── Jobs ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def run_job(self, image: str, space: str, revision: str, env: dict[str, str], seconds: int, owner: str) -> Any:
        """Start a Job that serves a Space's files on a public port.

        Args:
            image: Container image, such as that of another Space.
            space: The Space whose files are mounted read-only.
            revision: Commit of the Space.
            env: Environment variables.
            seconds: Maximum duration.
            owner: Namespace that runs and pays for the Job.
        """
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

    def cancel_job(self, id: str, owner: str) -> None:
        """Cancel a Job."""
        self._call("cancel the Job", self._api.cancel_job, job_id=id, namespace=owner)

    # ── Retries ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _call(
        self,
        action: str,
        function: Callable[..., T],
        *args: Any,
        attempts: int = MAX_ATTEMPTS,
        missing_ok: bool = False,
        **kwargs: Any,
    ) -> T:
        """Call the Hub's API; wait on rate limits, retry transient errors, and convert others to PreviewError.

        Args:
            action: What the call does, for error messages.
            function: The API call.
            *args: Its positional arguments.
            attempts: Attempts on connection errors and status 5xx.
            missing_ok: Let RepositoryNotFoundError through.
            **kwargs: Its keyword arguments.
        """
        deadline, attempt = time.monotonic() + MAX_RATE_LIMIT_WAIT, 0
        while True:
            attempt += 1
            delay = RETRY_DELAY * 2.0 ** (attempt - 1)
            try:
                return function(*args, **kwargs)
            except HfHubHTTPError as error:
                status = error.response.status_code
                if missing_ok and isinstance(error, RepositoryNotFoundError) and status == 404:
                    raise
                if status == 429:
                    delay = _rate_limit_delay(error)
                permanent = status < 500 and status != 429
                if permanent or (status >= 500 and attempt >= attempts) or time.monotonic() + delay > deadline:
                    raise hub_error(status, action, error.server_message or "") from None
                if status == 429:
                    self._log(f"rate limit of the Hub: waiting {delay:.0f} s")
            except (httpx2.HTTPError, OSError) as error:
                if attempt >= attempts:
                    reason = redact_secrets(str(error)) or type(error).__name__
                    message = f"Could not {action}: no connection to the Hub ({reason}). Check network and HF_ENDPOINT."
                    raise PreviewError(message, ExitCode.NETWORK) from None
            time.sleep(delay)


def _rate_limit_delay(error: HfHubHTTPError) -> float:
    """Return the seconds to wait after a 429 response, from its Retry-After or RateLimit (`...;t=55`) header."""
    headers = error.response.headers
    for text in (headers.get("Retry-After", ""), headers.get("RateLimit", "").rpartition("t=")[2]):
        try:
            return max(0.0, float(text.strip(' ";')))
        except ValueError:
            continue
    return DEFAULT_RATE_LIMIT_WAIT
