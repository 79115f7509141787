"""The service over HTTP: studies in, what is missing out. Starlette routes around a `Desk`."""

from __future__ import annotations

import asyncio
import hmac
import io
import math
import re
import secrets
import statistics
import tempfile
import zipfile
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import copedit_rt
from copedit_rt.errors import CopeditError, Fault
from copedit_rt.files import scratch_folder
from copedit_rt.serving.asked import MOST_FIELDS, MOST_FILES, Asked, Refused, keep_files, public, read_fields
from copedit_rt.serving.desk import Desk, Ticket, where
from copedit_rt.terminal import finite

_DRAINED = 1 << 28  # bytes of a refused request that are read and forgotten
_FORM = 1 << 16  # bytes that what is no file of a request may take, a field or the headers of a file


@dataclass
class Limits:
    """size: bytes of a request, and of its files unpacked. queue: requests in the house. seconds: for one of them."""

    size: int = 2**30
    queue: int = 16
    seconds: float = 600.0


class Service:
    """The routes' state. token: what requests must bear, None for none. scratch: where files lie while they are worked
    on, by default the system's temporary folder. log: hears a line for every request, without anything of it; warn:
    one for every failure of the server's own."""

    def __init__(
        self,
        desk: Desk,
        limits: Limits | None = None,
        token: str | None = None,
        scratch: Path | None = None,
        log: Callable[[str], None] = lambda line: None,
        warn: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.desk, self.limits, self.log, self.warn = desk, limits or Limits(), log, warn
        self.failed: BaseException | None = None  # why no model could be loaded
        self.stop: Callable[[], None] = lambda: None  # called where there is nothing to serve
        self._token, self._scratch = token, scratch or Path(tempfile.gettempdir())
        self._inside = 0
        self._tickets: set[Ticket] = set()
        self._last: deque[float] = deque([1.0], maxlen=20)  # seconds that the last requests took

    def app(self) -> Starlette:
        routes = [
            Route("/v1/synth", self._logged(self.synth), methods=["POST"]),
            Route("/v1/inspect", self._logged(self.inspect), methods=["POST"]),
            Route("/health", self.health),
            Route("/ready", self.readiness),
            Route("/metrics", self.metrics),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _told}, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Models are loaded while /health answers already; at the end, what still runs is given up."""
        warming = asyncio.create_task(asyncio.to_thread(self.desk.warm))
        warming.add_done_callback(self._warmed)
        yield
        self.desk.closing = True
        for ticket in self._tickets:
            ticket.given_up.set()
        with suppress(Exception):
            await warming
        await asyncio.to_thread(self.desk.close)

    def _warmed(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self.failed = error
            self.stop()

    # ------------------------------------------------------------------------------------------------- answers

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "alive", "version": copedit_rt.__version__})

    async def readiness(self, request: Request) -> Response:
        ready = self.desk.ready and not self.desk.closing
        said = "ready" if ready else "closing" if self.desk.closing else "models are being loaded"
        return JSONResponse({"status": said, "models": self.desk.models}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        if not self._allowed(request):
            return _error("a bearer token is needed, and this is not it", 401)
        return Response(self.desk.counts.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def synth(self, request: Request) -> Response:
        def answer(folder: Path) -> Response:
            files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
            if "multipart/mixed" in request.headers.get("accept", ""):
                return _mixed(files)
            return Response(_zipped(files), media_type="application/zip")

        return await self._serve(request, self.desk.synth, answer)

    async def inspect(self, request: Request) -> Response:
        return await self._serve(request, self.desk.inspect, lambda report: JSONResponse(finite(report)))

    # ------------------------------------------------------------------------------------------------ requests

    def _logged(self, serve: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Counts a request and says how it ended, whatever happens; errors become a sentence."""
        counts = self.desk.counts

        async def logged(request: Request) -> Response:
            start, path, mark = monotonic(), request.url.path, secrets.token_hex(4)
            try:
                response = await serve(request)
            except Refused as error:
                await _drain(request)
                response = _error(str(error), error.status, error.after)
            except HTTPException as error:
                response = await _told(request, error)
            except Exception as error:
                counts.failures.labels(type(error.__cause__ or error).__name__).inc()
                self.warn(f"copedit: {mark} failed: {where(error)}")
                response = _error(f"this server failed; its log says where, by the mark {mark}", 500)
            seconds = monotonic() - start
            counts.requests.labels(path, str(response.status_code)).inc()
            counts.seconds.labels(path).observe(seconds)
            self.log(f"{mark} {request.method} {path} {response.status_code} {seconds:.3f} s")
            return response

        return logged

    async def _serve(
        self, request: Request, work: Callable[[Asked, Ticket], Any], answer: Callable[[Any], Response]
    ) -> Response:
        """Take a request in, have it worked on, and answer; its folder is gone when its thread has ended, too."""
        self._admit(request)
        ticket, stack = Ticket(monotonic() + self.limits.seconds), ExitStack()
        self._enter(ticket, 1)
        loop, work_done = asyncio.get_running_loop(), None
        try:
            folder = stack.enter_context(scratch_folder(self._scratch))
            try:
                asked = await self._read(request, folder, ticket)
                ticket.entered = monotonic()
                work_done = self.desk.submit(work, asked, ticket)
                result = await self._watch(request, asyncio.wrap_future(work_done), ticket)
                self._last.append(monotonic() - ticket.entered)
                return await asyncio.to_thread(answer, result)
            except Refused as error:
                raise Refused(public(error, folder), error.status, error.after) from error
            except Fault:
                raise
            except CopeditError as error:
                raise Refused(public(error, folder), 422) from error
        finally:
            ticket.given_up.set()

            def leave(*done: object) -> None:
                stack.close()
                with suppress(RuntimeError):  # the loop may have ended
                    loop.call_soon_threadsafe(self._enter, ticket, -1)

            if work_done:
                work_done.add_done_callback(leave)
            else:
                leave()

    def _enter(self, ticket: Ticket, step: int) -> None:
        """A request that comes in, 1, or has left, -1."""
        self._inside += step
        self.desk.counts.queue.set(self._inside)
        (self._tickets.add if step > 0 else self._tickets.discard)(ticket)

    def _allowed(self, request: Request) -> bool:
        given = request.headers.get("authorization", "")
        return self._token is None or hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode())

    def _admit(self, request: Request) -> None:
        """Refused for a stranger, a request that is too large, and where there is no room."""
        if not self._allowed(request):
            raise Refused("a bearer token is needed, and this is not it", 401)
        if not self.desk.ready or self.desk.closing:
            raise Refused("this server is not ready; try again", 503, 5)
        if self._inside >= self.limits.queue:
            wait = math.ceil(statistics.fmean(self._last) * self._inside / 2)
            raise Refused(f"{self._inside} requests wait already; try again later", 503, min(max(wait, 1), 600))
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.limits.size:
            raise _too_large(self.limits.size)
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise Refused("expected multipart/form-data, as curl -F sends it", 415)

    async def _read(self, request: Request, folder: Path, ticket: Ticket) -> Asked:
        """The request's fields, with its files in its folder."""
        with self.desk.counts.stage("upload"):
            try:
                async with asyncio.timeout(ticket.until - monotonic()):
                    body = _Body(request, self.limits.size)
                    limited = Request(request.scope, body.receive)
                    async with limited.form(max_files=MOST_FILES, max_fields=MOST_FIELDS, max_part_size=_FORM) as form:
                        if not body.whole:
                            raise Refused("the form ends before its last boundary; send it again")
                        fields: dict[str, str] = {}
                        files = []
                        for key, value in form.multi_items():
                            if isinstance(value, UploadFile):
                                files.append((key, value.filename or "", value.file))
                            elif key in fields:
                                raise Refused(f"the field {key[:40]!r} was sent twice; send it once")
                            else:
                                fields[key] = value
                        asked = read_fields(fields, folder, self.desk.models)
                        await asyncio.to_thread(keep_files, asked, files, self.limits.size)
                        return asked
            except TimeoutError as error:
                raise Refused("the request did not come in time", 408) from error
            except ClientDisconnect as error:
                raise Refused("the client went away", 499) from error

    async def _watch(self, request: Request, task: asyncio.Future[Any], ticket: Ticket) -> Any:
        """The result; Refused where the time is up, given up where nobody waits any more."""
        gone = asyncio.create_task(_gone(request))
        try:
            left = max(ticket.until - monotonic(), 0)
            await asyncio.wait({task, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            task.cancel()  # one that waits is dropped, one that runs sees its ticket
            if gone.done():
                raise Refused("the client went away", 499)
            raise Refused("it took longer than this server allows; ask for fewer steps or samples", 504)
        finally:
            gone.cancel()


class _Body:
    """A request's body, which ends where more comes than `limit` bytes. whole: a form up to its last boundary."""

    def __init__(self, request: Request, limit: int) -> None:
        self._request, self._limit, self._left, self._end = request, limit, limit, b""
        named = re.search(r'boundary="?([^";,]+)', request.headers.get("content-type", ""))
        self._last = f"--{named[1].strip() if named else ''}--".encode()

    async def receive(self) -> Any:
        message = await self._request.receive()
        piece = message.get("body", b"")
        self._left -= len(piece)
        if self._left < 0:
            raise _too_large(self._limit)
        self._end = (self._end + piece)[-200:]
        self._request.state.received = message["type"] == "http.request" and not message.get("more_body")
        return message

    @property
    def whole(self) -> bool:
        return self._end.rstrip(b"\r\n").endswith(self._last)


def _too_large(limit: int) -> Refused:
    return Refused(f"the request is larger than the {limit / 2**20:.0f} MiB that this server takes", 413)


async def _drain(request: Request) -> None:
    """Read what else comes of a request that is refused, within reason: who still sends does not hear an answer.

    A second without anything is the end.
    """
    if getattr(request.state, "received", False) or "100-continue" in request.headers.get("expect", ""):
        return
    left = _DRAINED
    with suppress(TimeoutError):
        async with asyncio.timeout(10):
            while left > 0 and (message := await asyncio.wait_for(request.receive(), 1))["type"] == "http.request":
                left -= len(message.get("body", b""))
                if not message.get("more_body"):
                    return


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(text: str, status: int, after: int | None = None) -> Response:
    headers = {"Retry-After": str(after)} if after is not None else {}
    headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse({"error": text}, status, headers=headers)


async def _told(request: Request, error: Exception) -> Response:
    """What Starlette refuses by itself: an unknown path or method, a body that is no form."""
    assert isinstance(error, HTTPException)
    known = {404: "there is nothing here; see /v1/synth and /v1/inspect", 405: "this path takes another method"}
    text = known.get(error.status_code) or f"the form cannot be read: {error.detail}"
    return JSONResponse({"error": text}, error.status_code, headers=dict(error.headers or {}))


def _zipped(files: Mapping[str, bytes]) -> bytes:
    """Stored, as images and pictures are compressed already; the same files give the same zip."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as target:
        for name, content in files.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = 0o644 << 16
            target.writestr(member, content)
    return packed.getvalue()


def _mixed(files: Mapping[str, bytes]) -> Response:
    edge, kinds = secrets.token_hex(16), {".json": "application/json", ".png": "image/png", ".gz": "application/gzip"}
    pieces = []
    for name, content in files.items():
        kind = kinds.get(Path(name).suffix, "application/octet-stream")
        pieces += [
            f'--{edge}\r\nContent-Type: {kind}\r\nContent-Disposition: attachment; filename="{name}"\r\n\r\n'.encode(),
            content,
            b"\r\n",
        ]
    return Response(b"".join([*pieces, f"--{edge}--\r\n".encode()]), media_type=f"multipart/mixed; boundary={edge}")
