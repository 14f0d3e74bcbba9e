"""`python -m previews deploy|sweep|list|logs|open|delete|promote|rollback`: every branch is a Space of its own.

Exit codes: 0 done; 1 unexpected; 2 usage; 3 the token may not; 4 the account must pay; 5 not found; 6 conflict, or
superseded by a newer commit; 7 rate limit; 8 build error; 9 the application does not run; 10 timeout; 11 no network;
130 stopped.
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
from pathlib import Path as Folder
from typing import Any, TextIO

from previews import STARTED
from previews.deploy import BRANCH, MARKER, Deployer, Options, Target, deployed_sha, preview, production
from previews.errors import Exit, PreviewError, without_secrets
from previews.hub import Hub, patient
from previews.names import NameTooLong, is_preview
from previews.plan import DeployPath
from previews.source import branches, fetched_at, resolve

APP = "moondream-playground"
YES = ("1", "true", "yes", "on")
TICKS = 15.0  # seconds between two lines of progress where they cannot replace each other


def main(arguments: Sequence[str] | None = None) -> int:
    """Does a command; its exit code. Progress goes to stderr, the result to stdout."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    if getattr(asked, "branch", "") is None:
        parser.error("no branch is checked out here: name one with --branch")
    progress = Progress(sys.stderr)
    gc.disable()  # a short program: collecting costs it half as much again as reading the application's Python
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # a canceled workflow is tidied up
    try:
        patient()
        result = asked.do(asked, Hub(os.environ.get("HF_TOKEN"), progress.say), progress)
    except (PreviewError, NameTooLong) as error:
        progress.done()
        return _failed(error, asked.json)
    except KeyboardInterrupt:
        progress.done()
        print("Stopped. Run it again: it goes on from what the Space has.", file=sys.stderr)
        return 130
    except Exception as error:
        progress.done()
        where = [without_secrets(line) for line in traceback.format_tb(error.__traceback__)[-3:]]
        said = without_secrets(f"{type(error).__name__}: {error}")
        return _failed(PreviewError(f"Something unforeseen went wrong: {said}", log=where), asked.json)
    progress.done()
    print(json.dumps(result, indent=2) if asked.json else _plain(result))
    return Exit.DONE


class Progress:
    """Lines with the time since the start. On a terminal a passing one is replaced by the next."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._live, self._last, self._open = stream, stream.isatty(), STARTED, False

    def say(self, line: str) -> None:
        """A line that stays."""
        self.done()
        print(self._timed(line), file=self._stream, flush=True)

    def tick(self, line: str) -> None:
        """A line of what goes on: replaced by the next on a terminal, elsewhere printed now and then."""
        if self._live:
            print(f"\r\x1b[K{self._timed(line)[:100]}", end="", file=self._stream, flush=True)
            self._open = True
        elif time.monotonic() - self._last > TICKS:
            self.say(line)

    def done(self) -> None:
        """Ends a passing line."""
        self._last = time.monotonic()
        if self._open:
            print("\r\x1b[K", end="", file=self._stream, flush=True)
            self._open = False

    def _timed(self, line: str) -> str:
        return f"[{time.monotonic() - STARTED:6.1f} s] {without_secrets(line)}"


def _failed(error: Exception, as_json: bool) -> int:
    code = error.code if isinstance(error, PreviewError) else Exit.USAGE
    log = [without_secrets(line) for line in getattr(error, "log", [])]
    if as_json:
        print(json.dumps({"error": str(error), "code": int(code), "log": log}, indent=2))
    print(f"error: {error}", *(f"    {line}" for line in log), sep="\n", file=sys.stderr)
    return int(code)


def _plain(result: Any) -> str:
    if isinstance(result, list):
        return "\n".join(_plain(one) for one in result) or "nothing"
    if isinstance(result, dict) and "own_seconds" in result:
        parts = ", ".join(f"{path} {seconds} s" for path, seconds in result["by_path"].items())
        live = f"{result['seconds']} s since the {result['since']}: {parts}; its own work {result['own_seconds']} s"
        return f"{result['url']}\n{result['sha'][:12]} of {result['branch']} is live by {result['path']} ({live})"
    return "  ".join(str(part) for part in result.values()) if isinstance(result, dict) else str(result)


# ── Commands ────────────────────────────────────────────────────────────────────────────────────────────────────────


def deploy(asked: argparse.Namespace, hub: Hub, progress: Progress) -> dict[str, Any]:
    """Brings the branch's Space to a commit."""
    return _deployer(asked, hub, progress).deploy(_target(asked), asked.sha or "HEAD").to_dict()


def promote(asked: argparse.Namespace, hub: Hub, progress: Progress) -> dict[str, Any]:
    """Brings main's Space to the commit that a branch's preview runs."""
    shown = preview(asked.owner, asked.app, asked.branch)
    state = hub.state(shown.space)
    sha = hub.revision(state.host) if state else None
    if not sha:
        message = f"{shown.space} runs nothing that could be promoted. Deploy the branch first."
        raise PreviewError(message, Exit.NOT_FOUND)
    target = production(asked.owner, asked.app, asked.default_branch)
    progress.say(f"{sha[:12]} of {asked.branch} goes to {target.space}")
    return _deployer(asked, hub, progress).deploy(target, sha).to_dict()


