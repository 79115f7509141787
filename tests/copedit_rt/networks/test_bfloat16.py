"""Convolutions in bfloat16 on a CPU are right on every processor, also on those that get some of them wrong."""

import dataclasses
import math
from contextlib import nullcontext

import pytest
import torch
from processors import Faulty
from torch import Tensor, nn

from copedit_rt.config import DenoiserConfig, ModelConfig, TokenizerConfig
from copedit_rt.engines.torch_engine import TorchEngine
from copedit_rt.networks.denoiser import build_denoiser
from copedit_rt.networks.tokenizer import Conv3d, ConvTranspose3d, CoPeVAE, feature_bytes

HALF, SINGLE = 2.0**-8, 2.0**-24  # the largest relative errors of rounding to bfloat16 and to float32
FORMATS = [torch.contiguous_format, torch.channels_last_3d]
# Layer, kernel, stride, extents of the input: the smaller side has the extent 1 along one axis or more.
CASES = [
    (Conv3d, 3, 2, (6, 6, 2)),
    (Conv3d, 4, 2, (6, 6, 2)),
    (Conv3d, 3, 2, (6, 6, 1)),
    (Conv3d, 3, 2, (2, 6, 6)),
    (Conv3d, 4, 2, (2, 6, 6)),
    (Conv3d, 3, 2, (1, 6, 6)),
    (Conv3d, 4, 2, (6, 3, 6)),
    (Conv3d, 4, 2, (2, 2, 3)),
    (Conv3d, (4, 4, 3), (2, 2, 1), (6, 6, 1)),
    (Conv3d, 3, 1, (5, 6, 1)),
    (Conv3d, 3, 1, (1, 6, 6)),
    (ConvTranspose3d, 4, 2, (3, 3, 1)),
    (ConvTranspose3d, 4, 2, (1, 3, 3)),
    (ConvTranspose3d, (4, 4, 3), (2, 2, 1), (3, 3, 1)),
]
CARDIAC = ModelConfig(
    "tiny-heart",
    "cardiac",
    ("slab0", "slab1", "slab2", "slab3"),
    (16, 16, 8),  # slabs of 8 slices, halved three times, as in the paper
    TokenizerConfig(
        channels=(8, 16, 32), residual_units=1, residual_channels=16, codes=32, prompt_channels=(8, 8), prompt_dim=16,
        contrast_dim=8,
    ),
    DenoiserConfig(width=32, heads=2, blocks=2, patch=(1, 1, 1)),
)  # fmt: skip
UNET = dataclasses.replace(
    CARDIAC,
    name="tiny-unet",
    task="brain",
    elements=("t1", "t2"),
    image=(32, 32, 32),
    denoiser=DenoiserConfig(width=96, backbone="unet"),
)


def everything(layer: nn.Module, x: Tensor, g: Tensor, autocast: bool = False) -> list[Tensor]:
    """Result, and the gradients of input, weight and bias."""
    x = x.clone().requires_grad_()  # keeps the layout
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.backward(g.to(y.dtype))
    return [z.detach() for z in (y, x.grad, layer.weight.grad, layer.bias.grad)]


def of(layer: nn.Module, dtype: torch.dtype, absolute: bool = False) -> nn.Module:
    kind = nn.ConvTranspose3d if isinstance(layer, ConvTranspose3d) else nn.Conv3d
    made = kind(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding).to(dtype)
    made.load_state_dict({name: x.abs() if absolute else x for name, x in layer.state_dict().items()})
    return made


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights"])
@pytest.mark.parametrize("layout", FORMATS, ids=["contiguous", "channels last"])
@pytest.mark.parametrize(("kind", "kernel", "stride", "extents"), CASES)
def test_layers_against_float64(kind, kernel, stride, extents, layout, autocast):
    """The error is that of rounding what comes out once, and of n float32 products and sums: n * 2^-24 of the sum of
    the magnitudes. Twice that sum's part, as the product is rounded, too."""
    torch.manual_seed(0)
    dtype = torch.float32 if autocast else torch.bfloat16
    layer, x = kind(16, 24, kernel, stride, 1).to(dtype), torch.randn(2, 16, *extents, dtype=dtype)
    layer, x = layer.to(memory_format=layout), x.contiguous(memory_format=layout)
    g = torch.randn(of(layer, dtype)(x).shape).bfloat16()
    exact = everything(of(layer, torch.float64), x.double(), g.double())
    sums = everything(of(layer, torch.float64, absolute=True), x.double().abs(), g.double().abs())
    with Faulty() as processor:
        found = everything(layer, x, g, autocast)
    assert processor.met == 0
    assert [z.dtype for z in found] == [torch.bfloat16, dtype, dtype, dtype]
    terms = max(24 * math.prod(layer.kernel_size) + 1, g[:, 0].numel())
    for a, b, s in zip(found, exact, sums, strict=True):
        rounding = HALF if a.dtype == torch.bfloat16 else SINGLE
        assert ((a.double() - b).abs() <= rounding * b.abs() + 2 * terms * SINGLE * s).all()


