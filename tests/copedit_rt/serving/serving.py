"""A server in a thread, or a process, and what is sent to it."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from copedit_rt.client import Client

EDGE = "edge"


@contextmanager
def served(models: list[Path], scratch: Path, **options: Any) -> Iterator[tuple[Any, int, list[str]]]:
    """A service in a thread of this process: itself, its port, its log. options of `Service` and of `Limits`."""
    import uvicorn

    from copedit_rt.serving.app import Limits, Service
    from copedit_rt.serving.desk import Desk
    from copedit_rt.serving.server import _listen

    token, log = options.pop("token", None), []
    heard = (log.append, log.append)
    limits = Limits(**options)
    scratch.mkdir(exist_ok=True)
    service = Service(Desk([str(m) for m in models], ["cpu"], limit=limits.size), limits, token, scratch, *heard)
    listening = _listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(service.app(), log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    port = listening.getsockname()[1]
    try:
        Client(f"http://127.0.0.1:{port}").wait(60)
        yield service, port, log
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@contextmanager
def process(*options: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The real command on a free port: its process and address."""
    command = [sys.executable, "-m", "copedit_rt", "serve", "--port", "0", *map(str, options)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    started = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)
    try:
        assert started.stderr is not None
        said = ""
        for line in started.stderr:
            said += line
            if found := re.search(r"http://\S+", line):
                break
        else:
            raise AssertionError(said)
        yield started, found[0]
    finally:
        if started.poll() is None:
            started.kill()
        started.communicate()


def part(name: str, content: bytes | str, file: str | None = None) -> bytes:
    head = f'--{EDGE}\r\nContent-Disposition: form-data; name="{name}"' + (f'; filename="{file}"' if file else "")
    return f"{head}\r\n\r\n".encode() + (content if isinstance(content, bytes) else content.encode()) + b"\r\n"


def post(port: int, path: str, *parts: bytes, end: bool = True, **headers: str) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON or bytes, headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = b"".join(parts) + (f"--{EDGE}--\r\n".encode() if end else b"")
    sent = {"Content-Type": f"multipart/form-data; boundary={EDGE}"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request("POST", path, body, sent)
        return answered(connection)
    finally:
        connection.close()


def get(port: int, path: str, **headers: str) -> tuple[int, Any, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path, headers=headers)
        return answered(connection)
    finally:
        connection.close()


def answered(connection: http.client.HTTPConnection) -> tuple[int, Any, dict[str, str]]:
    answer = connection.getresponse()
    content = answer.read()
    headers = {name.lower(): value for name, value in answer.getheaders()}
    kind = headers.get("content-type", "")
    return answer.status, json.loads(content) if kind == "application/json" else content, headers


def members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as packed:
        assert all(member.external_attr >> 16 == 0o644 for member in packed.infolist())
        return {name: packed.read(name) for name in packed.namelist()}


def zipped(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in files.items():
            target.writestr(name, content)
    return packed.getvalue()
