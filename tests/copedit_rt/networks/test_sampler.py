"""The plan against `sampler.sample`, which knows nothing of it: every missing pattern, backbone and solver."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from small import perturb
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from copedit_rt.config import DenoiserConfig, DiffusionConfig, ModelConfig, TokenizerConfig
from copedit_rt.errors import CopeditError
from copedit_rt.networks.denoiser import MDiT3D
from copedit_rt.networks.sampler import REPAID, Plan, sample
from copedit_rt.schedule import timesteps

BRAIN = ModelConfig(
    "tiny-brain",
    "brain",
    ("t1", "t1ce", "t2", "flair"),
    (16, 16, 8),
    TokenizerConfig(
        channels=(4, 4), strides=((2, 2, 2), (2, 2, 2)), residual_units=1, residual_channels=4, codes=16,
        latent_channels=3, prompt_channels=(4, 4), prompt_dim=12, contrast_dim=4,
    ),
    DenoiserConfig(width=96, heads=3, blocks=4),  # heads of 32 channels, which the kernels take
    DiffusionConfig(steps=4),
)  # fmt: skip
IXI = replace(BRAIN, name="tiny-ixi", elements=("t1", "t2", "pd"))
HEART = replace(
    BRAIN,
    name="tiny-heart",
    task="cardiac",
    elements=("slab0", "slab1", "slab2", "slab3"),
    image=(16, 16, 4),
    denoiser=replace(BRAIN.denoiser, patch=(1, 1, 1)),
)
CONFIGS = {config.name: config for config in (BRAIN, IXI, HEART)}
STEPS = 5


def patterns(m: int) -> list[tuple[bool, ...]]:
    """Observed sets with something observed and something missing."""
    return [p for p in product((True, False), repeat=m) if 0 < sum(p) < m]


CASES = [(name, p) for name, config in CONFIGS.items() for p in patterns(len(config.elements))]


def network(config: ModelConfig, dtype: torch.dtype = torch.float64, device: str = "cpu", **changes) -> MDiT3D:
    config = replace(config, denoiser=replace(config.denoiser, **changes))
    torch.manual_seed(0)
    net = MDiT3D(config).eval().requires_grad_(False)
    perturb(net)
    return net.to(device, dtype)


def inputs(config: ModelConfig, batch: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """z, prompts."""
    torch.manual_seed(1)
    z = torch.randn(batch, len(config.elements), config.tokenizer.latent_channels, *config.latent, dtype=dtype)
    return z.to(device), torch.randn(batch, 3, config.tokenizer.prompt_dim, dtype=dtype).to(device)


def eagerly(net: MDiT3D, config: ModelConfig, z: Tensor, prompts: Tensor, observed: Tensor, solver: str) -> Tensor:
    return sample(lambda z, t: net(z, t, prompts, observed), z, observed, config.diffusion, STEPS, solver=solver)


def close(a: Tensor, b: Tensor) -> None:
    """Within float64's rounding, of networks whose float32 tables (positions) are the same."""
    assert (a - b).abs().max() <= 1e-10 * b.abs().max()


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_every_missing_pattern(name: str, pattern: tuple[bool, ...]) -> None:
    config, observed = CONFIGS[name], torch.tensor([pattern])
    net, (z, prompts) = network(config), inputs(config, 1, torch.float64)
    out = Plan(net, config, STEPS, observed, "dpm2m").run(z, prompts)
    close(out, eagerly(net, config, z, prompts, observed, "dpm2m"))
    assert torch.equal(out[observed], z[observed]) and not torch.equal(out[~observed], z[~observed])


RAGGED = torch.tensor([[True, False, True, True], [False, True, False, False], [True, True, False, True]])


@pytest.mark.parametrize("solver", ["ddim", "dpm2m"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"blocks": 3},  # the last block is a within-block
        {"blocks": 1},
        {"injection": "within"},
        {"injection": "both"},
        {"prompts": "none"},
        {"prompts": "mask"},
        {"prompts": "no-count"},
        {"backbone": "dit3d"},
        {"backbone": "dit"},
    ],
    ids=str,
)
def test_every_network_on_a_batch_of_different_patterns(changes: dict, solver: str) -> None:
    net, (z, prompts) = network(BRAIN, **changes), inputs(BRAIN, 3, torch.float64)
    out = Plan(net, BRAIN, STEPS, RAGGED, solver).run(z, prompts)
    close(out, eagerly(net, BRAIN, z, prompts, RAGGED, solver))
    assert torch.equal(out[RAGGED], z[RAGGED])


def test_a_plan_is_run_again_for_another_study_and_keeps_nothing_of_the_first() -> None:
    net, (z, prompts) = network(BRAIN), inputs(BRAIN, 3, torch.float64)
    plan = Plan(net, BRAIN, STEPS, RAGGED, "dpm2m")
    first, given = plan.run(z, prompts), z.clone()
    plan.run(torch.full_like(z, torch.nan), prompts + 1)
    assert torch.equal(plan.run(z, prompts), first), "something of another study is left"
    assert torch.equal(z, given), "the caller's latents were overwritten"
    other = plan.run(z, prompts + 1)
    close(other, eagerly(net, BRAIN, z, prompts + 1, RAGGED, "dpm2m"))
    assert not torch.equal(other, first)
    assert torch.equal(first, plan.run(z, prompts)), "results share the plan's buffer"


