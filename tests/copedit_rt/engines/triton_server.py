"""A real Triton Inference Server on this machine: the binary in the wheel nvidia-pytriton.

It wants a folder of packages for its own Python, whose numpy is older than ours: COPEDIT_TRITON_PYTHON.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

STATUS = re.compile(r"^\| (\S+) +\| \d+ +\| (.*?) *\|$", re.M)  # of a model, in the server's log


def missing() -> str:
    """Why there is no server here; nothing where there is one."""
    if find_spec("pytriton") is None:
        return "needs the server of the wheel nvidia-pytriton: pip install --no-deps nvidia-pytriton==0.7.0"
    folder = Path(os.environ.get("COPEDIT_TRITON_PYTHON", ""))
    needed = ("numpy", "nibabel", "safetensors", "onnxruntime")
    if not all((folder / name).is_dir() for name in needed):
        return "needs COPEDIT_TRITON_PYTHON: a folder of pip install --target with numpy<2, " + ", ".join(needed[1:])
    return ""


@contextmanager
def serving(repository: Path, scratch: Path) -> Iterator[tuple[int, int, str]]:
    """Ports of HTTP and gRPC, and the log of the start; the server has loaded what it could."""
    (wheel,) = find_spec("pytriton").submodule_search_locations
    home = Path(wheel) / "tritonserver"
    backends = scratch / "backends"
    shutil.copytree(home / "backends/python", backends / "python")
    stub = home / f"python_backend_stubs/{sys.version_info[0]}.{sys.version_info[1]}/triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    http, grpc = (_free() for _ in range(2))
    command = [home / "bin/tritonserver", "--model-repository", repository, "--backend-directory", backends]
    for kind, port in (("http", http), ("grpc", grpc)):
        command += [f"--{kind}-address", "127.0.0.1", f"--{kind}-port", str(port)]
    command += ["--allow-metrics=false", "--exit-on-error=false"]
    own = {"LD_LIBRARY_PATH": str(home.parents[1] / "nvidia_pytriton.libs"), "OMP_NUM_THREADS": "1"}
    own["PYTHONPATH"] = os.environ["COPEDIT_TRITON_PYTHON"]
    log = scratch / "server.log"
    with log.open("w") as told:
        process = subprocess.Popen(list(map(str, command)), env=os.environ | own, stdout=told, stderr=told)
    try:
        until = time.monotonic() + 240
        while "Started HTTPService" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.5)
        yield http, grpc, log.read_text()
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
