"""CoPeVAE and MDiT3D against the design: sizes, costs, and what may depend on what."""

import math
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from small import UNEVEN as TINY
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from copedit_kernels import rotate
from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.networks.denoiser import MDiT3D, build_denoiser, rope_table
from copedit_rt.networks.tokenizer import CoPeVAE, feature_bytes, in_slabs

PRESETS = ("brain-brats", "brain-ixi", "cardiac", "demo-brain", "brain-2mm", "demo-cardiac")

BATCH, ELEMENTS = 2, 4


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def on_meta(config: ModelConfig) -> tuple[CoPeVAE, nn.Module]:
    with torch.device("meta"):
        return CoPeVAE(config.tokenizer, len(config.elements)), build_denoiser(config)


def flops(run) -> dict[str, int]:
    """Floating-point operations of run(), two a multiply-add, by operator name."""
    with FlopCounterMode(display=False) as counter:
        run()
    return {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}


def perturbed(module: nn.Module, only: tuple[str, ...] = ("",), seed: int = 0) -> nn.Module:
    """The module with noise added to the parameters named `only`...: a fresh one returns zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.startswith(only):
                scale = 0.5 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.1
                p += scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return module


def tiny_denoiser(only: tuple[str, ...] = ("",), **changes) -> MDiT3D:
    config = replace(TINY, denoiser=replace(TINY.denoiser, **changes))
    torch.manual_seed(0)
    net = MDiT3D(config).eval().double()
    perturbed(net, only)
    return net


def tiny_tokenizer() -> CoPeVAE:
    torch.manual_seed(0)
    tokenizer = CoPeVAE(TINY.tokenizer, ELEMENTS).eval().double()
    with torch.no_grad():  # residual units start as the identity
        for p in tokenizer.parameters():
            p += 0.02 * torch.randn_like(p)
    return tokenizer


def tiny_inputs(seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, t, prompts, observed."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(BATCH, ELEMENTS, 8, *TINY.latent, generator=generator, dtype=torch.float64)
    prompts = torch.randn(BATCH, 3, TINY.tokenizer.prompt_dim, generator=generator, dtype=torch.float64)
    return z, torch.tensor([499, 20]), prompts, torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]]).bool()


def differs(a: Tensor, b: Tensor) -> bool:
    return (a - b).abs().max().item() > 1e-3 * b.abs().max().item()


def same(a: Tensor, b: Tensor) -> bool:
    return (a - b).abs().max().item() <= 1e-6 * b.abs().max().item()


# Sizes and costs


def test_brain_parameter_counts() -> None:
    tokenizer, denoiser = on_meta(ModelConfig.preset("brain-brats"))
    prompts = parameters(tokenizer.prompt_encoders) + parameters(tokenizer.heads)
    assert round(parameters(tokenizer) / 1e6, 2) == 137.63
    assert round((parameters(tokenizer) - prompts) / 1e6, 2) == 133.63
    assert round(parameters(denoiser) / 1e6, 1) == 173.3


def test_cardiac_parameter_count() -> None:
    assert round(parameters(on_meta(ModelConfig.preset("cardiac"))[1]) / 1e6, 2) == 33.07


def test_denoiser_size_is_that_of_its_parts() -> None:
    """Biases in every Linear, two norms and six modulation chunks a block; embeddings are no parameters."""
    c, f, p, values = 768, 2048, 3 * 512, 8 * 8
    attention, mlp = (3 * c * c + 3 * c) + (c * c + c), (2 * f * c + 2 * f) + (f * c + c)
    block = (6 * c * c + 6 * c) + attention + mlp + 2 * c
    time = (256 * c + c) + (c * c + c)
    ends = (values * c + c) + (p * c + c) + (2 * c * c + 2 * c) + c + (c * values + values)
    assert parameters(on_meta(ModelConfig.preset("brain-brats"))[1]) == 16 * block + time + ends


@pytest.mark.parametrize("name", PRESETS)
def test_data_model(name: str) -> None:
    """Shapes of the one data model; 576 tokens an element in every paper preset."""
    config = ModelConfig.preset(name)
    tokenizer, denoiser = on_meta(config)
    m = len(config.elements)
    images = torch.empty(2, m, 1, *config.image, device="meta")
    observed = torch.ones(2, m, dtype=torch.bool, device="meta")
    z = tokenizer.encode(images)
    latent, tokens = {
        "brain-brats": ((8, 24, 24, 8), 576),
        "brain-ixi": ((8, 24, 24, 8), 576),
        "cardiac": ((8, 24, 24, 1), 576),
        "demo-brain": ((3, 48, 48, 32), 1152),
        "brain-2mm": ((3, 48, 56, 64), 2688),
        "demo-cardiac": ((3, 48, 48, 4), 144),
    }[name]
    assert z.shape == (2, m, *latent)
    assert math.prod(n // p for n, p in zip(config.latent, config.denoiser.patch, strict=True)) == tokens
    assert tokenizer.decode(z, joint=config.task == "cardiac").shape == images.shape
    prompts = torch.empty(2, 3, config.tokenizer.prompt_dim, device="meta")
    t = torch.zeros(2, dtype=torch.int64, device="meta")
    prior = torch.empty_like(z) if config.denoiser.prior else None
    assert denoiser(z, t, prompts, observed, prior=prior).shape == z.shape
    count, which, what = tokenizer.assess(prompts)
    assert (count.shape, which.shape) == ((2, m - 1), (2, m))
    assert what.shape == (2, config.tokenizer.contrast_dim)


def test_paper_presets() -> None:
    brats, ixi, cardiac = (ModelConfig.preset(name) for name in ("brain-brats", "brain-ixi", "cardiac"))
    assert brats.elements == ("t1", "t1ce", "t2", "flair") and ixi.elements == ("t1", "t2", "pd")
    assert brats.image == ixi.image == (192, 192, 64) and cardiac.image == (192, 192, 8)
    assert brats.tokenizer.channels == (256, 384, 512) and cardiac.tokenizer.channels == (32, 64, 128)
    for config in (brats, ixi, cardiac):
        assert config.tokenizer.codes == 8192 and config.tokenizer.compression == (8, 8, 8)
        assert (config.tokenizer.prompt_dim, config.tokenizer.contrast_dim) == (512, 128)
    assert (brats.diffusion.train_steps, cardiac.diffusion.train_steps) == (500, 500)


def test_flops_of_a_brain_step() -> None:
    config = ModelConfig.preset("brain-brats")
    denoiser = on_meta(config)[1]
    z = torch.empty(1, 4, 8, *config.latent, device="meta")
    t, prompts = torch.zeros(1, dtype=torch.int64, device="meta"), torch.empty(1, 3, 512, device="meta")
    observed = torch.ones(1, 4, dtype=torch.bool, device="meta")
    found = flops(lambda: denoiser(z, t, prompts, observed))
    linear = sum(n for op, n in found.items() if op in ("aten.addmm", "aten.mm"))
    attention = sum(found.values()) - linear
    across = 8 * 576 * 4 * 4 * 4 * 768  # blocks x tokens x m x m x (q k and p v, multiply and add) x width
    assert round(linear / 1e9) == 522
    assert round((attention - across) / 1e9) == 33
    assert attention - across == 8 * 4 * 576 * 576 * 4 * 768


def test_flops_of_one_volume() -> None:
    config = ModelConfig.preset("brain-brats")
    tokenizer = on_meta(config)[0]
    image = torch.empty(1, 1, 1, *config.image, device="meta")
    code = torch.empty(1, 1, 8, *config.latent, device="meta")
    assert round(sum(flops(lambda: tokenizer.encode(image)).values()) / 1e12, 1) == 8.2
    assert round(sum(flops(lambda: tokenizer.decode(code, joint=False)).values()) / 1e12, 1) == 8.2


# Tokenizer


def test_a_latent_depends_on_its_own_element_only() -> None:
    tokenizer = tiny_tokenizer()
    images = torch.rand(BATCH, ELEMENTS, 1, *TINY.image, dtype=torch.float64)
    z = tokenizer.encode(images)
    other = images.clone()
    other[:, [0, 1, 3]] = torch.rand_like(other[:, [0, 1, 3]])
    assert torch.equal(tokenizer.encode(other)[:, 2], z[:, 2])
    assert differs(tokenizer.encode(other)[:, 1], z[:, 1])
    order = [3, 1, 0, 2]
    torch.testing.assert_close(tokenizer.encode(images[:, order]), z[:, order])
    torch.testing.assert_close(tokenizer.encode(images[1:, 2:3]), z[1:, 2:3])


def test_prompts_average_the_observed_and_never_read_the_missing() -> None:
    tokenizer = tiny_tokenizer()
    z, _, _, observed = tiny_inputs()
    prompts = tokenizer.prompts(z, observed)
    assert prompts.shape == (BATCH, 3, TINY.tokenizer.prompt_dim)
    poisoned = z.masked_fill(~observed[..., None, None, None, None], math.nan)
    assert torch.equal(tokenizer.prompts(poisoned, observed), prompts)

    def alone(sample: int, element: int) -> Tensor:
        return tokenizer.prompts(z[sample : sample + 1], torch.arange(ELEMENTS)[None] == element)[0]

    torch.testing.assert_close(prompts[0], torch.stack([alone(0, i) for i in (0, 2, 3)]).mean(0))
    torch.testing.assert_close(prompts[1], alone(1, 2))
    assert differs(alone(0, 0), alone(0, 2))
    assert differs(prompts[:, 0], prompts[:, 1]) and differs(prompts[:, 1], prompts[:, 2])


def test_heads_read_one_prompt_each() -> None:
    tokenizer, prompts = tiny_tokenizer(), tiny_inputs()[2]
    before = tokenizer.assess(prompts)
    for i in range(3):
        changed = prompts.clone()
        changed[:, i] += 1
        after = tokenizer.assess(changed)
        assert [differs(a, b) for a, b in zip(after, before, strict=True)] == [j == i for j in range(3)]


def test_quantise_takes_the_nearest_code() -> None:
    tokenizer, z = tiny_tokenizer(), tiny_inputs()[0]
    codes, index = tokenizer.quantise(z)
    assert codes.shape == z.shape and index.shape == (BATCH, ELEMENTS, *TINY.latent)
    book = tokenizer.codebook
    for b, m, x, y, s in ((0, 0, 0, 0, 0), (0, 3, 1, 2, 1), (1, 2, 3, 3, 0), (1, 0, 2, 1, 1)):
        distance = (book - z[b, m, :, x, y, s]).square().sum(1)
        assert index[b, m, x, y, s] == distance.argmin()
        assert torch.equal(codes[b, m, :, x, y, s], book[distance.argmin()])
    again, index_again = tokenizer.quantise(codes)
    assert torch.equal(again, codes) and torch.equal(index_again, index)


def test_slabs_are_decoded_together_and_modalities_apart() -> None:
    tokenizer, codes = tiny_tokenizer(), tiny_inputs()[0]
    changed = codes.clone()
    changed[:, 0] += 1
    apart, together = (tokenizer.decode(codes, joint=joint) for joint in (False, True))
    assert torch.equal(tokenizer.decode(changed, joint=False)[:, 1:], apart[:, 1:])
    beside = tokenizer.decode(changed, joint=True)[:, 1]
    assert differs(beside[..., 0], together[:, 1, ..., 0]), "the seam does not see its neighbour"
    stack = torch.cat(list(codes.unbind(1)), dim=-1)[:, None]
    whole = tokenizer.decode(stack, joint=False)[:, 0]
    torch.testing.assert_close(torch.cat(list(together.unbind(1)), dim=-1), whole)


def striding(*strides: tuple[int, int, int]) -> CoPeVAE:
    """A tokenizer of two residual units a level with these strides."""
    torch.manual_seed(0)
    sizes = {"channels": (6, 10)[: len(strides)], "residual_units": 2, "residual_channels": 24}
    tokenizer = CoPeVAE(replace(TINY.tokenizer, strides=strides, **sizes), 4)
    return perturbed(tokenizer.eval().double().requires_grad_(False))


STRIDES = (((2, 2, 2), (2, 2, 2)), ((2, 2, 1),), ((1, 2, 2), (2, 1, 2)))


@pytest.mark.parametrize("strides", STRIDES, ids=str)
@pytest.mark.parametrize("height", [1, 3, 8, 13, 16, 64])
def test_slabs_are_exact(strides: tuple, height: int) -> None:
    tokenizer = striding(*strides)
    images = torch.rand(2, 1, 32, 8, 8, dtype=torch.float64)
    z = tokenizer.encoder(images)
    for net, x, whole in ((tokenizer.encoder, images, z), (tokenizer.decoder, z, tokenizer.decoder(z))):
        torch.testing.assert_close(in_slabs(net.layers(), x, height), whole, rtol=1e-12, atol=1e-12)


class Peak(TorchDispatchMode):
    """Bytes of the storages that lived at once, at most, of all tensors made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[int] = Counter()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.now += 0 if self.live[storage.data_ptr()] else storage.nbytes()
                self.live[storage.data_ptr()] += 1
                weakref.finalize(x, self.release, storage.data_ptr(), storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def release(self, place: int, size: int) -> None:
        self.live[place] -= 1
        self.now -= 0 if self.live[place] else size


@pytest.mark.parametrize("strides", STRIDES, ids=str)
def test_memory_stays_below_its_ceiling(strides: tuple) -> None:
    """Encoding and decoding give the same as without a ceiling, within it; less is refused."""
    tokenizer = striding(*strides)
    images = torch.rand(1, 2, 1, 64, 8, 8, dtype=torch.float64)
    codes = tokenizer.encode(images)
    for net, run, x in (
        (tokenizer.encoder, lambda limit: tokenizer.encode(images, limit), images[0, :1]),
        (tokenizer.decoder, lambda limit: tokenizer.decode(codes, False, limit), codes[0, :1]),
        (
            tokenizer.decoder,
            lambda limit: tokenizer.decode(codes, True, limit),
            torch.cat(list(codes[:1].unbind(1)), -1),
        ),
    ):
        whole = run(None)
        least, most = (feature_bytes(net.layers(), x, height) for height in (1, 64))
        assert least < 0.6 * most or net is tokenizer.encoder
        for limit in (most, (most + least) // 2, least):
            with Peak() as peak:
                out = run(limit)
            torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)
            ends = 8 * (images.numel() + codes.numel() + 2 * whole.numel())  # what is given and returned
            assert peak.most <= limit + ends, (peak.most, limit, ends)
            assert peak.most > limit / 4, "the estimate is far too high"
        with pytest.raises(CopeditError, match="max_memory of"):
            run(least // 2)


def test_normalise_is_per_channel_and_invertible() -> None:
    tokenizer, z = tiny_tokenizer(), tiny_inputs()[0]
    tokenizer.latent_mean.copy_(torch.arange(8))
    tokenizer.latent_std.copy_(torch.arange(1, 9))
    y = tokenizer.normalise(z)
    torch.testing.assert_close(y[1, 2, 5], (z[1, 2, 5] - 5) / 6)
    torch.testing.assert_close(tokenizer.denormalise(y), z)
    assert {"latent_mean", "latent_std"} <= set(tokenizer.state_dict())


def test_residual_units_add_to_what_they_get() -> None:
    """With their second convolution silenced, the signal still gets through."""
    tokenizer = tiny_tokenizer()
    for name, p in tokenizer.named_parameters():
        if "conv2" in name:
            p.detach().zero_()
    images = torch.rand(1, 1, 1, *TINY.image, dtype=torch.float64)
    z = tokenizer.encode(images)
    assert differs(tokenizer.encode(images.flip(3)), z)
    assert differs(tokenizer.decode(z.flip(3), joint=False), tokenizer.decode(z, joint=False))


def test_gradients_reach_the_whole_tokenizer() -> None:
    tokenizer = tiny_tokenizer().train()
    images = torch.rand(BATCH, ELEMENTS, 1, *TINY.image, dtype=torch.float64)
    observed = tiny_inputs()[3]
    z = tokenizer.encode(images)
    outputs = [tokenizer.decode(z, joint=False), *tokenizer.assess(tokenizer.prompts(z, observed))]
    torch.autograd.backward(outputs, [torch.randn_like(x) for x in outputs])
    for name, p in tokenizer.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.abs().max() > 0, name


# Denoiser


def test_a_fresh_denoiser_returns_zeros_and_its_blocks_nothing() -> None:
    net = tiny_denoiser(only=("nothing",))
    z, t, prompts, observed = tiny_inputs()
    assert torch.equal(net(z, t, prompts, observed), torch.zeros_like(z))
    x = torch.randn(BATCH, ELEMENTS, 32, 48, dtype=torch.float64)
    condition = torch.randn(BATCH, 48, dtype=torch.float64)
    for block in net.blocks:
        assert torch.equal(block(x, condition, None), x)
    out = tiny_denoiser()(z, t, prompts, observed)
    assert out.abs().mean() > 0.01 and out.isfinite().all()


def test_gradients_reach_the_whole_denoiser() -> None:
    net, (z, t, prompts, observed) = tiny_denoiser(), tiny_inputs()
    z.requires_grad_()
    prompts.requires_grad_()
    out = net(z, t, prompts, observed)
    out.backward(torch.randn_like(out))
    for name, p in [*net.named_parameters(), ("z", z), ("prompts", prompts)]:
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_samples_of_a_batch_are_independent() -> None:
    net, (z, t, prompts, observed) = tiny_denoiser(), tiny_inputs()
    out = net(z, t, prompts, observed)
    for i in range(BATCH):
        part = slice(i, i + 1)
        assert same(net(z[part], t[part], prompts[part], observed[part]), out[part])
    assert differs(net(z, t.flip(0), prompts, observed), out)


WITHIN, ACROSS = ("blocks.0.", "blocks.2.", "final."), ("blocks.1.", "blocks.3.", "final.")


def test_within_blocks_stay_in_an_element_and_across_blocks_at_a_token() -> None:
    """Only one kind of block is awake; the other is still the identity."""
    z, t, prompts, observed = tiny_inputs()
    changed = z.clone()
    changed[:, 1, :, 2:4, 0:2, 1] += 1  # element 1, one patch
    for only, reach in ((WITHIN, "element"), (ACROSS, "token")):
        net = tiny_denoiser(only)
        moved = (net(changed, t, prompts, observed) - net(z, t, prompts, observed)).abs().amax((0, 2)) > 1e-6
        expected = torch.zeros_like(moved)
        if reach == "element":
            expected[1] = True
        else:
            expected[:, 2:4, 0:2, 1] = True
        assert torch.equal(moved, expected), reach
    net = tiny_denoiser()
    assert ((net(changed, t, prompts, observed) - net(z, t, prompts, observed)).abs().amax((0, 2)) > 0).all()


@pytest.mark.parametrize(
    ("injection", "reached"), [("across", {ACROSS}), ("within", {WITHIN}), ("both", {WITHIN, ACROSS})]
)
def test_prompts_reach_the_blocks_of_their_injection(injection: str, reached: set[tuple[str, ...]]) -> None:
    """Time reaches every block and the final layer, prompts the blocks of the setting and nothing else."""
    z, t, prompts, observed = tiny_inputs()
    for only in (WITHIN, ACROSS, ("final",)):
        net = tiny_denoiser(only, injection=injection)
        out = net(z, t, prompts, observed)
        assert differs(net(z, t.flip(0), prompts, observed), out)
        assert torch.equal(net(z, t, prompts + 1, observed), out) != (only in reached)


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("full", {0, 1, 2}),
        ("no-count", {1, 2}),
        ("no-position", {0, 2}),
        ("no-contrast", {0, 1}),
        ("none", set()),
        ("mask", set()),
    ],
)
def test_prompt_settings_read_what_they_say(setting: str, read: set[int]) -> None:
    net, (z, t, prompts, observed) = tiny_denoiser(prompts=setting), tiny_inputs()
    out = net(z, t, prompts, observed)
    for i in range(3):
        changed = prompts.clone()
        changed[:, i] += 1
        assert differs(net(z, t, changed, observed), out) == (i in read)
    # No flag says what is missing, but for the ablation that replaces the prompts by a mask code.
    assert differs(net(z, t, prompts, observed.flip(0)), out) == (setting == "mask")
    if not read:
        assert torch.equal(net(z, t, None, observed), out)


