"""The body of `copedit bench sampler`: encoding, sampling, decoding and all of it, ours beside PyTorch as users write
it, eager and compiled with max-autotune, which replays CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from copedit_bench.models.contestants import Eager, Inputs, Ours, Runner, random_networks, whole
from copedit_bench.models.plain import write_plainly
from copedit_bench.models.side_by_side import BASELINE, TINY, Answer, Contestant, Race
from copedit_rt.config import PRESETS, ModelConfig
from copedit_rt.device import choose_device, choose_dtype
from copedit_rt.errors import CopeditError
from copedit_rt.networks.denoiser import MDiT3D
from copedit_rt.networks.precision import exact_float32

STEPS = {"brain-brats": (10, 20, 50, 200), "cardiac": (10, 20, 50, 200, 250)}
BATCHES = (1, 8)
WHOLE = 20  # steps of a study from images to images
CHECKED = 20  # steps up to which float32 says what is right; beyond, and in larger batches, eager does


def run(
    presets: Sequence[str] = tuple(STEPS),
    batches: Sequence[int] = BATCHES,
    steps: Sequence[int] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    compiled: bool = True,
    progress: Callable[[str], None] = lambda text: None,
    save: Callable[[dict[str, Any]], Any] = lambda report: None,
) -> dict[str, Any]:
    """JSON-able, see `side_by_side.Race`. steps: None for those of STEPS. On a CPU a tiny model takes the place of the
    presets: nothing is to be learnt there but that it works. save: hears the report so far.

    Raises CopeditError for presets, devices and types that do not exist.
    """
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    if unknown := [name for name in presets if name not in PRESETS]:
        raise CopeditError(f"preset {unknown[0]!r} is unknown; choose among {', '.join(STEPS)}")
    models = [PRESETS[name] for name in presets] if where.type == "cuda" else [TINY]
    race = Race("Sampler", where, {kind}, "beside the weights", batches=list(batches))
    for config in models:
        networks = random_networks(config)
        runners: dict[str, Runner] = {BASELINE: Eager(config, networks, where, kind)}
        if compiled:
            runners["compile"] = Eager(config, networks, where, kind, compiled=True)
        runners["ours"] = Ours(config, networks, where, kind)
        exact = Eager(config, networks, where, torch.float32 if where.type == "cuda" else torch.float64)
        race.settings[f"{config.name} weights, MiB"] = {
            name: round(sum(p.nbytes for p in part.parameters()) / 2**20 * kind.itemsize / 4)
            for name, part in zip(("tokenizer", "denoiser"), networks, strict=True)
        }
        for batch in batches:
            inputs = Inputs(config, networks[0], batch, where)
            counts = steps or STEPS.get(config.name, (2, 4))
            study = min(counts, key=lambda n: abs(n - WHOLE))
            for work, call, operations in pieces(config, inputs, counts, study):
                what = {"model": config.name, "batch": batch, **work}
                progress(", ".join(map(str, what.values())))
                truth: Answer | None = None
                if batch == 1 and work["steps"] <= CHECKED:
                    with exact_float32(), race.watch.stream():
                        truth = call(exact)
                makers = {name: maker(call, runner, kind) for name, runner in runners.items()}
                race.run(what, makers, truth, operations, batch)
                save(race.report())
    return race.report()


def pieces(
    config: ModelConfig, inputs: Inputs, steps: Sequence[int], study: int
) -> Iterator[tuple[dict[str, Any], Callable[[Runner], Answer], float]]:
    """Names of each piece of work, the work, and its operations where they are counted. steps: to sample with; study:
    from images to images."""
    step = operations(config) * len(inputs.z)
    yield {"stage": "encode", "steps": 0}, lambda runner: runner.encode(inputs.images), 0.0
    for count in steps:

        def sample(runner: Runner, count: int = count) -> Answer:
            return runner.sample(inputs.z, inputs.prompts, inputs.observed, count)

        yield {"stage": "sample", "steps": count}, sample, step * count
    yield {"stage": "decode", "steps": 0}, lambda runner: runner.decode(inputs.codes), 0.0
    yield {"stage": "all", "steps": study}, lambda runner: whole(runner, config, inputs, study), 0.0


def maker(call: Callable[[Any], Mapping[str, Any]], runner: Any, dtype: torch.dtype) -> Callable[[], Contestant]:
    return lambda: Contestant(lambda: call(runner), dtype)


def operations(config: ModelConfig) -> float:
    """Floating-point operations of one step of one study, as the reference does it: products and attention."""
    with torch.device("meta"):
        net = write_plainly(MDiT3D(config))
        z = torch.empty(1, len(config.elements), config.tokenizer.latent_channels, *config.latent)
        given = torch.zeros(1, dtype=torch.int64), torch.empty(1, 3, config.tokenizer.prompt_dim)
        observed = torch.ones(1, len(config.elements), dtype=torch.bool)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(z, *given, observed)
    return counter.get_total_flops()
