"""Exit codes, the deploy error, and messages for failed requests to the Hub."""

from __future__ import annotations

import os
import re
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `python -m previews`."""

    SUCCESS = 0
    UNEXPECTED = 1
    USAGE = 2
    ACCESS = 3  # the token is missing, invalid, or lacks permission
    PAYMENT = 4  # the account needs PRO, Team or credit
    NOT_FOUND = 5
    CONFLICT = 6  # another application's Space, or a concurrent commit
    RATE_LIMIT = 7
    BUILD = 8  # the Hub could not build the Space
    APP = 9  # the application does not start, or the new code fails
    TIMEOUT = 10
    NETWORK = 11


class PreviewError(Exception):
    """Error that ends a command.

    Attributes:
        code: Exit code of the command.
        log: Last log lines or traceback lines to print below the message.
        final: Whether to fail at once even though errors with this code are normally retried.
    """

    def __init__(
        self, message: str, code: ExitCode = ExitCode.UNEXPECTED, log: list[str] | None = None, final: bool = False
    ) -> None:
        super().__init__(message)
        self.code, self.log, self.final = code, log or [], final


def hub_error(status: int, action: str, detail: str) -> PreviewError:
    """Build the error for a failed request to the Hub.

    Args:
        status: HTTP status code.
        action: What was attempted, such as "create the Space owner/name".
        detail: The Hub's own error message, or "".
    """
    suffix = f" Response of the Hub: {redact_secrets(detail)}" if detail else ""
    match status:
        case 401:
            message = f"Could not {action}: the Hub rejected the token. Set HF_TOKEN to a valid one."
            return PreviewError(message + suffix, ExitCode.ACCESS)
        case 403:
            message = f"Could not {action}: HF_TOKEN needs write access to the owner's Spaces."
            return PreviewError(message + suffix, ExitCode.ACCESS)
        case 402 if "Job" in action:
            message = f"Could not {action}: Jobs need credit, see https://huggingface.co/settings/billing."
            return PreviewError(message + suffix, ExitCode.PAYMENT)
        case 402:
            message = (
                f"Could not {action}: Gradio Spaces need a PRO account, or an organization on Team or"
                " Enterprise. Upgrade at https://huggingface.co/pricing, or choose another --owner."
            )
            return PreviewError(message + suffix, ExitCode.PAYMENT)
        case 404:
            message = f"Could not {action}: it does not exist, or the token has no access to it."
            return PreviewError(message, ExitCode.NOT_FOUND)
        case 409:
            message = f"Could not {action}: it already exists or is being changed. Run the command again."
            return PreviewError(message + suffix, ExitCode.CONFLICT)
        case 412:
            message = f"Could not {action}: the Space received another commit meanwhile. Run the command again."
            return PreviewError(message, ExitCode.CONFLICT)
        case 429:
            message = f"Could not {action}: too many requests. Run the command again later."
            return PreviewError(message + suffix, ExitCode.RATE_LIMIT)
    return PreviewError(f"Could not {action}: the Hub responded with status {status}.{suffix}", ExitCode.UNEXPECTED)


def redact_secrets(text: str) -> str:
    """Return the text on one line of at most 500 characters, with HF_TOKEN, tokens and URL passwords replaced."""
    token = os.environ.get("HF_TOKEN")
    if token:
        text = text.replace(token, "•••")
    text = re.sub(r"\b(?:hf_[\w.-]{8,}|gh[a-z]_\w{8,}|ey[\w-]{8,}\.[\w-]+\.[\w-]+)", "•••", text)
    text = re.sub(r"(?<=://)[^/\s@]+@", "•••@", text)
    return " ".join(text.split())[:500]
