import pytest
import torch

from copedit_rt import checkpoint
from copedit_training.stages import trainer
from tests.training.stages.tiny import smooth


@pytest.fixture(autouse=True)
def smooth_subjects(monkeypatch):
    monkeypatch.setattr(trainer, "phantom_images", smooth)


@pytest.fixture
def perceptual_weights(tmp_path):
    nets = pytest.importorskip("monai.networks.nets", reason="needs the extra `train`")
    torch.manual_seed(0)
    checkpoint.write_tensors(
        tmp_path / "net.safetensors", nets.ResNetFeatures("resnet10", pretrained=False).state_dict()
    )
    return tmp_path / "net.safetensors"