def test_the_faulty_processor_is_faulty():
    """Otherwise the tests here could not fail."""
    x = torch.randn(1, 8, 6, 6, 2)
    for layer, given in ((nn.Conv3d(8, 8, 4, 2, 1), x), (nn.ConvTranspose3d(8, 8, 4, 2, 1), x[..., :1])):
        g = torch.ones_like(layer(given))
        with Faulty() as processor:
            low = everything(layer, given, g, autocast=True), everything(layer.bfloat16(), given.bfloat16(), g)
            wide = everything(layer.float(), given, g)
        assert processor.met == 4 and all(z.isnan().all() for found in low for z in found)
        assert all(z.isfinite().all() for z in wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "kernel", "stride", "extents"), CASES)
def test_other_types_are_torchs_own(kind, kernel, stride, extents, dtype):
    layer, x = kind(8, 8, kernel, stride, 1).to(dtype), torch.randn(2, 8, *extents, dtype=dtype)
    plain = of(layer, dtype)
    g = torch.randn(plain(x).shape, dtype=dtype)
    for a, b in zip(everything(layer, x, g), everything(plain, x, g), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [Conv3d, ConvTranspose3d])
def test_an_exported_graph_holds_one_convolution(kind):
    layer, x = kind(8, 8, 4, 2, 1).bfloat16(), torch.randn(1, 8, 6, 6, 2 if kind is Conv3d else 1).bfloat16()
    ours, plain = (
        [str(n.target) for n in torch.export.export(m, (x,)).graph.nodes] for m in (layer, of(layer, x.dtype))
    )
    assert ours == plain and sum("conv" in name for name in ours) == 1


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights"])
def test_the_cardiac_tokenizer_is_near_float32(autocast):
    """A slab's latent has depth 1. Of the 10 layers on the way each rounds weights and result."""
    torch.manual_seed(0)
    vae = CoPeVAE(CARDIAC.tokenizer, 4).eval()
    x = torch.rand(1, 4, 1, *CARDIAC.image)
    with torch.no_grad():
        z = vae.encode(x)
        exact = vae.prompts_of_each(z), vae.decode(z, joint=True), vae.decode(z[:, :1], joint=True)
        if not autocast:
            vae.encoder.bfloat16(), vae.decoder.bfloat16()
        with Faulty() as processor, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            latents = vae.encode(x)
            prompts = vae.prompts_of_each(latents if autocast else z)
            found = prompts, vae.decode(z, joint=True), vae.decode(z[:, :1], joint=True)
            layers, one = vae.encoder.layers(), x[0, :1].to(vae.encoder.out.weight.dtype)
            slabs = vae.encode(x, feature_bytes(layers, one, 1))  # a row of latents at a time
    assert z.shape[-1] == 1 and latents.dtype == torch.bfloat16 and processor.met == 0
    for a, b in zip((latents, slabs, *found), (z, z, *exact), strict=True):
        assert a.isfinite().all() and (a.float() - b).norm() < 10 * 2 * HALF * b.norm()


def on_faulty(graph: torch.fx.GraphModule, _: list[Tensor]):
    """A backend of torch.compile: the graph as it is, on the faulty processor."""

    def run(*given: Tensor):
        with Faulty():
            return graph(*given)

    return run


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_through_the_tokenizer(compiled):
    """Those of the weights, under autocast, against float32. Twice the layers, as there and back."""
    torch.manual_seed(0)
    vae, x, gradients = CoPeVAE(CARDIAC.tokenizer, 4), torch.rand(1, 4, 1, *CARDIAC.image), []
    weights = [*vae.encoder.parameters(), *vae.decoder.parameters()]

    def path(x: Tensor) -> Tensor:
        return vae.decode(vae.encode(x), joint=True)

    for autocast in (False, True):
        run = torch.compile(path, backend=on_faulty, fullgraph=True) if compiled else path
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), nullcontext() if compiled else Faulty():
            y = run(x)
        with Faulty():
            gradients.append(torch.autograd.grad((y.float() - x).square().mean(), weights))
    exact, found = (torch.cat([g.flatten() for g in one]) for one in gradients)
    assert found.isfinite().all() and (found - exact).norm() < 2 * 20 * 2 * HALF * exact.norm()


def test_a_unet_on_a_cpu_is_computed_in_float32():
    """Latents of 4 are halved twice, so that MONAI's convolutions end in extents of 1."""
    pytest.importorskip("monai", reason="the UNet baseline needs the extra `train`")
    torch.manual_seed(0)
    net, vae = build_denoiser(UNET).eval(), CoPeVAE(UNET.tokenizer, 2)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    z, t, prompts = torch.randn(1, 2, 8, 4, 4, 4), torch.tensor([7]), torch.randn(1, 3, 16)
    observed = torch.tensor([[True, False]])
    with torch.no_grad(), Faulty() as processor:
        exact = net(z, t, prompts, observed)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(net(z, t, prompts, observed), exact)
        engine = TorchEngine(UNET, vae, net, torch.device("cpu"), dtype=torch.bfloat16)
        found = engine.sample(z.numpy(), prompts.numpy(), observed.numpy(), 2, "ddim")
    assert processor.met == 0 and exact.std() > 0.01 and math.isfinite(found.sum())
    assert engine.precision == "float32" and engine.tokenizer.encoder.out.weight.dtype == torch.bfloat16
