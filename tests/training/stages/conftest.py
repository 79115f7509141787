import pytest

from copedit_training.stages import trainer
from tests.training.stages.tiny import smooth


@pytest.fixture(autouse=True)
def smooth_subjects(monkeypatch):
    monkeypatch.setattr(trainer, "phantom_images", smooth)
