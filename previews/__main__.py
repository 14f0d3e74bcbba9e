"""`python -m previews deploy|sweep|list|logs|open|delete|promote|rollback`: one Hugging Face Space per git branch.

Exit codes: 0 success; 1 unexpected error; 2 usage error; 3 token rejected; 4 payment required; 5 not found; 6 conflict,
or superseded by a newer commit; 7 rate limit; 8 build error; 9 the application does not run; 10 timeout; 11 no network;
130 interrupted.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import webbrowser
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from previews import PROCESS_START
from previews.deploy import (
    BRANCH_VARIABLE,
    BUCKET_TOKEN,
    BUCKET_VARIABLE,
    MARKER_VARIABLE,
    Deployer,
    DeployOptions,
    Target,
    deployed_sha,
    own_bucket,
    preview_target,
    production_target,
)
from previews.errors import ExitCode, PreviewError, redact_secrets
from previews.hub import Hub, configure_hub_client
from previews.names import NameTooLong, is_preview
from previews.plan import DeployPath
from previews.source import last_fetch_time, list_branches, resolve_commit

DEFAULT_APP = "moondream-playground"
TRUE_VALUES = ("1", "true", "yes", "on")
PROGRESS_INTERVAL = 15.0  # seconds between progress lines where they cannot be overwritten
MIN_PATHS = {"auto": DeployPath.NOTHING, "restart": DeployPath.RESTART, "build": DeployPath.BUILD}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; progress goes to stderr, the result to stdout."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if getattr(args, "branch", "") is None:
        parser.error("no branch is checked out: set --branch")
    progress = Progress(sys.stderr)
    gc.disable()  # saves a third of the time to parse the application's Python files
    for number in (signal.SIGINT, signal.SIGTERM):  # the latter comes from canceled workflows
        signal.signal(number, progress.interrupt)
    try:
        configure_hub_client()
        result = args.run(args, Hub(os.environ.get("HF_TOKEN"), progress.log), progress)
    except (PreviewError, NameTooLong) as error:
        progress.close()
        return _report_error(error, args.json)
    except KeyboardInterrupt:
        progress.close()
        print("Interrupted. Run the command again to continue from the Space's current state.", file=sys.stderr)
        return 130
    except Exception as error:
        progress.close()
        trace = [redact_secrets(line) for line in traceback.format_tb(error.__traceback__)[-3:]]
        description = redact_secrets(f"{type(error).__name__}: {error}")
        return _report_error(PreviewError(f"Unexpected error: {description}", log=trace), args.json)
    progress.close()
    print(json.dumps(result, indent=2) if args.json else _format_result(result))
    return ExitCode.SUCCESS


class Progress:
    """Prints progress lines with the time since the start; on a terminal, transient lines are overwritten."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._is_terminal = stream, stream.isatty()
        self._last_line, self._has_transient_line = PROCESS_START, False
        self._interrupted = False

    def interrupt(self, *_: object) -> None:
        """Raise KeyboardInterrupt, as a signal handler, and again from the next `update`.

        Python ignores exceptions in code such as `__del__`, in which the signal may arrive.
        """
        self._interrupted = True
        raise KeyboardInterrupt

    def log(self, line: str) -> None:
        """Print a lasting line."""
        self.close()
        print(self._with_time(line), file=self._stream, flush=True)

    def update(self, line: str) -> None:
        """Print a transient line, overwritten by the next; elsewhere than on a terminal, at most every 15 s.

        Raises KeyboardInterrupt after `interrupt`.
        """
        if self._interrupted:
            raise KeyboardInterrupt
        if self._is_terminal:
            print(f"\r\x1b[K{self._with_time(line)[:100]}", end="", file=self._stream, flush=True)
            self._has_transient_line = True
        elif time.monotonic() - self._last_line > PROGRESS_INTERVAL:
            self.log(line)

    def close(self) -> None:
        """Erase the transient line."""
        self._last_line = time.monotonic()
        if self._has_transient_line:
            print("\r\x1b[K", end="", file=self._stream, flush=True)
            self._has_transient_line = False

    def _with_time(self, line: str) -> str:
        return f"[{time.monotonic() - PROCESS_START:6.1f} s] {redact_secrets(line)}"


def _report_error(error: Exception, as_json: bool) -> int:
    code = error.code if isinstance(error, PreviewError) else ExitCode.USAGE
    log = [redact_secrets(line) for line in getattr(error, "log", [])]
    if as_json:
        print(json.dumps({"error": str(error), "code": int(code), "log": log}, indent=2))
    print(f"error: {error}", *(f"    {line}" for line in log), sep="\n", file=sys.stderr)
    return int(code)


