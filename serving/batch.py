"""The /v1/batch API: thousands of requests in one file, with Moondream Cloud's protocol.

A file of JSON lines is uploaded in parts, then its lines are answered in the background, and the results are kept for a
week. Everything is in files, so that uploads and batches go on after a restart.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from anyio import to_thread
from fastapi import APIRouter, Query
from fastapi import Request as HttpRequest
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field, ValidationError

from inference import registry
from inference.metering import UsageMeter
from inference.types import (
    Answer,
    AnswerEvent,
    CandidateFailed,
    InferenceError,
    ModelSpec,
    Request,
    RequestError,
    skill_of_question,
)
from serving.errors import ApiError, describe_problems
from serving.json_body import JsonRoute
from serving.model_call import sampled_request, sampled_spec
from serving.schemas import (
    ApiRequest,
    CaptionRequest,
    QueryRequest,
    RegionRequest,
    SamplingSettings,
    caption_fields,
    detect_fields,
    point_fields,
)
from storage.files import write_atomically

MAX_FILE = 512 * 2**20  # bytes
MAX_LINE = 10 * 2**20  # bytes
MAX_LINES = 100_000
MAX_PARTS = 1000
MAX_BATCHES = 20  # of a tenant, with those that are being uploaded
MAX_PAGE_SIZE = 100
KEEP_SECONDS = 7 * 24 * 3600
WORKERS = 8  # lines that are computed at the same time; a local model computes them in one batch
STATE_SECONDS = 1.0  # time between two updates of the progress on disk
SOURCE = "v1-batch"  # of the usage events
BATCH_ID = re.compile(r"[0-9a-f]{32}")
DISK_ERROR = "The batch could not be stored. Try again later; the administrator can free some disk space."
NO_BATCH = "There is no such batch. Results are kept for 7 days."
SKILLS: dict[str, tuple[type[QueryRequest | CaptionRequest | RegionRequest], Callable[[Answer], dict[str, Any]]]] = {
    "query": (QueryRequest, lambda answer: {"answer": answer.text}),
    "caption": (CaptionRequest, caption_fields),
    "detect": (RegionRequest, detect_fields),
    "point": (RegionRequest, point_fields),
}
FileId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
UploadId = Annotated[str, Query(alias="uploadId", max_length=64)]
T = TypeVar("T")
_log = logging.getLogger(__name__)


class UploadedPart(BaseModel):
    """A part of a file, as the upload has answered it."""

    partNumber: Annotated[int, Field(ge=1, le=MAX_PARTS)]  # noqa: N815 - the protocol's name
    etag: str


class CompleteRequest(BaseModel):
    """All parts of a file, and the model that answers it; the default is moondream-tiny."""

    parts: Annotated[list[UploadedPart], Field(min_length=1, max_length=MAX_PARTS)]
    model: Annotated[str, Field(max_length=200)] | None = None


class _CodedError(Exception):
    """An error with a code for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class LineError(_CodedError):
    """Raised when a line cannot be answered."""


class BatchError(_CodedError):
    """Raised when a whole batch fails."""


