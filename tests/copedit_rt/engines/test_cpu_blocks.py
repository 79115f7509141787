"""Packed blocks against the plain ones: every missing pattern, batch, network and type."""

import copy
from itertools import product

import pytest
import torch
from small import perturb
from torch import Tensor
from torch.nn.functional import silu

from copedit_rt.config import DenoiserConfig, DiffusionConfig, ModelConfig, TokenizerConfig
from copedit_rt.engines import cpu_blocks
from copedit_rt.engines.cpu_blocks import PackedBlock, _Packed, pack, packable
from copedit_rt.networks.denoiser import MDiT3D
from copedit_rt.networks.sampler import Plan, sample

TYPES = [torch.float32, torch.bfloat16]
STEPS = 3


def configuration(elements: int, image: tuple[int, int, int], patch: tuple[int, int, int]) -> ModelConfig:
    return ModelConfig(
        "tiny",
        "brain",
        tuple(f"e{i}" for i in range(elements)),
        image,
        TokenizerConfig(channels=(4, 4), strides=((2, 2, 2), (2, 2, 2)), latent_channels=3, prompt_dim=12),
        DenoiserConfig(width=64, heads=2, blocks=4, patch=patch),
        DiffusionConfig(steps=4),
    )


CONFIGS = {
    "brain": configuration(4, (16, 16, 8), (2, 2, 2)),
    "ixi": configuration(3, (16, 16, 8), (2, 2, 2)),
    "cardiac": configuration(4, (16, 16, 4), (1, 1, 1)),
}
CASES = [
    (name, pattern)
    for name, config in CONFIGS.items()
    for pattern in product((True, False), repeat=len(config.elements))
    if 0 < sum(pattern) < len(pattern)
]


@pytest.fixture(autouse=True)
def able(request: pytest.FixtureRequest) -> None:
    """Skips the types that this processor does not multiply."""
    dtype = request.node.callspec.params.get("dtype") if hasattr(request.node, "callspec") else None
    if not packable(dtype or torch.float32):
        pytest.skip(f"oneDNN does not multiply {dtype} here")


def network(config: ModelConfig, dtype: torch.dtype, **changes: object) -> MDiT3D:
    torch.manual_seed(0)
    config = ModelConfig.from_dict(config.to_dict() | {"denoiser": config.to_dict()["denoiser"] | changes})
    net = MDiT3D(config).eval().requires_grad_(False)
    perturb(net)
    for p in net.parameters():
        p.data = p.to(dtype)
    return net


def inputs(config: ModelConfig, batch: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    z = torch.randn(batch, len(config.elements), config.tokenizer.latent_channels, *config.latent)
    return z, torch.randn(batch, 3, config.tokenizer.prompt_dim)


def compare(net: MDiT3D, config: ModelConfig, observed: Tensor, dtype: torch.dtype) -> None:
    """The error of the packed plan against float64 is at most twice that of the plain one, and a rounding."""
    z, prompts = inputs(config, len(observed))
    lean = pack(copy.deepcopy(net))
    assert all(isinstance(block, PackedBlock) for block in lean.blocks)
    made = Plan(lean, config, STEPS, observed).run(z, prompts.to(dtype))
    plain = Plan(net, config, STEPS, observed).run(z, prompts.to(dtype))
    wide = copy.deepcopy(net).double()

    def exactly(x: Tensor, t: Tensor) -> Tensor:
        return wide(x, t, prompts.to(dtype).double(), observed)

    exact = sample(exactly, z.double(), observed, config.diffusion, STEPS)
    assert torch.equal(made[observed], z[observed])
    error, allowed = ((x.double() - exact).abs().max() for x in (made, plain))
    assert allowed > 0 and error <= 2 * allowed + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_every_missing_pattern(name: str, pattern: tuple[bool, ...], dtype: torch.dtype) -> None:
    config = CONFIGS[name]
    compare(network(config, dtype), config, torch.tensor([pattern]), dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "changes",
    [
        {"blocks": 3},
        {"injection": "within"},
        {"injection": "both"},
        {"prompts": "none"},
        {"prompts": "mask"},
        {"backbone": "dit3d"},
        {"backbone": "dit"},
    ],
    ids=str,
)
def test_every_network_on_a_batch_of_different_patterns(changes: dict, dtype: torch.dtype) -> None:
    observed = torch.tensor([[True, False, True, True], [False, True, False, False], [True, True, False, True]])
    compare(network(CONFIGS["brain"], dtype, **changes), CONFIGS["brain"], observed, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_what_follows_a_product_is_done_on_the_way(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, other = torch.randn(2, 3, 5, 24).to(dtype), torch.randn(2, 3, 5, 16).to(dtype)
    weight, bias = torch.randn(16, 24).to(dtype), torch.randn(16).to(dtype)
    layer = _Packed(weight, bias)
    exact = x.double() @ weight.double().T + bias.double()
    # A sum of n float32 products is within n roundings of the sum of their sizes.
    sums = 24 * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T + bias.abs()).max()
    for made, truth in (
        (layer(x), exact),
        (layer.silu(x), silu(exact)),
        (layer.times(x, other), exact * other.double()),
    ):
        assert made.dtype == dtype and made.shape == truth.shape
        rounding = torch.finfo(dtype).eps * truth.abs().max()
        assert (made.double() - truth).abs().max() <= sums * max(1, other.abs().max()) + rounding


def test_nothing_is_packed_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(CONFIGS["brain"], torch.float64)
    kinds = [type(block) for block in net.blocks]
    assert [type(block) for block in pack(net).blocks] == kinds, "float64"
    assert not packable(torch.float16)

    def gone(*_: object) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(cpu_blocks._Packed, "__init__", gone)
    packable.cache_clear()
    try:
        assert not packable(torch.float32)
        net = network(CONFIGS["brain"], torch.float32)
        assert [type(block) for block in pack(net).blocks] == kinds
    finally:
        packable.cache_clear()
