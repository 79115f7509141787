"""Convolutions from and to one channel by their phases, and what lean layers do: torch's own results, to rounding."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from copedit_rt.networks import phases
from copedit_rt.networks.tokenizer import Conv3d, ConvTranspose3d, ResidualUnit, feature_bytes, lean

STRIDES = [((2, 2, 2), (4, 4, 4)), ((2, 2, 1), (4, 4, 3)), ((1, 2, 1), (3, 4, 3)), ((1, 1, 1), (3, 3, 3))]
EXTENTS = (6, 4, 8)


class Called(TorchDispatchMode):
    """The names of the operators that ran inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("stride", "kernel"), STRIDES)
@pytest.mark.parametrize("batch", [1, 3])
def test_from_one_channel_is_the_strided_convolution(stride, kernel, batch):
    x, weight, bias = random(batch, 1, *EXTENTS), random(5, 1, *kernel), random(5)
    for given in (bias, None):
        exact = F.conv3d(x, weight, given, stride, padding=1)
        torch.testing.assert_close(phases.from_one(x, weight, given, stride), exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("stride", "kernel"), STRIDES)
@pytest.mark.parametrize("batch", [1, 3])
def test_to_one_channel_is_the_transposed_convolution(stride, kernel, batch):
    x, weight, bias = random(batch, 5, 3, 4, 2), random(5, 1, *kernel), random(1)
    exact = F.conv_transpose3d(x, weight, bias, stride, padding=1)
    found = phases.to_one(x, weight, bias, stride)
    torch.testing.assert_close(found, exact, rtol=1e-13, atol=1e-13)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(phases.to_one(last, weight, bias, stride), exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("extents", [(6, 8, 4), (6, 4, 8)])
@pytest.mark.parametrize(("stride", "kernel"), STRIDES)
def test_the_shorter_of_width_and_depth_lies_first_in_memory(extents, stride, kernel):
    """And a second convolution copies nothing."""
    x, weight, bias = (t.float() for t in (random(1, 3, *extents), random(8, 3, *kernel), random(8)))
    found = phases.on_cpu(x, weight, bias, stride, (1, 1, 1))
    exact = F.conv3d(x.double(), weight.double(), bias.double(), stride, padding=1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    turned = found.shape[4] < found.shape[3]
    assert turned == (found.stride(2) < found.stride(4))
    again = phases.on_cpu(found, random(8, 8, 3, 3, 3).float(), bias, (1, 1, 1), (1, 1, 1))
    assert again.stride() == found.stride() and again.stride(1) == 1


def pair(make):
    """A layer, and the same one made lean."""
    torch.manual_seed(0)
    plain, quick = make(), make()
    quick.load_state_dict(plain.state_dict())
    lean(quick)
    return plain, quick.to(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(
    ("make", "channels", "wanted"),
    [
        (lambda: Conv3d(1, 8, (4, 4, 3), (2, 2, 1), 1), 1, "mkldnn_convolution"),
        (lambda: Conv3d(3, 8, 3, padding=1), 3, "mkldnn_convolution"),
        (lambda: ConvTranspose3d(8, 1, 4, 2, 1), 8, "flip"),
        (lambda: ConvTranspose3d(8, 6, 4, 2, 1), 8, None),
        (lambda: ResidualUnit(8, 8), 8, "add_"),
        (lambda: nn.Sequential(Conv3d(3, 8, 3, padding=1), nn.ReLU()), 3, "relu_"),
    ],
)
def test_lean_layers_give_the_plain_ones_results(make, channels, wanted):
    """Near those of float64, in inference; in another type, and with gradients, they are the plain layers."""
    plain, quick = pair(make)
    x = random(1, channels, 4, 6, 4).float()
    exact = plain.double()(x.double())
    plain.float()
    with torch.no_grad():
        with Called() as called:
            found = quick(x)
        assert wanted is None or wanted in called.names
        bound = 2 * (plain(x).double() - exact).abs().max() + 1e-6
        assert (found.double() - exact).abs().max() <= bound
        with Called() as called:
            torch.testing.assert_close(quick.double()(x.double()), exact)
        assert not {"mkldnn_convolution", "flip", "add_"} & set(called.names)
    quick.float()(x).sum().backward()
    assert all(p.grad is not None for p in quick.parameters())


def test_a_slab_with_an_odd_extent_keeps_its_stride():
    """On a GPU such a part is left to the library; here the condition alone is asked."""
    layer = Conv3d(1, 8, 4, 2, 1)
    assert layer._phased(torch.empty(1, 1, 4, 6, 8)) and not layer._phased(torch.empty(1, 1, 5, 6, 8))
    assert not Conv3d(2, 8, 4, 2, 1)._phased(torch.empty(1, 2, 4, 6, 8))
    assert not Conv3d(1, 8, 3, 1, 1)._phased(torch.empty(1, 1, 4, 6, 8))


def test_phases_count_as_memory():
    x = torch.empty(1, 2, 4, 4, 4)
    assert feature_bytes([ConvTranspose3d(2, 1, 4, 2, 1)], x, 8) == 4 * (2 * 64 + 2 * 512)
