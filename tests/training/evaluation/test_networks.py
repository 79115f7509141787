"""Feature networks from published weights: random weights under the published names."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from copedit_rt import checkpoint
from copedit_rt.cli import app
from copedit_rt.errors import CopeditError
from copedit_training.evaluation.compare import Pair
from copedit_training.evaluation.features import Networks, load_network
from copedit_training.evaluation.networks import I3D, Inception, MedicalNet, convert, resnet_of

CPU = torch.device("cpu")


def stirred(net):
    """With statistics and weights that are not those of the start."""
    torch.manual_seed(0)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 2)
    return net.eval()


def weights_of(net):
    return sum(p.numel() for p in net.parameters())


def test_sizes_are_the_published_ones():
    with torch.device("meta"):
        inception, i3d = weights_of(Inception()), weights_of(I3D())
    auxiliary = 768 * 128 + 2 * 128 + 128 * 768 * 25 + 2 * 768 + 768 * 1000 + 1000
    assert inception + auxiliary + 2048 * 1000 + 1000 == 27_161_264, "as torchvision counts its own"
    assert i3d + 1024 * 400 + 400 == 12_697_264


def test_inception_is_torchvisions(tmp_path):
    models = pytest.importorskip("torchvision.models", reason="compared where it is installed")
    theirs = stirred(models.inception_v3(weights=None, init_weights=False))
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    convert("inception", tmp_path / "weights.pth", tmp_path / "out.pt")
    x = torch.rand(2, 3, 80, 96)
    theirs.fc = nn.Identity()
    with torch.no_grad():
        wanted = theirs(2 * nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1)
        assert torch.equal(load_network(tmp_path / "out.pt", "--fid-network", CPU)(x), wanted)


@torch.no_grad()
def test_inception_converts_and_takes_slices_of_any_size(tmp_path):
    net = stirred(Inception())
    spare = {"fc.weight": torch.zeros(1000, 2048), "AuxLogits.fc.bias": torch.zeros(1000)}
    torch.save(net.state_dict() | spare, tmp_path / "weights.pth")
    said = CliRunner().invoke(app, ["network", "inception", f"{tmp_path}/weights.pth", "-o", f"{tmp_path}/out.pt"])
    assert said.exit_code == 0 and said.stdout.endswith("out.pt: for --fid-network\n")
    script = load_network(tmp_path / "out.pt", "--fid-network", CPU)
    for size in ((1, 3, 40, 60), (3, 3, 96, 32)):
        x = torch.rand(size)
        found = script(x)
        assert found.shape == (size[0], 2048) and torch.allclose(found, net(x), atol=1e-5) and found.std() > 0

    image = np.random.default_rng(0).random((12, 10, 6), dtype=np.float32)
    pair = Pair("model", "t1", image, image.copy(), slices=(1, 4))
    networks = Networks(fid=tmp_path / "out.pt")
    networks.add("1", pair, True)
    assert networks.summary()["1"]["model"]["fid"] == pytest.approx(0, abs=1e-3)


def test_a_block_joins_its_branches_in_their_order():
    net = stirred(Inception())
    block, x = net.Mixed_7b, torch.rand(1, 1280, 4, 4)
    with torch.no_grad():
        one, three = block.branch1x1(x), block.branch3x3_1(x)
        double = block.branch3x3dbl_2(block.branch3x3dbl_1(x))
        pooled = block.branch_pool(nn.functional.avg_pool2d(x, 3, 1, 1))
        parts = [one, block.branch3x3_2a(three), block.branch3x3_2b(three)]
        parts += [block.branch3x3dbl_3a(double), block.branch3x3dbl_3b(double), pooled]
        assert torch.equal(block(x), torch.cat(parts, 1))


@torch.no_grad()
def test_i3d_converts_and_takes_any_depth(tmp_path):
    net = stirred(I3D())
    checkpoint.write_tensors(
        tmp_path / "weights.safetensors", net.parts.state_dict() | {"logits.conv3d.bias": torch.ones(4)}
    )
    assert convert("i3d", tmp_path / "weights.safetensors", tmp_path / "out.pt") == "--fvd-network"
    script = load_network(tmp_path / "out.pt", "--fvd-network", CPU)
    for depth in (3, 6):
        x = torch.rand(1, 3, depth, 30, 40)
        found = script(x)
        assert found.shape == (1, 1024) and torch.allclose(found, net(x), atol=1e-5) and found.std() > 0


def test_padding_is_that_of_same():
    from copedit_training.evaluation.networks import _same

    for n in range(1, 12):
        for kernel, stride in ((3, 1), (3, 2), (7, 2), (2, 2), (1, 1)):
            padded = _same(torch.ones(1, 1, 5, 5, n), [1, 1, kernel], [1, 1, stride], 0.0)
            assert (padded.shape[-1] - kernel) // stride + 1 == -(-n // stride)
            row = padded[0, 0, 0].amax(0)
            before, behind = int(row.argmax()), padded.shape[-1] - n - int(row.argmax())
            assert behind - before in (0, 1)


@torch.no_grad()
def test_medicalnet_converts_whichever_resnet_it_is(tmp_path):
    pytest.importorskip("monai", reason="needs the extra `train`")
    net = stirred(MedicalNet("resnet10"))
    state = {f"module.{k}": x for k, x in net.net.state_dict().items()} | {"module.conv_seg.0.bias": torch.zeros(2)}
    torch.save({"state_dict": state}, tmp_path / "weights.pth")
    assert convert("medicalnet", tmp_path / "weights.pth", tmp_path / "out.pt") == "--fvd-network"
    script, x = load_network(tmp_path / "out.pt", "--fvd-network", CPU), torch.rand(2, 3, 20, 24, 40)
    found = script(x)
    assert found.shape == (2, 512) and torch.allclose(found, net(x), atol=1e-4)
    assert torch.allclose(script(0.5 * x + 0.2), found, atol=1e-2), "brightness and contrast do not count"
    for name in ("resnet18", "resnet34", "resnet50"):
        with torch.device("meta"):
            assert resnet_of(MedicalNet(name).net.state_dict()) == name


def test_what_are_no_weights_of_it_is_refused(tmp_path):
    state = Inception().state_dict()
    less, more, other = copy.copy(state), state | {"head.weight": torch.zeros(1)}, copy.copy(state)
    del less["Mixed_6a.branch3x3.conv.weight"]
    other["Mixed_6a.branch3x3.bn.bias"] = torch.zeros(3)
    for given, words in (
        (less, "Mixed_6a.branch3x3.conv.weight is missing"),
        (more, "head.weight is unknown"),
        (other, "Mixed_6a.branch3x3.bn.bias has another shape"),
    ):
        torch.save(given, tmp_path / "weights.pth")
        with pytest.raises(CopeditError, match=words):
            convert("inception", tmp_path / "weights.pth", tmp_path / "out.pt")
    torch.save({"a": np.float64}, tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("weights")
    alone = "not a file of weights alone; give the published weights$"  # nothing of weights_only, as torch advises
    for path, words in (("code.pth", alone), ("text.pth", alone), ("none.pth", "no such file")):
        with pytest.raises(CopeditError, match=words):
            convert("inception", tmp_path / path, tmp_path / "out.pt")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(CopeditError, match="holds no weights by name"):
        convert("inception", tmp_path / "list.pth", tmp_path / "out.pt")
    with pytest.raises(CopeditError, match="network 'vgg' is unknown; choose one of inception, i3d, medicalnet"):
        convert("vgg", tmp_path / "list.pth", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