class BatchService:
    """The batches of all tenants, and the thread that answers them one after the other.

    A batch is a folder: `state.json`, the uploaded parts, `input.jsonl`, and `results.jsonl` with a line per answer.
    """

    def __init__(self, folder: Path, meter: UsageMeter, find_model: Callable[[str, str | None], ModelSpec]) -> None:
        """Create the service and resume unfinished batches.

        Args:
            folder: Folder of the batches.
            meter: Records every model call.
            find_model: Returns the model of a tenant and a name. Raises ApiError.
        """
        self.folder, self.meter, self.find_model = folder, meter, find_model
        self._lock = threading.RLock()
        self._queue: queue.SimpleQueue[Path] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        for state in sorted(self._states(), key=lambda state: state["created_at"]):
            if state["status"] in ("chunking", "processing"):
                self._enqueue(self._path(state["tenant"], state["id"]))

    # Uploads

    def create(self, tenant: str) -> dict[str, Any]:
        """Begin an upload."""
        with self._lock:
            self._delete_expired()
            if len(self._states(tenant)) >= MAX_BATCHES:
                message = f"A key may have {MAX_BATCHES} batches. Abort an upload, or wait until one has expired."
                raise ApiError(429, message, {"Retry-After": "3600"})
            batch_id, upload_id = secrets.token_hex(16), secrets.token_hex(16)
            path = self._path(tenant, batch_id)
            path.mkdir(parents=True)
            state = {"id": batch_id, "tenant": tenant, "upload_id": upload_id, "status": "uploading"}
            self._write(path, {**state, "created_at": _now(), "model": None, "size": 0})
        return {"fileId": batch_id, "uploadId": upload_id, "key": f"batch/{batch_id}"}

    def part_file(self, tenant: str, batch_id: str, upload_id: str, number: int) -> Path:
        """Return the file of a part of an upload, which may exist already."""
        path, _ = self._upload(tenant, batch_id, upload_id)
        return path / f"part-{number:04d}"

    def uploaded_size(self, path: Path, without: Path) -> int:
        """Return the bytes of an upload without one of its parts."""
        return sum(part.stat().st_size for part in path.glob("part-????") if part != without)

    def complete(self, tenant: str, batch_id: str, upload_id: str, body: CompleteRequest) -> dict[str, Any]:
        """Join the parts of a file and begin to answer it. Raises ApiError."""
        self.find_model(tenant, body.model)
        with self._lock:
            path, state = self._upload(tenant, batch_id, upload_id)
            with open(path / "input.jsonl", "wb") as output:
                for part in sorted(body.parts, key=lambda part: part.partNumber):
                    file = path / f"part-{part.partNumber:04d}"
                    if not file.is_file() or _etag(file) != part.etag.strip('"'):
                        raise ApiError(400, f"Part {part.partNumber} is missing or was changed. Upload it again.")
                    with open(file, "rb") as source:
                        shutil.copyfileobj(source, output)
            size = (path / "input.jsonl").stat().st_size
            self._write(path, {**state, "status": "chunking", "model": body.model, "size": size})
            for file in path.glob("part-????"):
                file.unlink()
        self._enqueue(path)
        return {"id": batch_id, "status": "chunking", "size": size}

    def abort(self, tenant: str, batch_id: str, upload_id: str) -> None:
        """Delete an upload."""
        with self._lock:
            path, _ = self._upload(tenant, batch_id, upload_id)
            shutil.rmtree(path)

    # Results

    def get(self, tenant: str, batch_id: str, base_url: str) -> dict[str, Any]:
        """Return the public state of a batch. Raises ApiError (404)."""
        path, state = self._find(tenant, batch_id)
        public = {key: value for key, value in state.items() if key not in ("tenant", "upload_id", "expires")}
        if state["status"] == "uploading":
            parts = {file.name: file for file in path.glob("part-????")}
            public["parts"] = [{"partNumber": int(name[5:]), "etag": _etag(parts[name])} for name in sorted(parts)]
        outputs = [{"index": 0, "url": f"{base_url}batch/{batch_id}/outputs/0"}]
        return {**public, "outputs": outputs if state["status"] == "completed" else []}

    def page(self, tenant: str, limit: int, cursor: str | None, base_url: str) -> dict[str, Any]:
        """Return a page of a tenant's batches, the newest first."""
        states = sorted(self._states(tenant), key=lambda state: (state["created_at"], state["id"]), reverse=True)
        ids = [state["id"] for state in states]
        start = ids.index(cursor) + 1 if cursor in ids else 0
        page = ids[start : start + limit]
        more = start + limit < len(ids)
        batches = [self.get(tenant, batch_id, base_url) for batch_id in page]
        return {"batches": batches, "next_cursor": page[-1] if more else None, "has_more": more}

    def results_file(self, tenant: str, batch_id: str) -> Path:
        """Return the file of the results. Raises ApiError (404, 409)."""
        path, state = self._find(tenant, batch_id)
        if state["status"] != "completed":
            raise ApiError(409, "The batch is not completed yet.", {"Retry-After": "10"})
        return path / "results.jsonl"

    # Work

    def _enqueue(self, path: Path) -> None:
        self._queue.put(path)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            path = self._queue.get()
            try:
                self._process(path)
            except BatchError as error:
                self._end(path, "failed", error={"code": error.code, "message": str(error)})
            except Exception:
                _log.exception("A batch failed")
                message = "The batch could not be processed. Send it again; the server's log has the details."
                self._end(path, "failed", error={"code": "processing_failed", "message": message})

    def _process(self, path: Path) -> None:
        """Answer the lines of a batch that have no result yet."""
        state = self._read(path)
        if state is None:
            return
        try:
            spec = self.find_model(state["tenant"], state["model"])
        except ApiError as error:
            raise BatchError("invalid_model", str(error.detail)) from None
        if not (path / "input.jsonl").is_file():
            raise BatchError("input_lost", "The file was lost when the server lost its disk. Send the batch again.")
        total, progress = count_lines(path / "input.jsonl"), Progress(path / "results.jsonl")
        state |= {"status": "processing", "model": spec.name, **progress.fields(total)}
        self._write(path, state)
        written = time.monotonic()
        with ThreadPoolExecutor(WORKERS) as pool, open(path / "results.jsonl", "ab") as results:
            pending: set[Future[dict[str, Any]]] = set()

            def collect(count: int) -> None:
                """Write results until at most `count` lines are pending."""
                nonlocal pending, written
                while len(pending) > count:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        result = future.result()
                        results.write(json.dumps(result).encode() + b"\n")
                        progress.add(result)
                    results.flush()
                    if time.monotonic() - written >= STATE_SECONDS:
                        written = time.monotonic()
                        self._write(path, {**state, **progress.fields(total)})

            for index, line in enumerate(_lines(path / "input.jsonl")):
                if index not in progress.done:
                    collect(2 * WORKERS)
                    pending.add(pool.submit(self._answer_line, spec, index, line, state["id"]))
            collect(0)
        self._end(path, "completed", **progress.fields(total))

    def _answer_line(self, spec: ModelSpec, index: int, line: bytes, batch_id: str) -> dict[str, Any]:
        """Answer a line. Returns its result, or its error."""
        content: Any = None
        try:
            try:
                content = json.loads(line)
            except ValueError:
                raise LineError("invalid_request", "The line is not JSON.") from None
            request, result_fields, sampling = parse_line(content)
            answer = self._answer(spec, request, sampling, f"{batch_id}:{index}"[:64])
        except LineError as error:
            failure = {"code": error.code, "message": str(error)}
            return {"line_index": index, "id": _line_id(content), "status": "error", "error": failure}
        usage = {"input_tokens": answer.tokens_in, "output_tokens": answer.tokens_out}
        fields = {"line_index": index, "id": _line_id(content), "status": "ok"}
        return {**fields, "result": result_fields(answer), "usage": usage}

    def _answer(self, spec: ModelSpec, request: Request, sampling: SamplingSettings, request_id: str) -> Answer:
        """Run the model. Raises LineError."""
        spec = sampled_spec(spec, sampling)
        message = "The model returned no answer."
        try:
            cancel = threading.Event()
            run = partial(_run_model, spec)
            answers = []
            for event in self.meter.answer(spec.name, request, cancel, run, SOURCE, request_id):
                if isinstance(event, Answer):
                    answers.append(event)
                if isinstance(event, CandidateFailed):
                    message = event.message
            if answers:
                return answers[0]
        except InferenceError as error:
            message = error.message
        except Exception:
            _log.exception("Model %s failed", spec.name)
        raise LineError("processing_error", message)

    # Files

    def _path(self, tenant: str, batch_id: str) -> Path:
        return self.folder / tenant / batch_id

    def _end(self, path: Path, status: str, **fields: Any) -> None:
        state, now = self._read(path), time.time()
        if state is None:
            return
        end = {"completed_at": _now(), "expires_at": _iso(now + KEEP_SECONDS), "expires": now + KEEP_SECONDS}
        try:
            self._write(path, {**state, **fields, "status": status, **end})
            (path / "input.jsonl").unlink(missing_ok=True)
        except OSError:
            _log.exception("The state of a batch could not be written")

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        write_atomically(path / "state.json", json.dumps(state))

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            return json.loads((path / "state.json").read_text())
        except (OSError, ValueError):
            return None

    def _states(self, tenant: str = "*") -> list[dict[str, Any]]:
        states = (self._read(file.parent) for file in self.folder.glob(f"{tenant}/*/state.json"))
        return [state for state in states if state is not None and not _is_expired(state)]

    def _find(self, tenant: str, batch_id: str) -> tuple[Path, dict[str, Any]]:
        path = self._path(tenant, batch_id)
        state = self._read(path) if BATCH_ID.fullmatch(batch_id) else None
        if state is None or _is_expired(state):
            raise ApiError(404, NO_BATCH)
        return path, state

    def _upload(self, tenant: str, batch_id: str, upload_id: str) -> tuple[Path, dict[str, Any]]:
        path, state = self._find(tenant, batch_id)
        if state["status"] != "uploading" or state["upload_id"] != upload_id:
            raise ApiError(409, "This upload is complete, or its uploadId is wrong.")
        return path, state

    def _delete_expired(self) -> None:
        for file in self.folder.glob("*/*/state.json"):
            state = self._read(file.parent)
            if state is None or _is_expired(state):
                shutil.rmtree(file.parent, ignore_errors=True)


