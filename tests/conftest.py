"""What every test shares: few threads, the skip of GPU tests, and the folder of real volumes."""

import os
from pathlib import Path

import pytest

# Read when torch loads. Idle threads sleep: where they spin, on a machine that is busy with something else,
# the model tests took six times as long.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with `brain/` and `cardiac/` studies of real subjects, which the repository does not contain."""
    folder = os.environ.get("COPEDIT_REAL_DATA")
    if not folder:
        pytest.skip("needs real studies: set COPEDIT_REAL_DATA to their folder")
    return Path(folder)