def test_switches_change_the_size_of_the_condition_alone() -> None:
    width, prompt = TINY.denoiser.width, TINY.tokenizer.prompt_dim
    full = parameters(tiny_denoiser())
    assert parameters(tiny_denoiser(prompts="none")) == full - (3 * prompt + 1) * width
    assert parameters(tiny_denoiser(prompts="mask")) == full - (3 * prompt - ELEMENTS) * width
    assert parameters(tiny_denoiser(prompts="no-count")) == full - prompt * width
    assert parameters(tiny_denoiser(injection="both")) == full


def test_backbones_mix_what_they_say() -> None:
    z, t, prompts, observed = tiny_inputs()
    changed = z.clone()
    changed[:, 1, :, 0, 0, 0] += 1
    for backbone, patch in (("dit3d", (2, 2, 1)), ("dit", (2, 2, 1))):
        net = tiny_denoiser(backbone=backbone, patch=patch)
        out = net(z, t, prompts, observed)
        moved = (net(changed, t, prompts, observed) - out).abs().amax((0, 2)) > 1e-6
        assert out.shape == z.shape and moved[..., 0].all()
        assert moved[..., 1].any() == (backbone == "dit3d"), "dit has no way through the plane"
        assert differs(net(z, t, prompts + 1, observed), out)