class Progress:
    """The results that a batch has already, and their numbers."""

    def __init__(self, file: Path) -> None:
        """Read the results, and drop the last line if a crash cut it."""
        self.done: set[int] = set()
        self.failed = self.tokens_in = self.tokens_out = 0
        content = file.read_bytes() if file.is_file() else b""
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            write_atomically(file, complete)
        for line in complete.splitlines():
            self.add(json.loads(line))

    def add(self, result: dict[str, Any]) -> None:
        """Count a result."""
        self.done.add(result["line_index"])
        self.failed += result["status"] == "error"
        self.tokens_in += result.get("usage", {}).get("input_tokens", 0)
        self.tokens_out += result.get("usage", {}).get("output_tokens", 0)

    def fields(self, total: int) -> dict[str, Any]:
        """Return the fields of the batch's state."""
        progress = {"total": total, "completed": len(self.done) - self.failed, "failed": self.failed}
        return {"progress": progress, "usage": {"input_tokens": self.tokens_in, "output_tokens": self.tokens_out}}


def count_lines(file: Path) -> int:
    """Return the number of lines. Raises BatchError if there are none, too many, or one is too long."""
    total = 0
    for line in _lines(file):
        total += 1
        if total > MAX_LINES:
            raise BatchError("limit_exceeded", f"A batch may have {MAX_LINES:,} lines.")
        if len(line) > MAX_LINE:
            raise BatchError("limit_exceeded", f"Line {total} is longer than {MAX_LINE // 2**20} MB.")
    if not total:
        raise BatchError("empty_batch", "The file has no lines.")
    return total


