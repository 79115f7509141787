"""A client of `copedit serve`: one call a study. Python's standard library alone."""

from __future__ import annotations

import http.client
import io
import json
import os
import secrets
import time
import urllib.parse
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from copedit_rt.errors import CopeditError

Files = Mapping[str, str | Path] | Iterable[str | Path]


class ServerError(CopeditError):
    """What a server answered instead of a result: its status, and its sentence."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[object, ...]:  # so that it comes back from another process
        return type(self), (str(self), self.status)


class Client:
    """Of the server at `address`, http://HOST:PORT; token: what it wants to hear, by default that of COPEDIT_TOKEN.

    seconds: how long to wait for an answer. tries: how often to ask a server that has no room, each time as long after
    as it says, at most a minute. Safe to use from several threads, each call has a connection of its own.
    """

    def __init__(self, address: str, token: str | None = None, *, seconds: float = 900.0, tries: int = 10) -> None:
        try:
            parts = urllib.parse.urlsplit(address)
            self._host, self._port = parts.hostname or "", parts.port
            self._host.encode("idna"), parts.path.encode("ascii")  # as they will be sent
        except ValueError:
            self._host = ""
        if not self._host or parts.scheme not in ("http", "https"):
            raise CopeditError(f"{address}: expected an address such as http://127.0.0.1:8080")
        self._https = parts.scheme == "https"
        self._base, self._seconds, self._tries = parts.path.rstrip("/"), seconds, tries
        self._token = (token if token is not None else os.environ.get("COPEDIT_TOKEN", "")).strip()
        if not (self._token.isascii() and self._token.isprintable()):  # not quoted: it is secret
            raise CopeditError("the token holds a line break or what is no ASCII; give one line of letters and digits")
        if tries < 1:
            raise CopeditError(f"tries {tries}: must be 1 or more")

    def synth(self, files: Files, output: str | Path | None = None, **fields: object) -> dict[str, bytes]:
        """What is missing from one study: {name: content} of images, sidecars and what else was asked for.

        files: {modality: file}, also {"sax": file}; or files that are known by their names, zips of them too. output: a
        folder to write them to. fields: steps=, seed=, samples=, solver=, detail=, target=, missing_slices=, resample=,
        select=, task=, model=, name=, preview=, as those of the command.

        Raises ServerError for what the server refuses, CopeditError where it cannot be reached or a file be read.
        """
        packed = self._post("/v1/synth", files, fields)
        try:
            with zipfile.ZipFile(io.BytesIO(packed)) as members:
                made = {name: members.read(name) for name in members.namelist()}
        except zipfile.BadZipFile as error:
            raise self._foreign() from error
        if output is not None:
            from copedit_rt.files import write_atomically

            for name, content in made.items():
                parts = (part for part in PurePosixPath(name).parts if part not in ("..", "/"))
                write_atomically(Path(output).joinpath(*parts), content)
        return made

    def inspect(self, files: Files, **fields: object) -> dict[str, Any]:
        """What `copedit inspect --json` says of the study. files, fields and errors are those of `synth`."""
        try:
            return json.loads(self._post("/v1/inspect", files, fields))
        except ValueError as error:
            raise self._foreign() from error

    def metrics(self) -> str:
        """What the server counts, in Prometheus's format."""
        status, content, _ = self._ask("GET", "/metrics")
        if status != 200:
            raise ServerError(_sentence(content, status), status)
        return content.decode()

    def ready(self, seconds: float = 10.0) -> bool:
        """Whether the server is there and its models are loaded, as it says within so many seconds."""
        try:
            return self._ask("GET", "/ready", seconds=seconds)[0] == 200
        except CopeditError:
            return False

    def wait(self, seconds: float = 120.0) -> None:
        """Until the server is ready. Raises CopeditError where it is not in time."""
        until = time.monotonic() + seconds
        while not self.ready(min(10.0, max(until - time.monotonic(), 0.1))):
            if time.monotonic() > until:
                raise CopeditError(f"http://{self._host}:{self._port} is not ready after {seconds:g} seconds")
            time.sleep(0.2)

    def _post(self, path: str, files: Files, fields: Mapping[str, object]) -> bytes:
        body, kind = _form(files, fields)
        for left in range(self._tries - 1, -1, -1):
            status, content, headers = self._ask("POST", path, body, {"Content-Type": kind})
            if status == 503 and left and "retry-after" in headers:
                after = headers["retry-after"]  # of a proxy it may be a date
                time.sleep(min(int(after), 60) if after.isdecimal() else 5)
                continue
            if status != 200:
                raise ServerError(_sentence(content, status), status)
            break
        return content

    def _ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        seconds: float | None = None,
    ) -> tuple[int, bytes, dict[str, str]]:
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=min(self._seconds, seconds or self._seconds))
        sent = {**(headers or {}), **({"Authorization": f"Bearer {self._token}"} if self._token else {})}
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # it may have answered before all was sent
                connection.request(method, self._base + path, body, sent)
            answer = connection.getresponse()
            return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
        except (OSError, http.client.HTTPException) as error:
            said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            where = f"{self._host}:{self._port}"
            raise CopeditError(f"no answer from {where} ({said}); is copedit serve running?") from error
        finally:
            connection.close()

    def _foreign(self) -> CopeditError:
        return CopeditError(f"what {self._host}:{self._port} answers is not of copedit serve; is a proxy in between?")


def _form(files: Files, fields: Mapping[str, object]) -> tuple[bytes, str]:
    """multipart/form-data and its Content-Type."""
    edge, pieces = secrets.token_hex(16), []
    for name, value in fields.items():
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            piece = f'--{edge}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'
            pieces.append(piece.encode(errors="replace"))
    pairs = files.items() if isinstance(files, Mapping) else (("file", path) for path in files)
    for key, path in pairs:
        name = Path(path).name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
        head = f'--{edge}\r\nContent-Disposition: form-data; name="{key}"; filename="{name}"\r\n'
        head += "Content-Type: application/octet-stream\r\n\r\n"
        try:
            pieces += [head.encode(errors="replace"), Path(path).read_bytes(), b"\r\n"]
        except OSError as error:
            raise CopeditError(f"cannot read {path}: {error.strerror or error}") from error
    return b"".join([*pieces, f"--{edge}--\r\n".encode()]), f"multipart/form-data; boundary={edge}"


def _sentence(content: bytes, status: int) -> str:
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {status} without a reason"