@pytest.mark.parametrize("depth", [4, 1])
@pytest.mark.parametrize("setting", ["full", "none", "mask"])
def test_unet_backbone(depth: int, setting: str) -> None:
    """Halves the latent twice, but for the depth of a cardiac slab."""
    pytest.importorskip("monai", reason="the UNet baseline needs the extra `train`")
    choice = replace(TINY.denoiser, backbone="unet", patch=(2, 2, 1), prompts=setting)
    torch.manual_seed(0)
    net = perturbed(build_denoiser(replace(TINY, image=(16, 16, 4 * depth), denoiser=choice)))
    z = torch.randn(BATCH, ELEMENTS, 8, 4, 4, depth)
    _, t, prompts, observed = tiny_inputs()
    out = net(z, t, prompts.float(), observed)
    assert out.shape == z.shape and out.isfinite().all()
    assert differs(net(z, t.flip(0), prompts.float(), observed), out)
    assert differs(net(z, t, prompts.float() + 1, observed), out) == (setting == "full")
    assert differs(net(z, t, prompts.float(), observed.flip(0)), out) == (setting == "mask")


def test_identity_is_the_index_through_a_fixed_embedding() -> None:
    """Without the element embedding no element is told from another; the first within-block sees none."""
    z, t, prompts, observed = tiny_inputs()
    order = [2, 0, 3, 1]
    net = tiny_denoiser()
    assert "element" not in dict(net.named_parameters())
    assert differs(net(z[:, order], t, prompts, observed), net(z, t, prompts, observed)[:, order])
    first = tiny_denoiser(blocks=1)  # a single within-block: the embedding comes after it
    assert same(first(z[:, order], t, prompts, observed), first(z, t, prompts, observed)[:, order])
    net.element.zero_()
    assert same(net(z[:, order], t, prompts, observed), net(z, t, prompts, observed)[:, order])