def parse_line(content: Any) -> tuple[Request, Callable[[Answer], dict[str, Any]], SamplingSettings]:
    """Return the request of a line, the fields of its result, and its sampling settings. Raises LineError."""
    if not isinstance(content, dict):
        raise LineError("invalid_request", "The line is not a JSON object.")
    skill = content.get("skill")
    if not isinstance(skill, str) or skill not in SKILLS:
        raise LineError("unknown_skill", f"The skill must be one of {', '.join(SKILLS)}.")
    images = content.get("images") or []
    if not isinstance(images, list) or len(images) > 1 or (images and "image" in content):
        raise LineError("invalid_request", "A line may have one image.")
    image = content.get("image", images[0] if images else None)
    schema, result_fields = SKILLS[skill]
    fields: dict[str, Any] = {key: value for key, value in content.items() if key not in ("image", "images")}
    if isinstance(image, str):
        fields["image_url"] = image if image.startswith("data:") else f"data:image/jpeg;base64,{image}"
    try:
        body = schema.model_validate({**fields, "stream": False, "model": None})
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        raise LineError("invalid_request", describe_problems(problems)) from None
    try:
        photo = body.photo()
    except ApiError as error:
        raise LineError("image_decode_failed", str(error.detail)) from None
    sampling = body.settings or SamplingSettings()
    fields = _prompt_fields(body)
    if isinstance(body, QueryRequest):
        skill, fields["prompt"] = skill_of_question(body.question)
    try:
        request = sampled_request(photo, skill, sampling, **fields, spatial_refs=body.refs)
    except RequestError as error:
        raise LineError("invalid_request", str(error)) from None
    return request, result_fields, sampling


