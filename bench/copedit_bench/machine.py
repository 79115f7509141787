"""What a measurement was made on: device, driver, clocks, versions, commit."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import copedit_kernels
from copedit_rt.doctor import version

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "flash-attn", "xformers", "numpy", "monai", "onnxruntime", "openvino")
# Of a processor, by the names of Linux; what libraries of products and convolutions ask for.
FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
SOURCES = ("kernels", "copedit_rt", "training", ":(glob)bench/**/*.py")  # whose changes matter to a measurement
QUERIES = {
    "driver": "driver_version",
    "power_limit_w": "power.limit",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_max_mhz": "clocks.max.mem",
}


def describe(device: torch.device) -> dict[str, Any]:
    """JSON-able. What cannot be found out is None."""
    found: dict[str, Any] = {
        "device": device.type,
        "name": _processor(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "kernels": copedit_kernels.implementation(),
        "commit": _command("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "changed": bool(_command("git", "-C", str(ROOT), "status", "--porcelain", "--", *SOURCES)),
        "sources": sources(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    if device.type == "cpu":
        found |= processor()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **clocks(device),
        }
    return found


def processor() -> dict[str, Any]:
    """Cores that this process may use, memory, what the processor knows of FLAGS, and what torch uses of it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    known = set((_cpuinfo("flags") or "").split())
    return {
        "cores": cores,
        "memory_bytes": _memory(),
        "flags": [flag for flag in FLAGS if flag in known],
        "bfloat16": torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
    }


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def clocks(device: torch.device) -> dict[str, Any]:
    """Driver, power and clocks at this moment, by nvidia-smi."""
    fields = ",".join(QUERIES.values())
    identity = str(torch.cuda.get_device_properties(device).uuid)
    identity = identity if identity.startswith("GPU-") else f"GPU-{identity}"
    line = _command("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", f"--id={identity}")
    values = [value.strip() for value in line.split(",")] if line else [None] * len(QUERIES)
    return dict(zip(QUERIES, values, strict=False))


def sources() -> str:
    """Digest of the files in kernels/: names what was measured where there is no commit, or a changed one."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(name: str) -> str | None:
    """Of the first processor; None where Linux does not say it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)


def _command(*words: str) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
