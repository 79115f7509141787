import pytest
import torch

from copedit_training.stages import trainer
from tests.training.methods.small import smooth


@pytest.fixture(autouse=True)
def smooth_subjects(monkeypatch):
    monkeypatch.setattr(trainer, "phantom_images", smooth)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
