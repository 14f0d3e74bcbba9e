"""`python -m previews.github report|comment FILE` and `opened`: a deploy as GitHub shows it.

report: a deploy's JSON as outputs and summary of a step. comment: as a status of its commit and as the one comment of
its pull request. opened: the comment of a pull request that has been opened after its commit was deployed, from that
status. Reads what GitHub Actions sets: GITHUB_OUTPUT, GITHUB_STEP_SUMMARY, GITHUB_API_URL, GITHUB_REPOSITORY,
GITHUB_SHA, GITHUB_SERVER_URL, GITHUB_RUN_ID; and GITHUB_TOKEN, PULL_REQUEST, HEAD_SHA, GITHUB_HEAD_REF.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2

from previews.errors import without_secrets

MARK = "<!-- moondream-playground preview -->"
STATUS = "preview"  # the name of the commit's status
LONGEST = 140  # characters of a status's description
CODE = str.maketrans({"`": "'", "|": "/", "<": "‹", ">": "›", "\n": " ", "\r": " ", "[": "(", "]": ")", "@": "＠"})


def main(arguments: Sequence[str] | None = None, env: Mapping[str, str] = os.environ) -> int:
    """0, or 1 with a message where GitHub refuses."""
    match list(sys.argv[1:] if arguments is None else arguments):
        case ["report", file]:
            report(read(Path(file)), env)
            return 0
        case ["comment", file]:
            told = read(Path(file))
        case ["opened"]:
            told = None
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    try:
        with _github(env) as github:
            opened(github, env) if told is None else comment(github, told, env)
    except httpx2.HTTPError as error:
        print(f"GitHub did not take it: {without_secrets(str(error))}", file=sys.stderr)
        return 1
    return 0


def read(file: Path) -> dict[str, Any]:
    """A deploy's JSON; where it has left none, because it was ended from outside, an error that says so."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        told = {}
    if not isinstance(told, dict) or not ("error" in told or "url" in told):
        return {
            "error": "The deploy was ended before it told anything. See its log; a repeated run goes on from there."
        }
    return told


def report(told: Mapping[str, Any], env: Mapping[str, str]) -> None:
    """Writes the step's outputs and the job's summary."""
    outputs = {"url": _url(told.get("url", "")), "result": json.dumps(told)}
    with open(env["GITHUB_OUTPUT"], "a", encoding="utf-8") as file:
        file.writelines(f"{name}={' '.join(str(value).split())}\n" for name, value in outputs.items())
    with open(env["GITHUB_STEP_SUMMARY"], "a", encoding="utf-8") as file:
        file.write(words(told) + "\n")


def words(told: Mapping[str, Any], log_url: str = "") -> str:
    """What a person reads: address, commit, seconds to live, usage; or what went wrong."""
    where = f"\n\n[The run's log]({log_url})" if log_url else ""
    if "error" in told:
        log = "\n".join(f"    {_inert(line)}" for line in told.get("log", []))
        return f"### The preview failed\n\n{_inert(told['error'])}\n\n{log}".rstrip() + where
    url = _url(told["url"])
    taken = ", ".join(f"{_inert(path)} {seconds} s" for path, seconds in told.get("by_path", {}).items())
    rows = [
        ("Preview", url),
        ("Branch", f"`{_inert(told['branch'])}`"),
        ("Commit", f"`{_inert(told['sha'])[:12]}`"),
        ("Live", _inert(live(told)) + (f" ({taken})" if len(told.get("by_path", {})) > 1 else "")),
        ("Usage", f"[of this branch]({url}/?usage.branches={quote(told['branch'], safe='')})" if url else ""),
    ]
    rows += [("Fell back", _inert(why)) for why in told.get("fallbacks", [])]
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows) + where


