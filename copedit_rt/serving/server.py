"""The process of `copedit serve`: a port, signals, and an end in good order."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from copedit_rt.errors import CopeditError, failure
from copedit_rt.files import scratch_folder

try:
    import multipart  # noqa: F401
    import uvicorn

    from copedit_rt.serving.app import Limits, Service
    from copedit_rt.serving.desk import Desk
except ImportError as missing:
    raise CopeditError(f"copedit serve: {missing}; pip install 'copedit[serve]'") from missing


def serve(
    *,
    host: str,
    port: int,
    models: list[str],
    devices: list[str],
    token: str | None,
    scratch: Path | None,
    limits: Limits,
    grace: int,
    say: Callable[[str], None],
    warn: Callable[[str], None],
    **options: Any,
) -> None:
    """Answer requests until SIGTERM or SIGINT; then finish what is being worked on, within `grace` seconds.

    port: 0 for a free one, which is said. scratch: for all files of requests, by default the system's temporary folder.
    say: hears of every request; warn: what goes wrong. options: engine, dtype and max_memory of `Models`. Raises
    CopeditError where the port cannot be had or `scratch` be written, and for models and devices as `Synthesizer.load`
    does.
    """
    say, warn = _careful(say), _careful(warn)
    open_scratch(scratch)
    desk = Desk(models, devices, limit=limits.size, remark=lambda text: say(f"copedit: {text}"), **options)
    service = Service(desk, limits, token, scratch, say, warn)
    if token is None and not _own(host):
        warn(f"copedit: {host} can be reached from other machines, and no token is set: anybody there may use this")
    listening = _listen(host, port)
    config = uvicorn.Config(
        service.app(),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=grace,
        h11_max_incomplete_event_size=1 << 16,
    )
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # its tracebacks would quote requests
    shown = f"[{host}]" if ":" in host else host
    say(f"copedit: http://{shown}:{listening.getsockname()[1]} serves {', '.join(desk.models)}")
    server = _Server(config, service)
    service.stop = partial(setattr, server, "should_exit", True)
    # uvicorn raises its signals again when it has ended: in good order, which is no error.
    before = {number: signal.signal(number, lambda *given: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if service.failed:
        raise failure("copedit serve", service.failed, "set --max-memory, or serve fewer models with --model")
    say("copedit: the server has ended")


class _Server(uvicorn.Server):
    """Says in /ready that it ends, as soon as it is told to."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.desk.closing = True
        super().handle_exit(sig, frame)


def _careful(tell: Callable[[str], None]) -> Callable[[str], None]:
    """The same where it can: a log on a full disk must not cost an answer."""

    def told(text: str) -> None:
        with suppress(OSError):
            tell(text)

    return told


def open_scratch(scratch: Path | None) -> None:
    """Uploads and all else go to `scratch`, and what a killed server left there is gone; CopeditError where it cannot
    be written."""
    try:
        if scratch:
            scratch.mkdir(parents=True, exist_ok=True)
            tempfile.tempdir = str(scratch.absolute())  # where Starlette puts what comes in
        with scratch_folder(Path(tempfile.gettempdir())):
            pass
    except (OSError, CopeditError) as error:
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        where = scratch or "the folder for temporary files"
        raise CopeditError(f"cannot write to {where} ({reason}); choose another folder with --scratch") from error


def _own(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CopeditError(f"cannot listen on {host}:{port} ({reason}); choose another --port or --host") from error