def _format_result(result: Any) -> str:
    if isinstance(result, list):
        return "\n".join(_format_result(row) for row in result) or "nothing"
    if isinstance(result, dict) and "own_seconds" in result:
        paths = ", ".join(f"{path} {seconds} s" for path, seconds in result["by_path"].items())
        timing = f"{result['seconds']} s since {result['since']}: {paths}; processor time {result['own_seconds']} s"
        return f"{result['url']}\n{result['sha'][:12]} of {result['branch']} is live by {result['path']} ({timing})"
    return "  ".join(str(value) for value in result.values()) if isinstance(result, dict) else str(result)


# ── Commands ────────────────────────────────────────────────────────────────────────────────────────────────────────


def deploy(args: argparse.Namespace, hub: Hub, progress: Progress) -> dict[str, Any]:
    """Deploy a commit to the branch's Space."""
    return _deployer(args, hub, progress).deploy(_target(args), args.sha or "HEAD").to_dict()


def promote(args: argparse.Namespace, hub: Hub, progress: Progress) -> dict[str, Any]:
    """Deploy the commit that a branch's preview runs to production."""
    preview = preview_target(args.owner, args.app, args.branch)
    state = hub.state(preview.space)
    sha = hub.revision(state.host) if state else None
    if not sha:
        message = f"{preview.space} does not run a commit that could be promoted. Deploy the branch first."
        raise PreviewError(message, ExitCode.NOT_FOUND)
    target = production_target(args.owner, args.app, args.default_branch)
    progress.log(f"promoting {sha[:12]} of {args.branch} to {target.space}")
    return _deployer(args, hub, progress).deploy(target, sha).to_dict()


def rollback(args: argparse.Namespace, hub: Hub, progress: Progress) -> dict[str, Any]:
    """Deploy an earlier commit: --to, or the one deployed before the current one."""
    target = _target(args)
    if hub.state(target.space) is None:
        raise _space_not_found(target)
    history = [sha for sha in (deployed_sha(title) for _, title in hub.commits(target.space)) if sha]
    # Newest first. After a rollback the current commit occurs twice; the next rollback goes back from its first deploy.
    earlier = history[len(history) - history[::-1].index(history[0]) :] if history else []
    if args.to:
        sha = resolve_commit(args.folder, args.to)
    elif earlier:
        sha = earlier[0]
    else:
        raise PreviewError(f"{target.space} has no earlier commit. Choose one with --to.", ExitCode.NOT_FOUND)
    progress.log(f"rolling back to {sha[:12]}")
    return _deployer(args, hub, progress).deploy(target, sha).to_dict()


def sweep(args: argparse.Namespace, hub: Hub, progress: Progress) -> list[dict[str, Any]]:
    """Delete the previews of deleted branches, identified by Space name and marker variable, with their state."""
    previews = _list_previews(args, hub)  # before the branches, so that a branch created meanwhile has no Space here
    branches = list_branches(args.folder, args.fetched)
    fetched = last_fetch_time(args.folder) if args.fetched else None
    if not branches:
        raise PreviewError("git lists no branches, so nothing is deleted. Check the remote.", ExitCode.USAGE)
    deleted = []
    for preview in previews:
        expected = preview_target(args.owner, args.app, preview["branch"]).space
        if preview["branch"] in branches or expected != preview["space"]:
            continue
        if fetched and preview["created"] and preview["created"] > fetched:
            progress.log(f"keeping {preview['space']}: it is newer than the last fetch")
            continue
        progress.log(f"branch {preview['branch']} was deleted: deleting {preview['space']}")
        done = args.dry_run or _delete_preview(args, hub, progress, preview["space"], preview["bucket"])
        deleted.append(
            {"space": preview["space"], "branch": preview["branch"], "deleted": bool(done and not args.dry_run)}
        )
    return deleted


def list_previews(args: argparse.Namespace, hub: Hub, progress: Progress) -> list[dict[str, Any]]:
    """List the previews with branch, stage, commit and URL."""

    def row(preview: dict[str, Any]) -> dict[str, Any] | None:
        state = hub.state(preview["space"])
        if state is None:
            return None
        identity = {"space": preview["space"], "branch": preview["branch"], "stage": state.stage}
        return {**identity, "revision": (hub.revision(state.host) or "")[:12], "url": state.host}

    with ThreadPoolExecutor(8) as pool:
        return [preview for preview in pool.map(row, _list_previews(args, hub)) if preview]


def logs(args: argparse.Namespace, hub: Hub, progress: Progress) -> list[str]:
    """Print the last lines of a Space's log."""
    target = _target(args)
    if hub.state(target.space) is None:
        raise _space_not_found(target)
    return hub.logs(target.space, build=args.build, last=args.lines)