def test_observed_latents_keep_their_bits() -> None:
    net, (z, prompts) = network(BRAIN, torch.float32), inputs(BRAIN, 3, torch.float32)
    z[0, 0].view(-1)[:2] = torch.tensor([-0.0, 1e-40])
    for solver in ("ddim", "dpm2m"):
        out = Plan(net, BRAIN, STEPS, RAGGED, solver).run(z, prompts)
        assert torch.equal(out[RAGGED].view(torch.int32), z[RAGGED].view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    """Error against float64 at most twice that of the eager sampler in the same precision, and a rounding."""
    net, (z, prompts) = network(BRAIN, dtype), inputs(BRAIN, 3, dtype)
    exact = eagerly(net.double(), BRAIN, z.double(), prompts.double(), RAGGED, "ddim")
    net.to(dtype)
    plain = eagerly(net, BRAIN, z, prompts, RAGGED, "ddim")
    out = Plan(net, BRAIN, STEPS, RAGGED, "ddim").run(z, prompts)
    assert out.dtype == torch.float32
    error, allowed = ((x.double() - exact).abs().max() for x in (out, plain))
    assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.abs().max()


def test_nothing_is_computed_for_observed_elements_that_nobody_reads() -> None:
    """Floating-point operations of a step, counted, against those of the parts that remain."""
    net = network(BRAIN)
    every, some = (Plan(net, BRAIN, 1, observed, "ddim") for observed in (torch.zeros_like(RAGGED), RAGGED))

    def flops(plan: Plan) -> int:
        with FlopCounterMode(display=False) as counter:
            plan.step.zero_()
            plan._advance()
        return counter.get_total_flops()

    c, hidden, values = 96, 256, 3 * 8
    tokens = 2 * 2 * 1 * int(RAGGED.sum())
    assert flops(every) - flops(some) == 2 * tokens * (c * c + 3 * c * hidden + c * values)
    assert flops(some) < flops(every)


def test_modulation_is_one_product_a_block_before_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (z, prompts) = network(BRAIN), inputs(BRAIN, 3, torch.float64)
    plan, calls = Plan(net, BRAIN, STEPS, RAGGED, "ddim"), []
    for block in net.blocks:
        block.modulation.register_forward_hook(lambda layer, given, made: calls.append(tuple(made.shape)))
    advance = plan._advance

    def watched() -> None:
        before = len(calls)
        advance()
        assert len(calls) == before, "modulation is computed inside the loop"

    monkeypatch.setattr(plan, "_advance", watched)
    plan.run(z, prompts)
    assert calls == [(STEPS, 1, 576), (STEPS, 3, 576)] * 2


def test_the_network_sees_the_timesteps_in_order() -> None:
    """A network whose prediction is its time condition, so that a wrong row of the table is seen."""
    net, (z, prompts) = network(BRAIN), inputs(BRAIN, 1, torch.float64)
    observed, seen = torch.tensor([[True, False, True, False]]), []
    plan = Plan(net, BRAIN, STEPS, observed, "ddim")
    predict = net.predict
    net.predict = lambda z, parts, *a, **k: seen.append([part.clone() for part in parts]) or predict(z, parts, *a, **k)
    plan.run(z, prompts)
    assert len(seen) == STEPS
    for t, parts in zip(timesteps(BRAIN.diffusion, STEPS), seen, strict=True):
        for part, expected in zip(parts, net.modulate(torch.tensor([t]), prompts, observed), strict=True):
            torch.testing.assert_close(part, expected)


def test_progress_and_refusals() -> None:
    net, (z, prompts), calls = network(BRAIN), inputs(BRAIN, 3, torch.float64), []
    Plan(net, BRAIN, 3, RAGGED).run(z, prompts, lambda i, n: calls.append((i, n)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(CopeditError, match="solver 'euler' is unknown; choose one of ddim, dpm2m"):
        Plan(net, BRAIN, 3, RAGGED, "euler")
    with pytest.raises(CopeditError, match="steps 0"):
        Plan(net, BRAIN, 0, RAGGED)


@pytest.mark.parametrize(("steps", "runs"), [(REPAID, 1), (REPAID - 1, 2), (1, REPAID)])
def test_the_loop_is_captured_once_that_repays(steps: int, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the run that brings the steps to where it does, and not before."""
    net, (z, prompts), captured = network(BRAIN), inputs(BRAIN, 3, torch.float64), []
    plan = Plan(net, BRAIN, steps, RAGGED)
    assert not plan.capturable  # on a CPU
    plan.capturable = True
    monkeypatch.setattr(plan, "capture", lambda: captured.append(plan.taken))
    for _ in range(runs):
        assert not captured
        plan.run(z, prompts)
    assert captured == [steps * runs]


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.parametrize("solver", ["ddim", "dpm2m"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_graph_replays_the_plan(
    name: str, pattern: tuple[bool, ...], solver: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: the same operations in the same order."""
    monkeypatch.delenv("COPEDIT_KERNELS", raising=False)
    config, observed = CONFIGS[name], torch.tensor([pattern])
    net, (z, prompts) = network(config, dtype, "cuda"), inputs(config, 1, dtype, "cuda")
    graph, plain = (Plan(net, config, STEPS, observed, solver) for _ in range(2))
    if not graph.capturable:
        pytest.skip("no Triton kernels to capture")
    graph.capture()
    plain.capturable = False
    for shift in (0, 1):  # replayed for another study
        assert torch.equal(graph.run(z, prompts + shift), plain.run(z, prompts + shift))


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_no_step_waits_for_the_device(steps: int) -> None:
    net, (z, prompts) = network(BRAIN, torch.bfloat16, "cuda"), inputs(BRAIN, 3, torch.bfloat16, "cuda")
    plan = Plan(net, BRAIN, steps, RAGGED, "dpm2m")
    if not plan.capturable:
        pytest.skip("no Triton kernels to capture")
    plan.capture()
    assert plan.graph is not None
    expected = plan.run(z, prompts)
    for step in (plan.graph.replay, plan._advance):
        plan.z.copy_(z)
        plan.step.zero_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(steps):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(plan.z, expected)
