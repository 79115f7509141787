"""What every test shares: few threads, the Triton interpreter, the skip of GPU tests, the folder of real volumes."""

import os
from pathlib import Path

import pytest

# Read when torch loads. Idle threads sleep: where they spin, on a machine that is busy with something else,
# the model tests took six times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

# Triton reads this once, when it is first imported: with it every kernel of the process is interpreted on the CPU,
# without it every kernel is compiled. So one process cannot do both. Without a GPU the test process interprets (the
# default COPEDIT_KERNELS=auto still takes the reference on CPU tensors, so other tests do not notice), and the compile
# gates, few but slow, run in processes of their own that drop the variable. With a GPU the test process compiles and
# launches, and one test runs the interpreter's files in a process that cannot see the GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with `brain/` and `cardiac/` studies of real subjects, which the repository does not contain."""
    folder = os.environ.get("COPEDIT_REAL_DATA")
    if not folder:
        pytest.skip("needs real studies: set COPEDIT_REAL_DATA to their folder")
    return Path(folder)