def test_the_element_embedding_is_added_once() -> None:
    """All blocks asleep: four of them change nothing that two do not."""
    inputs = tiny_inputs()
    four, two = tiny_denoiser(("final",), blocks=4), tiny_denoiser(("final",), blocks=2)
    two.load_state_dict({name: x for name, x in four.state_dict().items() if name in two.state_dict()})
    assert same(four(*inputs), two(*inputs))
    four.element.zero_()
    assert differs(four(*inputs), two(*inputs))
    two.element.copy_(two.element[0].clone().expand_as(two.element))  # the same of all: a bias
    once = two(*inputs)
    two.embed.bias.data += two.element[0]
    two.element.zero_()
    assert same(two(*inputs), once), "added, not subtracted"


def test_only_attention_within_an_element_knows_positions() -> None:
    """Without the embedding at the input, across-blocks commute with a shift of tokens, within-blocks not."""
    z, t, prompts, observed = tiny_inputs()
    commutes = {}
    for only in (WITHIN, ACROSS):
        net = tiny_denoiser(only, patch=(1, 1, 1))
        assert "position" not in dict(net.named_parameters())
        net.position.zero_()
        rolled = net(z.roll(1, dims=3), t, prompts, observed)
        commutes[only] = same(rolled, net(z, t, prompts, observed).roll(1, dims=3))
    assert commutes == {WITHIN: False, ACROSS: True}