def open_space(args: argparse.Namespace, hub: Hub, progress: Progress) -> str:
    """Print the URL of a Space, and open it in a browser when run in a terminal."""
    target = _target(args)
    state = hub.state(target.space)
    if state is None:
        raise _space_not_found(target)
    if not args.json and sys.stdout.isatty():
        webbrowser.open(state.host)
    return state.host


def delete(args: argparse.Namespace, hub: Hub, progress: Progress) -> dict[str, Any]:
    """Delete a branch's preview and its saved state."""
    if args.production:
        raise PreviewError("The production Space is not deleted here. Delete it on the Hub.", ExitCode.USAGE)
    target = preview_target(args.owner, args.app, args.branch)
    if hub.state(target.space) is None:
        return {"space": target.space, "deleted": False}
    variables = hub.variables(target.space)
    if variables.get(MARKER_VARIABLE) != target.marker:
        raise PreviewError(f"{target.space} belongs to another application; not deleted.", ExitCode.CONFLICT)
    bucket = variables.get(BUCKET_VARIABLE)
    return {"space": target.space, "deleted": _delete_preview(args, hub, progress, target.space, bucket)}


def _delete_preview(args: argparse.Namespace, hub: Hub, progress: Progress, space: str, bucket: str | None) -> bool:
    """Delete a Space, after the bucket that belongs to it alone: if that fails, the command can be repeated."""
    if bucket and bucket == own_bucket(space) and not args.keep_state:
        progress.log(f"deleting the bucket {bucket}")
        hub.delete_bucket(bucket)
    elif bucket:
        progress.log(f"keeping the bucket {bucket}")
    return hub.delete(space)


def _space_not_found(target: Target) -> PreviewError:
    return PreviewError(f"{target.space} does not exist. Deploy the branch first.", ExitCode.NOT_FOUND)


def _list_previews(args: argparse.Namespace, hub: Hub) -> list[dict[str, Any]]:
    """List this application's previews, which match by both name and marker variable."""

    def read_preview(name_and_creation: tuple[str, datetime | None]) -> dict[str, Any] | None:
        name, created = name_and_creation
        space = f"{args.owner}/{name}"
        try:
            variables = hub.variables(space)
        except PreviewError as error:
            if error.code is ExitCode.NOT_FOUND:
                return None  # deleted meanwhile
            raise
        branch = variables.get(BRANCH_VARIABLE) if variables.get(MARKER_VARIABLE) == args.app else None
        details = {"created": created, "bucket": variables.get(BUCKET_VARIABLE)}
        return {"space": space, "branch": branch, **details} if branch else None

    spaces = [(name, created) for name, created in hub.spaces(args.owner).items() if is_preview(name, args.app)]
    with ThreadPoolExecutor(8) as pool:
        return [preview for preview in pool.map(read_preview, spaces) if preview]


def _target(args: argparse.Namespace) -> Target:
    create_target = production_target if args.production else preview_target
    return create_target(args.owner, args.app, args.branch)


def _deployer(args: argparse.Namespace, hub: Hub, progress: Progress) -> Deployer:
    unset = [name for name in args.secret if name not in os.environ]
    if unset:
        raise PreviewError(f"--secret {unset[0]}: the environment variable is not set.", ExitCode.USAGE)
    malformed = [pair for pair in args.variable if "=" not in pair]
    if malformed:
        raise PreviewError(f"--variable takes NAME=VALUE, not {malformed[0]!r}.", ExitCode.USAGE)
    secrets = [*args.secret, *([BUCKET_TOKEN] if args.state_bucket is not None else [])]
    if args.state_bucket is not None and not os.environ.get(BUCKET_TOKEN):
        message = f"--state-bucket: set {BUCKET_TOKEN} to a token with write access to the owner's buckets only."
        raise PreviewError(message, ExitCode.USAGE)
    options = DeployOptions(
        visibility=args.visibility,
        secrets={name: os.environ[name] for name in secrets if os.environ[name]},
        variables=dict(pair.split("=", 1) for pair in args.variable),
        hardware=args.hardware,
        timeout=args.timeout,
        poll=args.poll,
        min_path=MIN_PATHS[args.path],
        slim=args.slim,
        job_image_space=f"{args.owner}/{args.app}" if args.fast else None,
        state_bucket=args.state_bucket,
    )
    return Deployer(hub, args.folder, options, progress.log, progress.update, PROCESS_START, args.pushed_at)


