"""The body of `copedit bench sampler`: encoding, sampling, decoding and all of it, ours beside PyTorch as users write
it, eager and compiled with max-autotune, which replays CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from copedit_bench.models.contestants import Inputs, PlainEngine, decode, encode, random_networks, sample, whole
from copedit_bench.models.plain import PlainMDiT3D
from copedit_bench.models.side_by_side import BASELINE, Answer, Contestant, SideBySide, chosen
from copedit_rt.config import ModelConfig
from copedit_rt.device import choose_device, choose_dtype
from copedit_rt.engines.engine import Engine
from copedit_rt.engines.torch_engine import TorchEngine
from copedit_rt.networks.precision import exact_float32
from copedit_rt.networks.sampler import REPAID

STEPS = {"brain-brats": (10, 20, 50, 200), "cardiac": (10, 20, 50, 200, 250)}
BATCHES = (1, 8)
WHOLE = 20  # steps of a study from images to images
CHECKED = 20  # steps up to which float32 says what is right; beyond, and in larger batches, eager does


def run(
    presets: Sequence[str] | None = None,
    batches: Sequence[int] = BATCHES,
    steps: Sequence[int] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    compiled: bool = True,
    progress: Callable[[str], None] = lambda text: None,
    save: Callable[[dict[str, Any]], Any] = lambda report: None,
) -> dict[str, Any]:
    """JSON-able, see `SideBySide`. presets, steps: None for those of STEPS. On a CPU a tiny model takes the
    place of the presets: nothing is to be learnt there but that it works. save: hears the report so far.

    Raises CopeditError as `side_by_side.chosen` does, and for devices and types that do not exist.
    """
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    models = chosen(presets, tuple(STEPS), where)
    bench = SideBySide("Sampler", where, {kind}, "beside the weights", batches=list(batches))
    for config in models:
        networks = random_networks(config)
        engines: dict[str, Engine] = {BASELINE: PlainEngine(config, networks, where, kind)}
        if compiled:
            engines["compile"] = PlainEngine(config, networks, where, kind, compiled=True)
        engines["ours"] = TorchEngine(config, *networks, where, dtype=kind)
        exact = PlainEngine(config, networks, where, torch.float32 if where.type == "cuda" else torch.float64)
        bench.settings[f"{config.name} weights, MiB"] = {
            name: round(sum(p.nbytes for p in part.parameters()) / 2**20 * kind.itemsize / 4)
            for name, part in zip(("tokenizer", "denoiser"), networks, strict=True)
        }
        for batch in batches:
            inputs = Inputs(config, networks[0], batch)
            counts = steps or STEPS.get(config.name, (2, 4))
            study = min(counts, key=lambda n: abs(n - WHOLE))
            for work, call, operations in pieces(config, inputs, counts, study):
                what = {"model": config.name, "batch": batch, **work}
                progress(", ".join(map(str, what.values())))
                truth: Answer | None = None
                if batch == 1 and work["steps"] <= CHECKED:
                    with exact_float32(), bench.watch.stream():
                        truth = call(exact)
                warm = before_capture(where, work["steps"])
                makers = {name: maker(call, engine, kind, warm) for name, engine in engines.items()}
                bench.run(what, makers, truth, operations, batch)
                save(bench.report())
    return bench.report()


def pieces(
    config: ModelConfig, inputs: Inputs, steps: Sequence[int], study: int
) -> Iterator[tuple[dict[str, Any], Callable[[Engine], Answer], float]]:
    """Names of each piece of work, the work, and its operations where they are counted. steps: to sample with; study:
    from images to images."""
    step = operations(config) * len(inputs.z)
    yield {"stage": "encode", "steps": 0}, partial(encode, inputs=inputs), 0.0
    for count in steps:
        yield {"stage": "sample", "steps": count}, partial(sample, inputs=inputs, steps=count), step * count
    yield {"stage": "decode", "steps": 0}, partial(decode, inputs=inputs), 0.0
    yield {"stage": "all", "steps": study}, partial(whole, inputs=inputs, steps=study), 0.0


def maker(
    call: Callable[[Engine], Answer], engine: Engine, dtype: torch.dtype, warm: int = 0
) -> Callable[[], Contestant]:
    """warm: calls before the first that counts."""

    def make() -> Contestant:
        for _ in range(warm):
            call(engine)
        return Contestant(lambda: call(engine), dtype)

    return make


def before_capture(device: torch.device, steps: int) -> int:
    """Loops of so many steps after which the next is captured (`Plan`), so that all that are timed are replays."""
    return (REPAID - 1) // steps if device.type == "cuda" and steps else 0


def operations(config: ModelConfig) -> float:
    """Floating-point operations of one step of one study, as the reference does it: products and attention."""
    with torch.device("meta"):
        net = PlainMDiT3D(config)
        z = torch.empty(1, len(config.elements), config.tokenizer.latent_channels, *config.latent)
        given = torch.zeros(1, dtype=torch.int64), torch.empty(1, 3, config.tokenizer.prompt_dim)
        observed = torch.ones(1, len(config.elements), dtype=torch.bool)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(z, *given, observed)
    return counter.get_total_flops()