def live(told: Mapping[str, Any]) -> str:
    """How long it took and by which path, in words; those of a status, where that is all there is."""
    if "live" in told:
        return str(told["live"])
    since = "after the push" if told.get("since") == "push" else "after the start of the deploy"
    if told["path"] == "nothing":
        return "already before: nothing of it has changed"
    return f"{told['seconds']} s {since}, by {told['path']}"


# ── GitHub's API ────────────────────────────────────────────────────────────────────────────────────────────────────


def comment(github: httpx2.Client, told: Mapping[str, Any], env: Mapping[str, str]) -> None:
    """Gives the commit a status, and tells each open pull request that it is in."""
    sha, log_url = env["GITHUB_SHA"], _log_url(env)
    failed = "error" in told
    status = {
        "context": STATUS,
        "state": "failure" if failed else "success",
        "description": _inert(told["error"] if failed else live(told))[:LONGEST],
        "target_url": log_url if failed else _url(told["url"]),
    }
    github.post(f"/statuses/{quote(sha)}", json=status).raise_for_status()
    for pull in _get(github, f"/commits/{quote(sha)}/pulls"):
        if pull.get("state") == "open":
            say(github, int(pull["number"]), words(told, log_url))


def opened(github: httpx2.Client, env: Mapping[str, str]) -> None:
    """Tells a pull request of the deploy that its last commit has had; nothing where that is still to come."""
    sha, branch = env["HEAD_SHA"], env["GITHUB_HEAD_REF"]
    for status in _get(github, f"/commits/{quote(sha)}/statuses"):  # newest first
        if status.get("context") == STATUS:
            said = {"branch": branch, "sha": sha, "url": status.get("target_url") or "", "live": status["description"]}
            failed = {"error": status["description"]}
            told, log_url = (said, "") if status["state"] == "success" else (failed, _url(said["url"]))
            say(github, int(env["PULL_REQUEST"]), words(told, log_url))
            return


def say(github: httpx2.Client, pull: int, text: str) -> None:
    """Creates the pull request's one comment, or edits it."""
    body = {"body": f"{MARK}\n{text}"}
    there = [one for one in _get(github, f"/issues/{pull}/comments") if _is_ours(one)]
    if there:
        github.patch(f"/issues/comments/{int(there[0]['id'])}", json=body).raise_for_status()
    else:
        github.post(f"/issues/{pull}/comments", json=body).raise_for_status()


def _is_ours(comment: Mapping[str, Any]) -> bool:
    """A workflow's own comment, and not a person's who has copied its mark."""
    return (comment.get("body") or "").startswith(MARK) and (comment.get("user") or {}).get("type") == "Bot"


def _github(env: Mapping[str, str]) -> httpx2.Client:
    headers = {"Authorization": f"Bearer {env['GITHUB_TOKEN']}", "Accept": "application/vnd.github+json"}
    return httpx2.Client(
        base_url=f"{env['GITHUB_API_URL']}/repos/{env['GITHUB_REPOSITORY']}", headers=headers, timeout=20
    )


def _get(github: httpx2.Client, path: str) -> list[dict[str, Any]]:
    """All pages of a list."""
    found: list[dict[str, Any]] = []
    page = 1
    while True:
        answer = github.get(path, params={"per_page": 100, "page": page})
        answer.raise_for_status()
        found += answer.json()
        if len(answer.json()) < 100:
            return found
        page += 1


def _log_url(env: Mapping[str, str]) -> str:
    if "GITHUB_RUN_ID" not in env:
        return ""
    return _url(f"{env['GITHUB_SERVER_URL']}/{env['GITHUB_REPOSITORY']}/actions/runs/{env['GITHUB_RUN_ID']}")


def _url(text: Any) -> str:
    """An address that may be shown; "" for what is none."""
    return str(text) if re.fullmatch(r"https?://[\w.:/-]+", str(text)) else ""


def _inert(text: Any) -> str:
    """Text that is no Markdown, no HTML, and calls nobody."""
    return without_secrets(str(text)).translate(CODE)


if __name__ == "__main__":
    sys.exit(main())
