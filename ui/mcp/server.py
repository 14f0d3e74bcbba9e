"""Streamable HTTP of the Model Context Protocol at /mcp, and the photos that its tools read and write at /photos."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from anyio import to_thread
from mcp.server.fastmcp.exceptions import ToolError
from mcp.server.fastmcp.tools import Tool
from mcp.server.lowlevel import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.types import Tool as ToolDescription
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from access.permissions import TOOLS
from recipes import PhotoError
from ui.mcp.photos import PhotoStore
from ui.mcp.tools import Caller, create_tools
from ui.playground.limits import LimitError
from ui.services import AppServices

INSTRUCTIONS = (
    "Compare vision-language models on a photo, edit photos by recipes that a model proposes and rewards score, and "
    "fine-tune models on a reward. Photos are data URLs, ids of photos uploaded with POST /photos, or names of samples."
)
DISK_ERROR = "The photo could not be stored. Ask the administrator to check the disk."


def routes(services: AppServices, folder: Path) -> list[BaseRoute]:
    """Create the routes /mcp, /photos and /photos/{name}.

    Args:
        services: The application's services.
        folder: Folder of the photos.
    """
    photos = PhotoStore(folder)

    async def upload(request: Request) -> Response:
        """Store the photo in the body. Its size is limited by the route's rule; see `access.permissions.ROUTES`."""
        body = await request.body()
        try:
            with services.comparisons.admit(services.access.visitor(request)):
                photo_id = await to_thread.run_sync(photos.save_upload, body)
        except LimitError as error:
            return JSONResponse({"error": str(error)}, 429, {"Retry-After": "10"})
        except PhotoError as error:
            return JSONResponse({"error": str(error)}, 400)
        except OSError:
            return JSONResponse({"error": DISK_ERROR}, 503)
        return JSONResponse({"id": photo_id, "link": f"{request.base_url}photos/{photo_id}.jpg"})

    async def picture(request: Request) -> Response:
        name = request.path_params["name"]
        path = photos.path(name.removesuffix(".jpg")) if name.endswith(".jpg") else None
        if path is None:
            return JSONResponse({"error": "There is no such photo. Photos are kept for a day."}, 404)
        headers = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
        return FileResponse(path, media_type="image/jpeg", headers=headers)

    return [
        Route("/mcp", McpEndpoint(services, photos), methods=["GET", "POST", "DELETE"]),
        Route("/photos", upload, methods=["POST"]),
        Route("/photos/{name}", picture, methods=["GET"]),
    ]


class McpEndpoint:
    """ASGI application of the protocol. Every request stands alone: there are no sessions to bind to a visitor."""

    def __init__(self, services: AppServices, photos: PhotoStore) -> None:
        self.server = create_server(services, photos)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        manager = StreamableHTTPSessionManager(self.server, json_response=True, stateless=True)
        async with manager.run():
            await manager.handle_request(scope, receive, send)


def create_server(services: AppServices, photos: PhotoStore) -> Server[Any, Request]:
    """Create the server with its tools."""
    server: Server[Any, Request] = Server("moondream-playground", instructions=INSTRUCTIONS)

    def caller() -> Caller:
        request = server.request_context.request
        assert request is not None
        return Caller(services.access.visitor(request), str(request.base_url))

    functions = create_tools(services, photos, caller)
    tools = {
        name: Tool.from_function(_in_thread(function), name=name, structured_output=False)
        for name, function in functions.items()
    }

    @server.list_tools()
    async def list_tools() -> list[ToolDescription]:
        return [
            ToolDescription(name=tool.name, description=tool.description, inputSchema=tool.parameters)
            for tool in tools.values()
        ]

    @server.call_tool()
    async def call_tool(name: str, arguments: dict[str, Any]) -> Any:
        if name not in tools:
            raise ToolError(f"There is no tool called {name[:100]!r}. Use one of {', '.join(tools)}.")
        if caller().visitor.role < TOOLS[name].role:
            raise ToolError("Sign in to do this: send an API key in the header Authorization.")
        return await tools[name].run(arguments, convert_result=True)

    return server


def _in_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a coroutine function with the same signature that runs a tool in a thread.

    It converts errors for users to exceptions whose text has no markup.
    """

    @functools.wraps(function)
    async def call(**arguments: Any) -> Any:
        try:
            return await to_thread.run_sync(functools.partial(function, **arguments))
        except gr.Error as error:
            raise ValueError(html.unescape(str(error.message))) from None
        except OSError:
            raise ValueError(DISK_ERROR) from None

    return call