def test_elements_may_be_told_by_orthogonal_directions() -> None:
    config = replace(TINY, denoiser=replace(TINY.denoiser, identity="orthogonal"))
    told, plain = (MDiT3D(c).element.double() for c in (config, TINY))
    m, width = plain.shape
    torch.testing.assert_close(told @ told.T, torch.eye(m).double() * width / 2, atol=1e-4, rtol=0)
    torch.testing.assert_close(told.norm(dim=1), plain.norm(dim=1))
    with pytest.raises(CopeditError, match="identity 'x' is unknown; choose one of sincos, orthogonal"):
        replace(TINY.denoiser, identity="x")


def test_the_position_embedding_tells_every_token_apart() -> None:
    """All blocks asleep and every token alike: what still differs between tokens is their position."""
    z, t, prompts, observed = tiny_inputs()
    net = tiny_denoiser(("final",), patch=(1, 1, 1))
    alike = torch.ones_like(z)
    tokens = net(alike, t, prompts, observed)[0, 0].flatten(1).T
    apart = torch.cdist(tokens, tokens) / tokens.norm(dim=1).max() + torch.eye(len(tokens))
    assert apart.min() > 1e-3
    net.position.zero_()
    tokens = net(alike, t, prompts, observed)[0, 0].flatten(1).T
    assert torch.equal(tokens, tokens[:1].expand_as(tokens))


