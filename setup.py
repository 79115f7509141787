"""Packaging of CoPeDiT: four top-level packages, one console command."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Where each package lies. The folders have the plain names, the packages names of their own.
FOLDERS = {"copedit_kernels": "kernels", "copedit_rt": ".", "copedit_training": "training", "copedit_bench": "bench"}
packages = [
    package
    for name, folder in FOLDERS.items()
    for package in find_packages(folder, include=[name, f"{name}.*"])
]

# Read, not imported: importing the package would need torch at build time.
version = re.search(r'^__version__ = "(.+)"$', (ROOT / "copedit_rt/__init__.py").read_text("utf-8"), re.M)
if version is None:
    raise SystemExit('copedit_rt/__init__.py has no line of the form __version__ = "..."')

setup(
    name="copedit",
    version=version[1],
    description="Fills in the missing modalities or slices of an MRI study",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
    packages=packages,
    package_dir={name: f"{folder}/{name}" for name, folder in FOLDERS.items()},
    include_package_data=False,  # what is shipped is named here, not in a second file
    package_data={
        "copedit_rt": [
            "py.typed",
            "report/*.html",
            "report/*.js",
            "report/*.txt",
            "weights/**/*.json",
            "weights/**/*.safetensors",
            "weights/**/*.onnx",  # of make wheel; git has none
            "weights/**/*.md",
        ],
        "copedit_training": ["presets/*.toml"],
    },
    python_requires=">=3.11",
    # An extra cannot take a dependency away, so what computes is one: copedit[torch] or copedit[cpu].
    install_requires=[
        "einops",
        "numpy",
        "nibabel",
        "safetensors",
        "typer",
        "rich",
        "pillow",
    ],
    extras_require={
        "torch": [
            "torch>=2.11",
            "triton>=3.6; platform_system == 'Linux'",
            "scipy",  # for the demo's phantoms and scores; the runtime wants it for --resample only
        ],
        "cpu": ["onnxruntime"],  # without torch, for the ONNX files of make wheel or copedit export onnx
        "train": ["copedit[torch]", "monai", "tensorboard", "matplotlib", "scikit-learn"],
        "serve": ["starlette", "uvicorn", "python-multipart", "prometheus-client"],
        "triton": ["tritonclient[grpc,http]"],  # a client of Triton Inference Server
        "dicom": ["pydicom", "dcm2niix"],
        "fast": ["isal"],  # gzip several times as fast
        "export": ["copedit[torch]", "onnx", "onnxscript", "onnxruntime"],
        "openvino": ["openvino"],
        "tensorrt": ["copedit[torch]", "tensorrt"],
        "bench": ["copedit[torch]", "flash-attn", "xformers", "matplotlib"],
        # A builder that needs no GPU, for tests only.
        "tensorrt-rtx": [
            "onnxruntime-ep-nv-tensorrt-rtx-cu13; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
        "test": [
            "pytest",
            "hypothesis",
            "ruff",
            "mypy",
            "import-linter",
            "pytest-xdist",
            "torchmetrics",
            "tritonclient",
            "tensorrt-cu13-bindings; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
    },
    entry_points={
        "console_scripts": ["copedit = copedit_rt.cli:main"],
        # The commands of the packages above the runtime, which finds them by the name of this group.
        "copedit.commands": ["training = copedit_training.cli:app", "bench = copedit_bench.cli:app"],
    },
)
