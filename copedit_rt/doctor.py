"""What is installed: versions, devices, kernels in use, models, and what each extra still needs.

Nothing here fails because something is missing: that is what it reports.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import sys
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from copedit_rt import __version__
from copedit_rt.engines.engine import ENGINES, TORCHLESS

if TYPE_CHECKING:
    from rich.console import RenderableType

DISTRIBUTION = "copedit"
# What each extra adds, should the installed metadata not tell (a bare checkout on the path).
EXTRAS = {
    "torch": ["torch", "triton", "scipy"],
    "cpu": ["onnxruntime"],
    "dicom": ["pydicom", "dcm2niix"],
    "fast": ["isal"],
    "triton": ["tritonclient"],
    "train": ["monai", "tensorboard", "matplotlib", "scikit-learn"],
    "serve": ["starlette", "uvicorn", "python-multipart", "prometheus-client"],
    "export": ["onnx", "onnxscript", "onnxruntime"],
    "openvino": ["openvino"],
    "tensorrt": ["tensorrt"],
    "tensorrt-rtx": ["onnxruntime-ep-nv-tensorrt-rtx-cu13"],
    "bench": ["flash-attn", "xformers", "matplotlib"],
}
RUNTIME = ["torch", "triton", "einops", "numpy", "scipy", "nibabel", "safetensors", "typer", "rich", "pillow"]


def diagnose() -> dict[str, Any]:
    """JSON-able: copedit, python, platform, packages, devices, bfloat16, kernels, models, extras, problems."""
    problems: list[str] = []
    report: dict[str, Any] = {
        "copedit": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: version(name) for name in RUNTIME},
        "devices": _devices(problems),
        "bfloat16": _bfloat16(problems),
        "kernels": _kernels(problems),
        "engines": {name: version(name) for name in ENGINES},
        "models": _models(problems),
        "extras": _extras(),
    }
    # Triton is only published for Linux; elsewhere the reference runs. ONNX Runtime or OpenVINO alone will do, too.
    spared = {"triton"} if platform.system() != "Linux" else set()
    if any(report["engines"][name] for name in TORCHLESS):
        spared |= {"torch", "triton", "einops", "scipy"} if not report["engines"]["torch"] else set()
    for name, found in report["packages"].items():
        if found is None and name not in spared:
            problems.append(f"{name} is not installed: {_pip([name])}")
    return report | {"problems": problems}


def version(name: str) -> str | None:
    """Version of an installed distribution, None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pip(requirements: list[str]) -> str:
    quoted = [f"'{r}'" if re.search(r"[<>=!~\[; ]", r) else r for r in requirements]
    return f"{sys.executable} -m pip install {' '.join(quoted)}"


def _devices(problems: list[str]) -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [{"device": "cpu", "name": platform.processor() or platform.machine()}]
    devices[0]["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if find_spec("torch") is None:
        return devices
    try:
        import torch

        devices[0]["threads"] = torch.get_num_threads()
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            devices.append(
                {
                    "device": f"cuda:{index}",
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_gib": round(total / 2**30, 1),
                    "free_gib": round(free / 2**30, 1),
                }
            )
    except Exception as error:  # a broken driver must not stop the report
        problems.append(f"torch cannot list the devices: {_first_line(error)}")
    return devices


# Kernel, stride and extents of 3-D convolutions, padded by 1: an ordinary one and some of which processors with AMX are
# known to get the strided ones of one result along an axis wrong (oneDNN in torch 2.13).
CONVOLUTIONS = [
    (3, 1, (6, 6, 4)),
    (4, 2, (8, 8, 4)),
    *((kernel, 2, extents) for kernel in (3, 4) for extents in ((8, 8, 2), (2, 8, 8))),
    (3, 2, (8, 8, 1)),
]
# Relative, of norms. Rounding results to bfloat16 is worth 2^-8 at most; a processor may round sums on the way, too.
# Faulty ones were off by more than 1.
BFLOAT16_ERROR = 2**-4


def _bfloat16(problems: list[str]) -> dict[str, Any]:
    """A product and convolutions in bfloat16 that this processor computes, against float32: "errors" by name, relative,
    None if not finite, and whether all are "right" (None without torch)."""
    if find_spec("torch") is None:
        return {"right": None, "errors": {}}
    try:
        errors = _bfloat16_errors()
    except Exception as error:
        problems.append(f"torch cannot compute in bfloat16 on this processor: {_first_line(error)}; use float32 there")
        return {"right": False, "errors": {}}
    wrong = [name for name, error in errors.items() if not error < BFLOAT16_ERROR]
    if wrong:
        problems.append(
            f"this processor gets bfloat16 wrong with torch {version('torch')} ({', '.join(wrong)}): "
            "use --dtype float32 on it, or set ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"
        )
    finite = {name: error if math.isfinite(error) else None for name, error in errors.items()}
    return {"right": not wrong, "errors": finite}


def _bfloat16_errors() -> dict[str, float]:
    import torch

    generator, found = torch.Generator().manual_seed(0), {}

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).bfloat16()

    def error(compute: Any, x: Any, y: Any) -> float:
        exact = compute(x.float(), y.float())
        return float((compute(x, y).float() - exact).norm() / exact.norm())

    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        found["product 128x128"] = error(torch.matmul, draw(128, 128), draw(128, 128))
        for kernel, stride, extents in CONVOLUTIONS:
            x, weight = draw(1, 32, *extents), draw(32, 32, kernel, kernel, kernel)
            convolve = partial(torch.nn.functional.conv3d, stride=stride, padding=1)
            name = f"convolution of {'x'.join(map(str, extents))}, kernel {kernel}, stride {stride}"
            found[name] = error(convolve, x, weight)
            last = {"memory_format": torch.channels_last_3d}
            found[f"{name}, channels last"] = error(convolve, x.contiguous(**last), weight.contiguous(**last))
    return found