def rollback(asked: argparse.Namespace, hub: Hub, progress: Progress) -> dict[str, Any]:
    """Brings a Space back to an earlier commit: --to, or the one that was in service before what is now."""
    target = _target(asked)
    if hub.state(target.space) is None:
        raise _missing(target)
    history = [sha for sha in (deployed_sha(title) for _, title in hub.titles(target.space)) if sha]
    # Newest first. What a first rollback has brought back stands at the top and where it was: the second goes further.
    earlier = history[len(history) - history[::-1].index(history[0]) :] if history else []
    if asked.to:
        sha = resolve(asked.folder, asked.to)
    elif earlier:
        sha = earlier[0]
    else:
        raise PreviewError(f"{target.space} has had no earlier commit. Name one with --to.", Exit.NOT_FOUND)
    progress.say(f"back to {sha[:12]}")
    return _deployer(asked, hub, progress).deploy(target, sha).to_dict()


def sweep(asked: argparse.Namespace, hub: Hub, progress: Progress) -> list[dict[str, Any]]:
    """Deletes the previews of branches that are no more: by name and marker, never others."""
    found = _previews(asked, hub)  # before the branches: a branch that is made in between has no Space among these
    alive, known = branches(asked.folder, asked.fetched), fetched_at(asked.folder) if asked.fetched else None
    if not alive:
        raise PreviewError("git names no branch at all, so nothing is deleted. Check the remote.", Exit.USAGE)
    swept = []
    for one in found:
        expected = preview(asked.owner, asked.app, one["branch"]).space
        if one["branch"] in alive or expected != one["space"]:
            continue
        if known and one["made"] and one["made"] > known:
            progress.say(f"{one['space']} is newer than what was fetched, and stays")
            continue
        progress.say(f"{one['branch']} is no more: deleting {one['space']}")
        gone = asked.dry_run or hub.delete(one["space"])
        swept.append({"space": one["space"], "branch": one["branch"], "deleted": bool(gone and not asked.dry_run)})
    return swept


def list_(asked: argparse.Namespace, hub: Hub, progress: Progress) -> list[dict[str, Any]]:
    """The previews there are, with branch, stage, commit and address."""

    def row(one: dict[str, Any]) -> dict[str, Any] | None:
        state = hub.state(one["space"])
        if state is None:
            return None
        told = {"space": one["space"], "branch": one["branch"], "stage": state.stage}
        return {**told, "revision": (hub.revision(state.host) or "")[:12], "url": state.host}

    with ThreadPoolExecutor(8) as pool:
        return [told for told in pool.map(row, _previews(asked, hub)) if told]


def logs(asked: argparse.Namespace, hub: Hub, progress: Progress) -> list[str]:
    """The last lines of a Space's log."""
    target = _target(asked)
    if hub.state(target.space) is None:
        raise _missing(target)
    return hub.logs(target.space, build=asked.build, last=asked.lines)


def open_(asked: argparse.Namespace, hub: Hub, progress: Progress) -> str:
    """The address of a Space, opened in a browser where there is one."""
    target = _target(asked)
    state = hub.state(target.space)
    if state is None:
        raise _missing(target)
    if not asked.json and sys.stdout.isatty():
        webbrowser.open(state.host)
    return state.host


def delete(asked: argparse.Namespace, hub: Hub, progress: Progress) -> dict[str, Any]:
    """Deletes a branch's preview, and never main's Space."""
    if asked.production:
        raise PreviewError("Main's Space is not deleted by this program. Delete it on the Hub.", Exit.USAGE)
    target = preview(asked.owner, asked.app, asked.branch)
    if hub.state(target.space) is None:
        return {"space": target.space, "deleted": False}
    if hub.variables(target.space).get(MARKER) != target.marker:
        raise PreviewError(f"{target.space} is not one of this application's, and stays.", Exit.CONFLICT)
    return {"space": target.space, "deleted": hub.delete(target.space)}


def _missing(target: Target) -> PreviewError:
    return PreviewError(f"{target.space} does not exist. Deploy the branch first.", Exit.NOT_FOUND)


def _previews(asked: argparse.Namespace, hub: Hub) -> list[dict[str, Any]]:
    """This application's previews: those whose name and whose marker both say so."""

    def ours(found: tuple[str, datetime | None]) -> dict[str, Any] | None:
        space = f"{asked.owner}/{found[0]}"
        try:
            said = hub.variables(space)
        except PreviewError as error:
            if error.code is Exit.NOT_FOUND:
                return None  # it has just been deleted
            raise
        branch = said.get(BRANCH) if said.get(MARKER) == asked.app else None
        return {"space": space, "branch": branch, "made": found[1]} if branch else None

    named = [(name, made) for name, made in hub.spaces(asked.owner).items() if is_preview(name, asked.app)]
    with ThreadPoolExecutor(8) as pool:
        return [one for one in pool.map(ours, named) if one]


