"""`python -m previews.github report|comment FILE` and `opened`: show a deploy in GitHub Actions and pull requests.

report: writes the JSON result of a deploy as step outputs and job summary. comment: sets the commit's status and writes
the one comment of each open pull request. opened: writes the comment of a pull request that was opened after its commit
was deployed, from the commit's status. Reads the environment of GitHub Actions: GITHUB_OUTPUT, GITHUB_STEP_SUMMARY,
GITHUB_API_URL, GITHUB_REPOSITORY, GITHUB_SHA, GITHUB_SERVER_URL, GITHUB_RUN_ID; and GITHUB_TOKEN, PULL_REQUEST,
HEAD_SHA, GITHUB_HEAD_REF.
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

from previews.errors import redact_secrets

COMMENT_MARKER = "<!-- moondream-playground preview -->"
STATUS_CONTEXT = "preview"
MAX_DESCRIPTION = 140  # characters of a status description
PAGE_SIZE = 100
ESCAPES = str.maketrans({"`": "'", "|": "/", "<": "‹", ">": "›", "\n": " ", "\r": " ", "[": "(", "]": ")", "@": "＠"})


def main(arguments: Sequence[str] | None = None, env: Mapping[str, str] = os.environ) -> int:
    """Run a command and return its exit code: 1 if GitHub rejects a request, 2 for wrong arguments."""
    match list(sys.argv[1:] if arguments is None else arguments):
        case ["report", file]:
            write_report(read_result(Path(file)), env)
            return 0
        case ["comment", file]:
            result = read_result(Path(file))
        case ["opened"]:
            result = None
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    headers = {"Authorization": f"Bearer {env['GITHUB_TOKEN']}", "Accept": "application/vnd.github+json"}
    url = f"{env['GITHUB_API_URL']}/repos/{env['GITHUB_REPOSITORY']}"
    try:
        with httpx2.Client(base_url=url, headers=headers, timeout=20) as github:
            if result is None:
                comment_on_opened_pull_request(github, env)
            else:
                publish_result(github, result, env)
    except httpx2.HTTPError as error:
        print(f"The request to GitHub failed: {redact_secrets(str(error))}", file=sys.stderr)
        return 1
    return 0


def read_result(file: Path) -> dict[str, Any]:
    """Read the JSON result of a deploy; an error result if the file is missing or incomplete."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        result = {}
    if not isinstance(result, dict) or not ("error" in result or "url" in result):
        return {"error": "The deploy ended without a result. See its log; run it again to continue."}
    return result


def write_report(result: Mapping[str, Any], env: Mapping[str, str]) -> None:
    """Write the step outputs `url` and `result`, and the job summary."""
    outputs = {"url": _safe_url(result.get("url", "")), "result": json.dumps(result)}
    with open(env["GITHUB_OUTPUT"], "a", encoding="utf-8") as file:
        file.writelines(f"{name}={' '.join(str(value).split())}\n" for name, value in outputs.items())
    with open(env["GITHUB_STEP_SUMMARY"], "a", encoding="utf-8") as file:
        file.write(format_result(result) + "\n")


def format_result(result: Mapping[str, Any], log_url: str = "") -> str:
    """Format a deploy's result as Markdown: URL, branch, commit, duration and usage link, or the error."""
    log_link = f"\n\n[Log of the run]({log_url})" if log_url else ""
    if "error" in result:
        log = "\n".join(f"    {_escape(line)}" for line in result.get("log", []))
        return f"### The preview failed\n\n{_escape(result['error'])}\n\n{log}".rstrip() + log_link
    url, by_path = _safe_url(result["url"]), result.get("by_path", {})
    details = ", ".join(f"{_escape(path)} {seconds} s" for path, seconds in by_path.items())
    usage = f"[of this branch]({url}/?usage.branches={quote(result['branch'], safe='')})" if url else ""
    rows = [
        ("Preview", url),
        ("Branch", f"`{_escape(result['branch'])}`"),
        ("Commit", f"`{_escape(result['sha'])[:12]}`"),
        ("Live", _escape(describe_duration(result)) + (f" ({details})" if len(by_path) > 1 else "")),
        ("Usage", usage),
    ]
    rows += [("Fallback", _escape(reason)) for reason in result.get("fallbacks", [])]
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows) + log_link


