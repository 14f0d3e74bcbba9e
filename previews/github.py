"""`python -m previews.github report|comment FILE`: a deploy's JSON as outputs and summary of a step, and as a comment.

Reads what GitHub Actions sets: GITHUB_OUTPUT, GITHUB_STEP_SUMMARY, GITHUB_API_URL, GITHUB_REPOSITORY, GITHUB_TOKEN.
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
CODE = str.maketrans({"`": "'", "|": "/", "<": "‹", ">": "›", "\n": " ", "\r": " "})


def main(arguments: Sequence[str] | None = None, env: Mapping[str, str] = os.environ) -> int:
    """0, or 1 with a message where GitHub refuses."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) != 2 or given[0] not in ("report", "comment"):
        print(__doc__, file=sys.stderr)
        return 2
    told = json.loads(Path(given[1]).read_text(encoding="utf-8") or "{}")
    if given[0] == "report":
        report(told, env)
        return 0
    try:
        comment(told, env)
    except httpx2.HTTPError as error:
        print(f"GitHub did not take the comment: {without_secrets(str(error))}", file=sys.stderr)
        return 1
    return 0


def report(told: Mapping[str, Any], env: Mapping[str, str]) -> None:
    """Writes the step's outputs and the job's summary."""
    outputs = {"url": _url(told), "result": json.dumps(told)}
    with open(env["GITHUB_OUTPUT"], "a", encoding="utf-8") as file:
        file.writelines(f"{name}={' '.join(str(value).split())}\n" for name, value in outputs.items())
    with open(env["GITHUB_STEP_SUMMARY"], "a", encoding="utf-8") as file:
        file.write(words(told) + "\n")


def words(told: Mapping[str, Any]) -> str:
    """What a person reads: address, commit, seconds to live, usage; or what went wrong."""
    if "error" in told:
        log = "\n".join(f"    {line}" for line in told.get("log", []))
        return f"### The preview failed\n\n{_inert(told['error'])}\n\n{log}".rstrip()
    url = _url(told)
    usage = f"{url}/?tab=Usage" if url else ""
    rows = [
        ("Preview", url),
        ("Branch", f"`{_inert(told['branch'])}`"),
        ("Commit", f"`{_inert(told['sha'])[:12]}`"),
        ("Live after", f"{told['seconds']} s, by {_inert(told['path'])}"),
        ("Usage", usage),
    ]
    rows += [("Fell back", _inert(why)) for why in told.get("fallbacks", [])]
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def comment(told: Mapping[str, Any], env: Mapping[str, str]) -> None:
    """Creates the pull request's one comment, or edits it. Does nothing for a branch without a pull request."""
    repository, sha = env["GITHUB_REPOSITORY"], env["GITHUB_SHA"]
    headers = {"Authorization": f"Bearer {env['GITHUB_TOKEN']}", "Accept": "application/vnd.github+json"}
    body = {"body": f"{MARK}\n{words(told)}"}
    with httpx2.Client(base_url=f"{env['GITHUB_API_URL']}/repos/{repository}", headers=headers, timeout=20) as github:
        for pull in _get(github, f"/commits/{quote(sha)}/pulls"):
            if pull.get("state") == "open":
                number = int(pull["number"])
                there = [one for one in _get(github, f"/issues/{number}/comments") if MARK in (one.get("body") or "")]
                if there:
                    github.patch(f"/issues/comments/{int(there[0]['id'])}", json=body).raise_for_status()
                else:
                    github.post(f"/issues/{number}/comments", json=body).raise_for_status()


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


def _url(told: Mapping[str, Any]) -> str:
    url = str(told.get("url", ""))
    return url if re.fullmatch(r"https?://[\w.:/-]+", url) else ""


def _inert(text: Any) -> str:
    return without_secrets(str(text)).translate(CODE)


if __name__ == "__main__":
    sys.exit(main())