def _target(asked: argparse.Namespace) -> Target:
    if asked.production:
        return production(asked.owner, asked.app, asked.branch)
    return preview(asked.owner, asked.app, asked.branch)


def _deployer(asked: argparse.Namespace, hub: Hub, progress: Progress) -> Deployer:
    missing = [name for name in asked.secret if name not in os.environ]
    if missing:
        raise PreviewError(f"--secret {missing[0]} names a variable that is not set here.", Exit.USAGE)
    wrong = [pair for pair in asked.variable if "=" not in pair]
    if wrong:
        raise PreviewError(f"--variable takes NAME=VALUE, not {wrong[0]!r}.", Exit.USAGE)
    options = Options(
        visibility=asked.visibility,
        secrets={name: os.environ[name] for name in asked.secret if os.environ[name]},
        variables=dict(pair.split("=", 1) for pair in asked.variable),
        hardware=asked.hardware,
        timeout=asked.timeout,
        poll=asked.poll,
        at_least={"auto": DeployPath.NOTHING, "restart": DeployPath.RESTART, "build": DeployPath.BUILD}[asked.path],
        slim=asked.slim,
        fast_from=f"{asked.owner}/{asked.app}" if asked.fast else None,
    )
    return Deployer(hub, asked.folder, options, progress.say, progress.tick, STARTED, asked.pushed_at)


# ── Arguments ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    owner = os.environ.get("PREVIEW_OWNER")
    shared.add_argument("--owner", default=owner, required=not owner, help="user or organization (PREVIEW_OWNER)")
    shared.add_argument("--app", default=os.environ.get("PREVIEW_APP") or APP, help=f"what Spaces are called ({APP})")
    shared.add_argument("--folder", type=Folder, default=Folder.cwd(), help="the git repository")
    shared.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    one = argparse.ArgumentParser(add_help=False)
    one.add_argument("--branch", type=_branch, default=_here(), help="the branch (the one that is checked out)")
    one.add_argument("--production", action="store_true", help="main's Space instead of the branch's preview")
    how = argparse.ArgumentParser(add_help=False)
    how.add_argument("--visibility", choices=("private", "protected", "public"), default="private")
    how.add_argument("--secret", action="append", default=[], metavar="NAME", help="from here, for a new Space")
    how.add_argument("--variable", action="append", default=[], metavar="NAME=VALUE", help="public, for a new Space")
    how.add_argument("--hardware", help="of a new Space, e.g. zero-a10g; the Hub's default is cpu-basic")
    how.add_argument("--timeout", type=float, default=1200, help="seconds to wait for a restart or build (1200)")
    how.add_argument("--pushed-at", type=_moment, metavar="SECONDS", help="Unix time of the push, to count from there")
    how.add_argument("--poll", type=float, default=1.0, help="seconds between two looks (1)")
    how.add_argument("--path", choices=("auto", "restart", "build"), default="auto", help="do at least this")
    slim, fast = (os.environ.get(name, "").lower() in YES for name in ("PREVIEW_SLIM", "PREVIEW_FAST"))
    how.add_argument("--slim", action="store_true", default=slim, help="previews without torch (PREVIEW_SLIM=1)")
    words = "serve a first preview in a Job meanwhile, open to all, for $0.02 an hour (PREVIEW_FAST=1)"
    how.add_argument("--fast", action="store_true", default=fast, help=words)
    parser = argparse.ArgumentParser(
        prog="python -m previews", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, do: Any, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=do.__doc__, description=do.__doc__, parents=[shared, *parents])
        command.set_defaults(do=do)
        return command

    add("deploy", deploy, one, how).add_argument("--sha", help="the commit (HEAD)")
    promoting = add("promote", promote, one, how)
    promoting.add_argument("--default-branch", default="main", help="the branch that main's Space shows (main)")
    add("rollback", rollback, one, how).add_argument("--to", help="the commit (the one deployed before)")
    sweeping = add("sweep", sweep)
    sweeping.add_argument("--dry-run", action="store_true", help="say what would be deleted")
    sweeping.add_argument(
        "--fetched", action="store_true", help="ask git for the branches it has just fetched, no server"
    )
    add("list", list_)
    reading = add("logs", logs, one)
    reading.add_argument("--build", action="store_true", help="the build's instead of the application's")
    reading.add_argument("--lines", type=_lines, default=100, help="how many (100)")
    add("open", open_, one)
    add("delete", delete, one)
    return parser


def _branch(text: str) -> str:
    if not text or re.search(r"[\x00-\x1f\x7f]", text):
        raise argparse.ArgumentTypeError("a branch's name is needed, without control characters")
    return text


def _lines(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("a number of lines, 1 or more")
    return int(text)


def _moment(text: str) -> float | None:
    """A workflow gives what GitHub tells it, which is empty for some events."""
    if not text:
        return None
    try:
        moment = float(text)
    except ValueError:
        moment = -1.0
    if not 0 < moment <= time.time() + 60:
        raise argparse.ArgumentTypeError("seconds since 1970, not in the future")
    return moment


def _here() -> str | None:
    try:
        run = subprocess.run(["git", "symbolic-ref", "--short", "-q", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
