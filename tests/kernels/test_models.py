"""Whole models on the interpreted kernels against the same models on the reference; compile and export with them."""

import math
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from checks import Recorder, assert_rule, interpreted, normal, poisoned_memory
from torch import Tensor, nn

import copedit_kernels as ops
from copedit_kernels import convolution
from copedit_kernels.dispatch import using
from copedit_rt.config import DenoiserConfig, ModelConfig, TokenizerConfig
from copedit_rt.networks.denoiser import MDiT3D
from copedit_rt.networks.tokenizer import CoPeVAE, ResidualUnit

pytestmark = interpreted

TINY = ModelConfig(
    "tiny",
    "brain",
    ("t1", "t2", "pd"),
    (16, 16, 8),
    TokenizerConfig(
        channels=(4, 8),
        strides=((2, 2, 2), (2, 2, 2)),
        residual_units=1,
        residual_channels=4,
        codes=40,
        prompt_channels=(4, 8),
        prompt_dim=12,
        contrast_dim=5,
    ),
    DenoiserConfig(width=64, heads=2, blocks=2, patch=(2, 2, 1)),
)
BATCH, ELEMENTS = 2, 3


def perturbed(module: nn.Module) -> nn.Module:
    """Zero-initialised layers would make the outputs zero and the gradients empty."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p += normal(*p.shape, seed=i, dtype=p.dtype) * (0.5 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.1)
    return module


def denoiser(**changes) -> MDiT3D:
    torch.manual_seed(0)
    net = MDiT3D(replace(TINY, denoiser=replace(TINY.denoiser, **changes))).eval()
    perturbed(net)
    return net


def denoiser_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = normal(BATCH, ELEMENTS, 8, *TINY.latent, dtype=torch.float32)
    prompts = normal(BATCH, 3, TINY.tokenizer.prompt_dim, seed=1, dtype=torch.float32)
    return z, torch.tensor([499, 20]), prompts, torch.tensor([[1, 0, 1], [0, 0, 1]]).bool()


def run(net: nn.Module, inputs: tuple[Tensor, ...], choice: str) -> dict[str, Tensor]:
    """Output and gradients of everything under a random cotangent."""
    inputs = tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs)
    with using(choice), poisoned_memory():
        out = net(*inputs)
        net.zero_grad()
        out.backward(normal(*out.shape, seed=9).to(out.dtype))
    found = {f"input {i}": x.grad for i, x in enumerate(inputs) if x.requires_grad}
    found |= {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    return {"output": out.detach(), **{name: g.clone() for name, g in found.items() if g is not None}}


def cast(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"blocks": 4}, torch.float32),
        ({}, torch.float16),
        ({"width": 96}, torch.float16),
        ({"backbone": "dit3d"}, torch.float32),
    ],
    ids=["float32", "float16", "head dimension 48", "dit3d"],
)
def test_denoiser(changes: dict, dtype: torch.dtype) -> None:
    net, inputs = denoiser(**changes).to(dtype), cast(denoiser_inputs(), dtype)
    found, low = run(net, inputs, "triton"), run(net, inputs, "reference")
    exact = run(net.double(), cast(inputs, torch.float64), "reference")
    assert found.keys() == low.keys() == exact.keys() and len(found) > 20
    for name, value in found.items():
        assert exact[name].abs().max() > 0, name
        assert_rule(value, low[name], exact[name], name)


def test_denoiser_under_autocast() -> None:
    """float16 linear layers between float32 parameters: the operators see mixed dtypes."""
    net, inputs = denoiser(), denoiser_inputs()
    with torch.autocast("cpu", torch.float16):
        found, low = run(net, inputs, "triton"), run(net, inputs, "reference")
    exact = run(net.double(), cast(inputs, torch.float64), "reference")
    for name, value in found.items():
        assert_rule(value, low[name], exact[name], name)


class Autoencoder(nn.Module):
    """The tokenizer as stage I runs it: straight through the codes, plus what the prompts say."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokenizer = perturbed(CoPeVAE(TINY.tokenizer, ELEMENTS).eval())

    def forward(self, images: Tensor, observed: Tensor) -> Tensor:
        z = self.tokenizer.encode(images)
        codes, index = self.tokenizer.quantise(z.detach())
        images = self.tokenizer.decode(z + (codes - z).detach(), joint=False)
        prompts = self.tokenizer.assess(self.tokenizer.prompts(z, observed))
        return torch.cat([images.flatten(), *(p.flatten() for p in prompts), index.flatten().to(images.dtype)])