def describe_duration(result: Mapping[str, Any]) -> str:
    """Describe the duration and path of a deploy; a result built from a status has the description as `live`."""
    if "live" in result:
        return str(result["live"])
    if result["path"] == "nothing":
        return "already live: no file changed"
    start = "after the push" if result.get("since") == "push" else "after the start of the deploy"
    return f"{result['seconds']} s {start}, by {result['path']}"


# ── GitHub's API ────────────────────────────────────────────────────────────────────────────────────────────────────


def publish_result(github: httpx2.Client, result: Mapping[str, Any], env: Mapping[str, str]) -> None:
    """Set the commit's status, and comment on each open pull request that contains the commit."""
    sha, log_url, failed = env["GITHUB_SHA"], "", "error" in result
    if "GITHUB_RUN_ID" in env:
        run = f"{env['GITHUB_REPOSITORY']}/actions/runs/{env['GITHUB_RUN_ID']}"
        log_url = _safe_url(f"{env['GITHUB_SERVER_URL']}/{run}")
    status = {
        "context": STATUS_CONTEXT,
        "state": "failure" if failed else "success",
        "description": _escape(result["error"] if failed else describe_duration(result))[:MAX_DESCRIPTION],
        "target_url": log_url if failed else _safe_url(result["url"]),
    }
    github.post(f"/statuses/{quote(sha)}", json=status).raise_for_status()
    for pull in _get_all(github, f"/commits/{quote(sha)}/pulls"):
        if pull.get("state") == "open":
            write_comment(github, int(pull["number"]), format_result(result, log_url))


def comment_on_opened_pull_request(github: httpx2.Client, env: Mapping[str, str]) -> None:
    """Comment with the status of the pull request's last commit, if it was already deployed."""
    sha = env["HEAD_SHA"]
    for status in _get_all(github, f"/commits/{quote(sha)}/statuses"):  # newest first
        if status.get("context") == STATUS_CONTEXT:
            url, description = status.get("target_url") or "", status["description"]
            if status["state"] == "success":
                result = {"branch": env["GITHUB_HEAD_REF"], "sha": sha, "url": url, "live": description}
                text = format_result(result)
            else:
                text = format_result({"error": description}, _safe_url(url))
            write_comment(github, int(env["PULL_REQUEST"]), text)
            return


def write_comment(github: httpx2.Client, pull: int, text: str) -> None:
    """Create or edit the workflow's comment on a pull request."""
    body = {"body": f"{COMMENT_MARKER}\n{text}"}
    for comment in _get_all(github, f"/issues/{pull}/comments"):
        if _is_own_comment(comment):
            github.patch(f"/issues/comments/{int(comment['id'])}", json=body).raise_for_status()
            return
    github.post(f"/issues/{pull}/comments", json=body).raise_for_status()


def _is_own_comment(comment: Mapping[str, Any]) -> bool:
    """Return whether a workflow wrote the comment; a user may have copied the marker."""
    return (comment.get("body") or "").startswith(COMMENT_MARKER) and (comment.get("user") or {}).get("type") == "Bot"


def _get_all(github: httpx2.Client, path: str) -> list[dict[str, Any]]:
    """Read all pages of a list."""
    items: list[dict[str, Any]] = []
    page = 1
    while True:
        response = github.get(path, params={"per_page": PAGE_SIZE, "page": page})
        response.raise_for_status()
        batch = response.json()
        items += batch
        if len(batch) < PAGE_SIZE:
            return items
        page += 1


def _safe_url(text: Any) -> str:
    """Return the text if it is a plain HTTP URL, otherwise ""."""
    return str(text) if re.fullmatch(r"https?://[\w.:/-]+", str(text)) else ""


def _escape(text: Any) -> str:
    """Neutralize Markdown, HTML and @mentions, and redact secrets."""
    return redact_secrets(str(text)).translate(ESCAPES)


if __name__ == "__main__":
    sys.exit(main())