_IN_USE = {
    "auto": "Triton on CUDA devices, the PyTorch reference on the CPU",
    "reference": "the PyTorch reference on every device",
    "triton": "Triton on every device (on the CPU its interpreter)",
}


def _kernels(problems: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"COPEDIT_KERNELS": os.environ.get("COPEDIT_KERNELS"), "in_use": None}
    if find_spec("torch") is None:
        return found
    try:
        import copedit_kernels

        found["in_use"] = _IN_USE[copedit_kernels.implementation()]
    except Exception as error:
        problems.append(f"the kernels cannot be loaded: {_first_line(error)}")
    return found


def _models(problems: list[str]) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = []
    try:
        from copedit_rt import checkpoint

        for name in checkpoint.list_models():
            folder = checkpoint.locate(name)
            size = sum(file.stat().st_size for file in folder.iterdir())
            try:
                config = checkpoint.read_config(folder)
                models.append(
                    {
                        "name": name,
                        "task": config.task,
                        "elements": list(config.elements),
                        "mib": round(size / 2**20, 1),
                    }
                )
                for part in (checkpoint.TOKENIZER, checkpoint.DENOISER):
                    if not (folder / part).is_file():
                        problems.append(f"model {name} has no {part}: install copedit again")
            except Exception as error:
                problems.append(f"model {name}: {_first_line(error)}")
    except Exception as error:
        problems.append(f"the models cannot be listed: {_first_line(error)}")
    if not models:
        problems.append("no built-in model was found: install copedit again, or name a model folder with --model")
    return models


def _extras() -> dict[str, Any]:
    """Per extra: the packages it has and lacks, and the command that adds what it lacks."""
    wanted: dict[str, list[str]] = {}
    try:
        for line in importlib.metadata.requires(DISTRIBUTION) or []:
            if match := re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line):
                wanted.setdefault(match[1], []).append(line.split(";")[0].strip())
    except importlib.metadata.PackageNotFoundError:
        pass
    extras = {}
    for extra, requirements in (wanted or EXTRAS).items():
        names = {re.split(r"[\s<>=!~\[(]", r)[0]: r for r in requirements if not r.startswith(f"{DISTRIBUTION}[")}
        missing = [r for name, r in names.items() if version(name) is None]
        extras[extra] = {
            "installed": {name: version(name) for name in names if version(name) is not None},
            "missing": missing,
            "install": _pip(missing) if missing else None,
        }
    return extras


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def render(report: dict[str, Any]) -> RenderableType:
    """The report as Rich text."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def grid() -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        return table

    top = grid()
    top.add_row("copedit", report["copedit"])
    top.add_row("python", f"{report['python']}  {report['executable']}")
    top.add_row("platform", report["platform"])
    top.add_row("packages", ", ".join(f"{n} {v or 'missing'}" for n, v in report["packages"].items()))
    for device in report["devices"]:
        memory = f", {device['memory_gib']} GiB, {device['free_gib']} free" if "memory_gib" in device else ""
        cores = f", {device['cores']} cores" if "cores" in device else ""
        capability = f", compute capability {device['capability']}" if "capability" in device else ""
        top.add_row(device["device"], Text(f"{device['name']}{cores}{capability}{memory}"))
    if len(report["devices"]) == 1:
        top.add_row("cuda", "no CUDA device: everything runs on the CPU")
    if report["bfloat16"]["errors"]:
        right, count = report["bfloat16"]["right"], len(report["bfloat16"]["errors"]) - 1
        top.add_row("bfloat16", f"right here (1 product, {count} convolutions)" if right else "wrong here, see below")
    setting = report["kernels"]["COPEDIT_KERNELS"]
    top.add_row(
        "kernels",
        f"{report['kernels']['in_use'] or 'none'} (COPEDIT_KERNELS {'not set' if setting is None else setting})",
    )
    for name, found in report["engines"].items():
        top.add_row("engine", f"{name} {found or 'not installed'}")
    for model in report["models"]:
        top.add_row("model", f"{model['name']}: {model['task']}, {' '.join(model['elements'])}, {model['mib']} MiB")
    for extra, state in report["extras"].items():
        if state["missing"]:
            top.add_row(f"extra {extra}", Text(f"missing {', '.join(state['missing'])}\n{state['install']}"))
        else:
            top.add_row(f"extra {extra}", "complete")
    lines: list[RenderableType] = [top]
    lines += [Text(f"! {problem}", style="red") for problem in report["problems"]]
    return Group(*lines)