def test_a_crop_is_told_where_it_was_cut() -> None:
    """Where tokens do not look at each other, the prediction of a crop is the crop of the prediction."""
    z, t, prompts, observed = tiny_inputs()
    net = tiny_denoiser(ACROSS, patch=(1, 1, 1))
    whole, corner = net(z, t, prompts, observed), torch.tensor([[1, 0], [0, 2]])
    h, w = TINY.latent[0] - 1, TINY.latent[1] - 2

    def cut(x: Tensor) -> Tensor:
        return torch.stack([x[i, ..., a : a + h, b : b + w, :] for i, (a, b) in enumerate(corner.tolist())])

    assert same(net(cut(z), t, prompts, observed, corner), cut(whole))
    assert differs(net(cut(z), t, prompts, observed, torch.zeros_like(corner)), cut(whole))


def test_rotary_positions_of_a_crop_are_those_of_a_smaller_grid() -> None:
    """A crop's tokens see each other as the tokens of a whole grid of its size do."""
    z = tiny_inputs()[0]
    net = tiny_denoiser(patch=(1, 1, 1))
    table = net.positions(z[..., :2, :3, :].shape, torch.ones(1, 2, dtype=torch.long))[1]
    assert torch.equal(table, rope_table((2, 3, z.shape[-1]), net.config.head_dim).double())
    position, table = net.positions(z.shape, torch.zeros(1, 2, dtype=torch.long))
    assert torch.equal(position[0, 0], net.position) and torch.equal(table, net.rope)