def _run_model(spec: ModelSpec, name: str, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
    """Run the model with a line's sampling settings."""
    return registry.answer(spec, request, cancel)


def _prompt_fields(body: ApiRequest) -> dict[str, Any]:
    if isinstance(body, QueryRequest):
        return {"prompt": body.question, "reasoning": bool(body.reasoning)}
    if isinstance(body, CaptionRequest):
        return {"length": body.length}
    return {"prompt": body.object} if isinstance(body, RegionRequest) else {}


def router(service: BatchService) -> APIRouter:
    """Create the routes."""
    routes = APIRouter(prefix="/batch", route_class=JsonRoute)

    async def run(function: Callable[[], T]) -> T:
        try:
            return await to_thread.run_sync(function)
        except OSError:
            _log.exception("A batch could not be stored")
            raise ApiError(503, DISK_ERROR, {"Retry-After": "60"}) from None

    def tenant_of(request: HttpRequest) -> str:
        return request.state.tenant

    @routes.post("")
    async def create(action: Literal["mpu-create"], http_request: HttpRequest) -> dict[str, Any]:
        return await run(partial(service.create, tenant_of(http_request)))

    @routes.get("")
    async def list_batches(
        http_request: HttpRequest,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE_SIZE)] = 20,
        cursor: Annotated[str | None, Query(max_length=64)] = None,
    ) -> dict[str, Any]:
        return await run(partial(service.page, tenant_of(http_request), limit, cursor, _base_url(http_request)))

    @routes.put("/{file_id}")
    async def upload_part(
        file_id: FileId,
        action: Literal["mpu-uploadpart"],
        upload_id: UploadId,
        part_number: Annotated[int, Query(alias="partNumber", ge=1, le=MAX_PARTS)],
        http_request: HttpRequest,
    ) -> dict[str, Any]:
        file = await run(partial(service.part_file, tenant_of(http_request), file_id, upload_id, part_number))
        room = MAX_FILE - await run(partial(service.uploaded_size, file.parent, file))
        temporary, digest = file.with_name(f".{secrets.token_hex(8)}"), hashlib.md5(usedforsecurity=False)
        try:
            with open(temporary, "wb") as output:
                async for chunk in http_request.stream():
                    room -= len(chunk)
                    if room < 0:
                        raise ApiError(413, f"A file may have {MAX_FILE // 2**20} MB. Send several batches.")
                    output.write(chunk)
                    digest.update(chunk)
            await run(partial(temporary.replace, file))
        except OSError:
            raise ApiError(503, DISK_ERROR, {"Retry-After": "60"}) from None
        finally:
            temporary.unlink(missing_ok=True)
        return {"etag": digest.hexdigest(), "partNumber": part_number}

    @routes.post("/{file_id}")
    async def complete(
        file_id: FileId,
        action: Literal["mpu-complete"],
        upload_id: UploadId,
        body: CompleteRequest,
        http_request: HttpRequest,
    ) -> dict[str, Any]:
        return await run(partial(service.complete, tenant_of(http_request), file_id, upload_id, body))

    @routes.delete("/{file_id}")
    async def abort(
        file_id: FileId, action: Literal["mpu-abort"], upload_id: UploadId, http_request: HttpRequest
    ) -> dict[str, Any]:
        await run(partial(service.abort, tenant_of(http_request), file_id, upload_id))
        return {"ok": True}

    @routes.get("/{file_id}")
    async def get(file_id: FileId, http_request: HttpRequest) -> dict[str, Any]:
        return await run(partial(service.get, tenant_of(http_request), file_id, _base_url(http_request)))

    @routes.get("/{file_id}/outputs/0", response_class=FileResponse)
    async def output(file_id: FileId, http_request: HttpRequest) -> FileResponse:
        file = await run(partial(service.results_file, tenant_of(http_request), file_id))
        return FileResponse(file, media_type="application/x-ndjson")

    return routes


def _base_url(request: HttpRequest) -> str:
    """Return the address of the API as the client knows it, with a slash at the end."""
    return f"{request.url.scheme}://{request.url.netloc}{request.scope.get('root_path', '').rstrip('/')}/"


def _lines(file: Path) -> Iterator[bytes]:
    """Yield the lines of a file that are not empty, each up to one byte more than `MAX_LINE`."""
    with open(file, "rb") as source:
        while line := source.readline(MAX_LINE + 1):
            if line.strip():
                yield line


def _line_id(content: Any) -> Any:
    identifier = content.get("id") if isinstance(content, dict) else None
    return identifier[:200] if isinstance(identifier, str) else identifier if isinstance(identifier, int) else None


def _etag(file: Path) -> str:
    with open(file, "rb") as source:
        digest = hashlib.md5(usedforsecurity=False)
        while chunk := source.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _is_expired(state: dict[str, Any]) -> bool:
    created = datetime.fromisoformat(state["created_at"]).timestamp()
    unfinished = state["status"] == "uploading"
    expires = state.get("expires", created + KEEP_SECONDS if unfinished else float("inf"))
    return expires < time.time()


def _now() -> str:
    return _iso(time.time())


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat()