# ── Arguments ───────────────────────────────────────────────────────────────────────────────────────────────────────


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    common = argparse.ArgumentParser(add_help=False)
    owner, app = os.environ.get("PREVIEW_OWNER"), os.environ.get("PREVIEW_APP") or DEFAULT_APP
    common.add_argument("--owner", default=owner, required=not owner, help="user or organization (PREVIEW_OWNER)")
    common.add_argument("--app", default=app, help=f"prefix of the Space names (PREVIEW_APP; default {DEFAULT_APP})")
    common.add_argument("--folder", type=Path, default=Path.cwd(), help="git repository (default: current folder)")
    common.add_argument("--json", action="store_true", help="print the result as JSON")

    space = argparse.ArgumentParser(add_help=False)
    space.add_argument("--branch", type=_branch, default=_current_branch(), help="branch (default: checked out)")
    space.add_argument("--production", action="store_true", help="use the production Space instead of the preview")

    options = argparse.ArgumentParser(add_help=False)
    visibilities = ("private", "protected", "public")
    options.add_argument("--visibility", choices=visibilities, default="private", help="of a new Space")
    secret_help = "environment variable to set as a secret of a new Space; repeatable"
    options.add_argument("--secret", action="append", default=[], metavar="NAME", help=secret_help)
    variable_help = "public variable of a new Space; repeatable"
    options.add_argument("--variable", action="append", default=[], metavar="NAME=VALUE", help=variable_help)
    options.add_argument("--hardware", help="hardware of a new Space, e.g. zero-a10g (default: cpu-basic)")
    timeout_help = "seconds to wait for a restart or build (default 1200)"
    options.add_argument("--timeout", type=float, default=1200, help=timeout_help)
    pushed_help = "Unix time of the push, to measure from there"
    options.add_argument("--pushed-at", type=_timestamp, metavar="SECONDS", help=pushed_help)
    options.add_argument("--poll", type=float, default=1.0, help="seconds between status requests (default 1)")
    options.add_argument("--path", choices=tuple(MIN_PATHS), default="auto", help="cheapest path to use (default auto)")
    slim, fast = (os.environ.get(name, "").lower() in TRUE_VALUES for name in ("PREVIEW_SLIM", "PREVIEW_FAST"))
    options.add_argument("--slim", action="store_true", default=slim, help="previews without torch (PREVIEW_SLIM=1)")
    fast_help = "serve a new preview from a public Job while its Space builds, for $0.02 an hour (PREVIEW_FAST=1)"
    options.add_argument("--fast", action="store_true", default=fast, help=fast_help)
    bucket_help = f"keep the state of a new Space in a private bucket (default: its own), with {BUCKET_TOKEN}"
    options.add_argument("--state-bucket", nargs="?", const="", type=_bucket, metavar="OWNER/NAME", help=bucket_help)

    state = argparse.ArgumentParser(add_help=False)
    state.add_argument("--keep-state", action="store_true", help="keep the buckets of deleted previews")

    parser = argparse.ArgumentParser(
        prog="python -m previews", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def add_command(name: str, run: Any, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__, parents=[common, *parents])
        command.set_defaults(run=run)
        return command

    add_command("deploy", deploy, space, options).add_argument("--sha", help="commit (default: HEAD)")
    branch_help = "branch of the production Space (default: main)"
    add_command("promote", promote, space, options).add_argument("--default-branch", default="main", help=branch_help)
    add_command("rollback", rollback, space, options).add_argument("--to", help="commit (default: the previous one)")
    sweep_command = add_command("sweep", sweep, state)
    sweep_command.add_argument("--dry-run", action="store_true", help="only list what would be deleted")
    fetched_help = "use the branches of the last git fetch instead of querying the remote"
    sweep_command.add_argument("--fetched", action="store_true", help=fetched_help)
    add_command("list", list_previews)
    logs_command = add_command("logs", logs, space)
    logs_command.add_argument("--build", action="store_true", help="show the build log instead of the application log")
    logs_command.add_argument("--lines", type=_line_count, default=100, help="number of lines (default 100)")
    add_command("open", open_space, space)
    add_command("delete", delete, space, state)
    return parser


def _branch(text: str) -> str:
    if not text or re.search(r"[\x00-\x1f\x7f]", text):
        raise argparse.ArgumentTypeError("must be a branch name without control characters")
    return text


def _bucket(text: str) -> str:
    if text and not re.fullmatch(r"[A-Za-z0-9._-]{1,96}/[A-Za-z0-9._-]{1,96}", text):
        raise argparse.ArgumentTypeError("must be owner/name")
    return text


def _line_count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a number, 1 or more")
    return int(text)


def _timestamp(text: str) -> float | None:
    """Parse a Unix time; None for "", which GitHub gives workflows for some events."""
    if not text:
        return None
    try:
        timestamp = float(text)
    except ValueError:
        timestamp = -1.0
    if not 0 < timestamp <= time.time() + 60:
        raise argparse.ArgumentTypeError("must be seconds since 1970, not in the future")
    return timestamp


def _current_branch() -> str | None:
    command = ["git", "symbolic-ref", "--short", "-q", "HEAD"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