@pytest.mark.parametrize("backbone", ["mdit3d", "dit3d", "dit"])
def test_unpatchify_inverts_patchify(backbone: str) -> None:
    net, z = tiny_denoiser(backbone=backbone), tiny_inputs()[0]
    assert torch.equal(net.unpatchify(net.patchify(z), z.shape), z)


@pytest.mark.parametrize(("grid", "head_dim"), [((3, 4, 2), 32), ((4, 3, 3), 64), ((5, 2, 1), 48), ((2, 3, 4), 96)])
def test_rope_scores_depend_on_the_offset_alone(grid: tuple[int, int, int], head_dim: int) -> None:
    table, tokens, heads = rope_table(grid, head_dim).double(), math.prod(grid), 5
    assert table.shape == (2, tokens, head_dim // 2)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, heads, head_dim, dtype=torch.float64, generator=generator)
    turned = [rotate(x.expand(1, 1, tokens, heads, head_dim), table)[0, 0] for x in (q, k)]
    score = torch.einsum("ihd,jhd->ijh", *turned)
    where = torch.cartesian_prod(*map(torch.arange, grid))  # depth fastest
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for i in range(tokens):
        for j in range(tokens):
            groups.setdefault(tuple((where[i] - where[j]).tolist()), []).append(score[i, j])
    torch.testing.assert_close(groups[0, 0, 0][0], (q * k).sum(1), rtol=1e-6, atol=1e-6)
    for scores in groups.values():
        assert (torch.stack(scores) - scores[0]).abs().max() < 1e-5  # the table is float32
    first = torch.stack([scores[0] for scores in groups.values()])
    apart = torch.cdist(first, first) + torch.eye(len(first))
    assert apart.min() > 1e-2, "two different offsets score the same"


def test_rope_gives_depth_a_quarter_and_the_plane_the_rest() -> None:
    table = rope_table((3, 3, 3), 64).unflatten(1, (3, 3, 3))
    turned = [(table.diff(dim=axis).abs().amax((0, 1, 2, 3)) > 1e-6).sum().item() for axis in (1, 2, 3)]
    assert [2 * pairs for pairs in turned] == [24, 24, 16]
