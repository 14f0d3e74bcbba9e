"""The panel "Use from code" of the Playground: the current settings as code for several clients."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import numpy as np

from access.roles import Visitor
from inference.types import Request, RequestError
from rewards import REWARDS, RewardFunction
from ui.components import template_component
from ui.events import UNQUEUED
from ui.permissions import visitor_of
from ui.playground.code import CLIENTS, UPLOADED_PHOTO, snippets
from ui.playground.link import LINK_FIELDS, PlaygroundSettings
from ui.playground.models import visitor_models
from ui.playground.picker import check_models
from ui.playground.samples import SAMPLES
from ui.services import AppServices

NOTE = "Runs in the folder of {photo}. If this deployment has API keys, set PLAYGROUND_API_KEY to one of them."
LOCAL_ADDRESS = "http://localhost:7860"
MAX_ADDRESS = 300
ANY_PHOTO = np.zeros((1, 1, 3), np.uint8)  # requests are validated with a photo
_HERE = Path(__file__).resolve().parent


def write_code(services: AppServices, visitor: Visitor, address: str, values: Sequence[Any]) -> dict[str, Any]:
    """Write the current settings as code.

    Args:
        services: The application's services.
        visitor: The visitor.
        address: Address of this deployment in the visitor's browser.
        values: Values of LINK_FIELDS, followed by the weight of each reward.

    Returns:
        The value of the panel: the code by client, and a note, which says what is wrong if there is no code.
    """
    inputs = dict(zip((*LINK_FIELDS, *REWARDS), values, strict=True))
    specs = visitor_models(services.adapters, visitor).specs
    try:
        names = check_models(inputs["models"], specs)
        sampling = {name: inputs[name] for name in ("length", "n", "temperature", "seed")}
        request = Request(ANY_PHOTO, inputs["skill"], inputs["prompt"] or "", **sampling)
    except gr.Error as error:
        return {"code": {}, "note": html.unescape(str(error.message))}
    except RequestError as error:
        return {"code": {}, "note": str(error)}
    photo = inputs["photo"] if inputs["photo"] in SAMPLES else ""
    fields = {name: getattr(request, name) for name in ("skill", "prompt", *sampling)}
    settings = PlaygroundSettings(photo, tuple(names), **fields)
    weights = {name: inputs[name] for name in REWARDS}
    reward = RewardFunction(weights) if any(weights.values()) else None
    code = snippets(settings, specs, checked_address(address), reward)
    return {"code": code, "note": NOTE.format(photo=photo or f"your photo, as {UPLOADED_PHOTO}")}


def checked_address(address: str) -> str:
    """Return the address without a slash at its end, or that of a local deployment if it is invalid."""
    try:
        parts = urlsplit(address)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and not (parts.query or parts.username)
    except ValueError:
        valid = False
    return address.rstrip("/") if valid and len(address) <= MAX_ADDRESS else LOCAL_ADDRESS


def code_panel() -> gr.HTML:
    """Create the panel. It triggers `write` with {address} when it is opened, and while it is open at each change."""
    clients = [{"name": name, "title": title} for name, title in CLIENTS.items()]
    return template_component(_HERE, "code_panel", "code", clients=clients)


def build(services: AppServices, panel: gr.HTML, inputs: list[Any]) -> None:
    """Connect the panel.

    Args:
        services: The application's services.
        panel: The panel.
        inputs: The inputs of LINK_FIELDS, followed by one slider per reward.
    """

    def code_requested(event: gr.EventData, request: gr.Request, *values: Any) -> dict[str, Any]:
        details = event._data if isinstance(event._data, dict) else {}
        return write_code(services, visitor_of(services.access, request), str(details.get("address")), values)

    panel.write(code_requested, inputs, panel, **UNQUEUED)
