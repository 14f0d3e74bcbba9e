"""Client of the page's events over HTTP, as a browser sends them: with a cookie jar and a session hash."""

from __future__ import annotations

import json
import secrets
from types import TracebackType
from typing import Any

import httpx


class EventError(Exception):
    """Raised when an event fails. The message is the one that the page displays."""


class EventClient:
    """One browser with one page.

    Args:
        address: The application's address.
        **options: Options of `httpx.Client`, such as `headers`.
    """

    def __init__(self, address: str, **options: Any) -> None:
        self.http = httpx.Client(base_url=address, timeout=60, **options)
        self.session_hash = secrets.token_hex(6)
        self.http.get("/").raise_for_status()  # sets the browser's cookie
        self.config = self.http.get("/config").raise_for_status().json()

    def __enter__(self) -> EventClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()

    def dependency(self, elem_id: str, event: str) -> dict[str, Any]:
        """Return the first event with a server function of a component."""
        [component] = [part["id"] for part in self.config["components"] if part["props"].get("elem_id") == elem_id]
        found = (item for item in self.config["dependencies"] if [component, event] in map(list, item["targets"]))
        return next(item for item in found if item["backend_fn"])

    def inputs(self, dependency: dict[str, Any], values: dict[str, Any]) -> list[Any]:
        """Return the values of an event's inputs: `values` by elem_id, else what the page shows at its start."""
        parts = {part["id"]: part["props"] for part in self.config["components"]}
        props = [parts[number] for number in dependency["inputs"]]
        return [values.get(part.get("elem_id") or "", part.get("value")) for part in props]

    def send(self, elem_id: str, event: str, event_data: Any = None, **values: Any) -> list[Any]:
        """Send an event of a component and return its outputs.

        Args:
            elem_id: The component.
            event: Name of the event.
            event_data: Data of the event.
            **values: Values of inputs by elem_id, with "_" for "-".

        Raises:
            EventError: The event failed.
        """
        dependency = self.dependency(elem_id, event)
        named = {name.replace("_", "-"): value for name, value in values.items()}
        body = {
            "fn_index": dependency["id"],
            "data": self.inputs(dependency, named),
            "event_data": event_data,
            "session_hash": self.session_hash,
        }
        if not dependency["queue"]:
            response = self.http.post("/gradio_api/run/predict", json=body)
            if response.is_error:
                raise EventError(response.json().get("error") or response.text)
            return response.json()["data"]
        response = self.http.post("/gradio_api/queue/join", json=body)
        response.raise_for_status()
        query = {"session_hash": self.session_hash}
        with self.http.stream("GET", "/gradio_api/queue/data", params=query) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    output = message["output"]
                    if not message["success"]:
                        raise EventError(str(output.get("error")))
                    return output["data"]
        raise EventError("The server closed the stream before the event had ended.")
