"""What can go wrong, in plain words: each kind of failure has an exit code and says what to do."""

from __future__ import annotations

import os
import re
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of `python -m previews`."""

    DONE = 0
    UNEXPECTED = 1
    USAGE = 2
    ACCESS = 3  # the token is missing, wrong, or may not do this
    PAYMENT = 4  # the account needs PRO, Team or credit
    NOT_FOUND = 5
    CONFLICT = 6  # somebody else's Space or commit
    RATE_LIMIT = 7
    BUILD = 8  # the Hub could not build the Space
    APP = 9  # the application does not start, or its new code does not run
    TIMEOUT = 10
    NETWORK = 11


class PreviewError(Exception):
    """Something that stops a command: a message for a person, without secrets, and the exit code.

    final: not to be tried again, though its kind may pass.
    """

    def __init__(
        self, message: str, code: Exit = Exit.UNEXPECTED, log: list[str] | None = None, final: bool = False
    ) -> None:
        super().__init__(message)
        self.code, self.log, self.final = code, log or [], final


def refused(status: int, what: str, said: str) -> PreviewError:
    """The Hub's refusal. what: what was being done ("create owner/name"); said: the Hub's own words."""
    words = f" The Hub said: {without_secrets(said)}" if said else ""
    match status:
        case 401:
            message = f"The Hub does not know this token, so it could not {what}. Set HF_TOKEN to a valid one."
            return PreviewError(message + words, Exit.ACCESS)
        case 403:
            message = f"The token may not {what}. It needs write access to the owner's Spaces (HF_TOKEN)."
            return PreviewError(message + words, Exit.ACCESS)
        case 402 if "Job" in what:
            message = f"The account may not {what}: Jobs need credit, see https://huggingface.co/settings/billing."
            return PreviewError(message + words, Exit.PAYMENT)
        case 402:
            message = (
                f"The account may not {what}: Gradio Spaces need a PRO account, or an organization on Team or"
                " Enterprise. Upgrade at https://huggingface.co/pricing, or name another --owner."
            )
            return PreviewError(message + words, Exit.PAYMENT)
        case 404:
            message = f"Could not {what}: it does not exist, or the token cannot see it."
            return PreviewError(message, Exit.NOT_FOUND)
        case 409:
            message = f"Could not {what}: it exists already or is being changed. Run this again."
            return PreviewError(message + words, Exit.CONFLICT)
        case 412:
            message = f"Could not {what}: somebody else committed in between. Run this again."
            return PreviewError(message, Exit.CONFLICT)
        case 429:
            message = f"The Hub asks to wait before it will {what}: too many requests. Run this again later."
            return PreviewError(message + words, Exit.RATE_LIMIT)
    return PreviewError(f"The Hub answered {status} when asked to {what}.{words}", Exit.UNEXPECTED)


def without_secrets(text: str) -> str:
    """The text on one line, cut, without anything that looks like a token, and without what HF_TOKEN holds."""
    token = os.environ.get("HF_TOKEN")
    if token:
        text = text.replace(token, "•••")
    text = re.sub(r"\b(?:hf_[\w.-]{8,}|gh[a-z]_\w{8,}|ey[\w-]{8,}\.[\w-]+\.[\w-]+)", "•••", text)
    text = re.sub(r"(?<=://)[^/\s@]+@", "•••@", text)
    return " ".join(text.split())[:500]