def test_tokenizer() -> None:
    """The codes are chosen in float32, so the float64 model gets the values that float32 holds: same codes."""
    net = Autoencoder()
    inputs = (normal(BATCH, ELEMENTS, 1, *TINY.image, dtype=torch.float32).sigmoid(), denoiser_inputs()[3])
    found, low = run(net, inputs, "triton"), run(net, inputs, "reference")
    exact = run(net.double(), cast(inputs, torch.float64), "reference")
    assert found.keys() == low.keys() == exact.keys()
    for name, value in found.items():
        assert_rule(value, low[name], exact[name], name)
        assert torch.equal(value, low[name]), f"{name}: the same codes, hence the same bits"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_residual_units_take_our_convolution_where_it_is_switched_on(dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In inference alone, of one type and channels last."""
    torch.manual_seed(0)
    unit = ResidualUnit(16, 24).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    x = normal(2, 16, 5, 6, 4, dtype=torch.float32).to(memory_format=torch.channels_last_3d)
    exact = unit(x).detach()
    unit, x = unit.to(dtype), x.to(dtype)

    def calls() -> tuple[Tensor, list[str]]:
        with using("triton"), Recorder() as recorder:
            return unit(x), [func.name() for func, _ in recorder.calls]

    with torch.no_grad():
        assert calls()[1] == []
        monkeypatch.setattr(convolution, "FUSED", True)
        found, names = calls()
        assert names == ["copedit::conv3"] * 2
        bound = 1e-2 if dtype == torch.float16 else 1e-5
        torch.testing.assert_close(found.float(), exact, rtol=bound, atol=bound)
        assert found.is_contiguous(memory_format=torch.channels_last_3d)
    if dtype == torch.float32:
        assert calls()[1] == []  # with gradients


# One node per operator


def operators(graph: torch.fx.Graph) -> Counter[str]:
    calls = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    return Counter(name.split(".")[1] for name in calls if name.startswith("copedit."))


# Of two blocks and the final layer; between the blocks the embedding of elements is added, which no norm can do.
FORWARD = {"axis_attention": 2, "ada_norm": 2, "gated_residual_ada_norm": 3, "swiglu": 2}


def test_compiles_whole_with_the_operators_in_the_graph() -> None:
    torch._dynamo.reset()
    net, inputs = denoiser(), denoiser_inputs()
    seen: list[Counter[str]] = []

    def backend(module: torch.fx.GraphModule, examples: list[Tensor]):
        seen.append(operators(module.graph))
        return module.forward

    with using("triton"):
        eager = net(*inputs)
        compiled = torch.compile(net, fullgraph=True, backend=backend)(*inputs)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    assert seen == [Counter(FORWARD)]


def test_compiles_with_gradients() -> None:
    """aot_eager traces forward and backward through the fake implementations and the autograd formulas."""
    torch._dynamo.reset()
    net, inputs = denoiser(), denoiser_inputs()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    eager = run(net, inputs, "triton")
    for name, value in run(compiled, inputs, "triton").items():
        torch.testing.assert_close(value, eager[name.removeprefix("_orig_mod.")], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_denoiser_computes_what_it_computes_uncompiled(dtype: torch.dtype) -> None:
    """As `train denoiser --set compile=true` has it, forward and backward, in machine code."""
    torch._dynamo.reset()
    net, inputs = denoiser(), denoiser_inputs()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        eager = run(net, inputs, "reference")
        found = run(torch.compile(net, dynamic=False), inputs, "reference")
    for name, value in found.items():
        error = (value - eager[name.removeprefix("_orig_mod.")]).norm() / value.norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.1), f"{name}: {error}"


def test_exports_with_the_operators_in_the_graph() -> None:
    net, inputs = denoiser(), denoiser_inputs()
    with using("triton"), torch.no_grad():
        exported = torch.export.export(net, inputs)
        expected, found = net(*inputs), exported.module()(*inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert operators(exported.graph) == Counter(FORWARD)
    # An engine without the operators gets plain PyTorch instead.
    plain = exported.run_decompositions(ops.decompositions())
    assert not operators(plain.graph)
    torch.testing.assert_close(plain.module()(*inputs), expected, rtol=1e-5, atol=1e-5)
